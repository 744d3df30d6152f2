"""How long a fold is trained, in optimiser steps: by its bags, whatever the aggregator and however many tiles they have."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lightning import Trainer

from ...data.cohort.datamodule import BagDataModule, replicas
from ...errors import LongslideError
from ...plurals import count

FEW_STEPS = 10
"""Steps per epoch below which the user is warned: an epoch is then hardly a step on the way."""


@dataclass(frozen=True)
class Steps:
    """The course of the training of a fold.

    Attributes:
        bags: Training bags.
        batches: Batches per epoch of each process.
        accumulate: Batches whose gradients make up a step.
        epochs: Passes over the training bags, if training is not stopped before; None where the trainer has other limits.
    """

    bags: int
    batches: int
    accumulate: int
    epochs: int | None

    @property
    def per_epoch(self) -> int:
        """Optimiser steps per epoch."""
        return math.ceil(self.batches / self.accumulate)

    def to_dict(self) -> dict[str, int | None]:
        """Plain types, for `run.json`."""
        return asdict(self) | {"steps_per_epoch": self.per_epoch}

    def __str__(self) -> str:
        each = self.bags / self.per_epoch
        steps = count(self.per_epoch, "step")
        text = f"{count(self.bags, 'training bag')}, {steps} per epoch of {each:.3g} bag{'s' * (each != 1)} each"
        if self.epochs is not None:
            text += f", at most {count(self.epochs, 'epoch')} ({count(self.per_epoch * self.epochs, 'step')})"
        return text

    @property
    def warning(self) -> str | None:
        """A warning about an epoch of few steps."""
        if self.per_epoch >= FEW_STEPS:
            return None
        return (
            f"only {count(self.per_epoch, 'optimiser step')} per epoch: a checkpoint is chosen among few, "
            "far apart; a lower "
            "--data.bags-per-step makes more of them"
        )


def is_limited(trainer: Mapping[str, Any]) -> bool:
    """Whether these options of a trainer say how long it trains."""
    return any(trainer.get(name) not in (None, -1) for name in ("max_epochs", "max_steps", "max_time"))


def plan_steps(data: BagDataModule, trainer: Trainer, epochs: int | None, min_steps: int) -> Steps:
    """Plan the training of a fold, and set the trainer to it.

    A step sees `data.bags_per_step` bags, in as many batches of `data.max_tokens` tiles as that takes. Small cohorts are
    passed over more often than `epochs` says, until there are `min_steps` steps; before that nothing stops the training.

    Args:
        data: The data; set up.
        trainer: The trainer.
        epochs: Passes over the training bags; None to leave the trainer's own limits as they are.
        min_steps: Optimiser steps at least.

    Raises:
        LongslideError: The trainer is given a number of batches to accumulate.
    """
    if trainer.accumulate_grad_batches != 1:
        raise LongslideError(
            "--trainer.accumulate-grad-batches follows from the bags of a step; set --data.bags-per-step"
        )
    bags = len(data.bags("train"))
    number, _ = replicas(trainer)
    batches = data.training_batches(number)
    together = bags / (batches * number)  # bags of a batch, on average
    trainer.accumulate_grad_batches = max(1, round(data.options.bags_per_step / number / together))
    per_epoch = math.ceil(batches / trainer.accumulate_grad_batches)
    if epochs is not None:
        epochs = max(epochs, math.ceil(min_steps / per_epoch))
        trainer.fit_loop.max_epochs = epochs
        trainer.fit_loop.epoch_loop.min_steps = min_steps
    return Steps(bags, batches, trainer.accumulate_grad_batches, epochs)
