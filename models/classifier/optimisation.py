"""AdamW with layer-wise learning rates, and a learning rate that warms up and then falls as a cosine."""

import math
import re
from typing import Any

from lightning import Trainer
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from .options import OptimiserOptions


class WarmupCosine:
    """The factor of the learning rate at a step. Saved with the scheduler, so that a resumed run keeps its course.

    Args:
        warmup: Steps of the linear rise.
        total: Steps of the whole training.
        floor: The factor at the end.
    """

    def __init__(self, warmup: int, total: int, floor: float) -> None:
        self.warmup, self.total, self.floor = warmup, total, floor

    def __call__(self, step: int) -> float:
        """The factor at a step, 0 the first."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        progress = min(1.0, (step - self.warmup) / max(1, self.total - self.warmup))
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))


def parameter_groups(model: nn.Module, options: OptimiserOptions, learning_rate: float) -> list[dict[str, Any]]:
    """The parameters that train, in groups of one learning rate and one weight decay.

    Args:
        model: The module; parameters `...layers.<i>...` beside a `tile_projection` are taken for a slide encoder's layers.
        options: The options.
        learning_rate: The highest learning rate.

    Returns:
        Groups for `AdamW`, those of the lowest layers first, in an order that depends on the names only.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    depths = {name: _depth(name) for name, _ in named}
    top = 1 + max((depth for depth in depths.values() if depth is not None), default=0)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        depth = depths[name]
        decays = parameter.ndim > 1 and not name.endswith(("cls_token", "mask_token"))
        level = top if depth is None or options.layer_decay == 1 else depth  # a group takes launches of its own
        groups.setdefault((level, decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": learning_rate * options.layer_decay ** (top - depth),
            "weight_decay": options.weight_decay if decays else 0.0,
        }
        for (depth, decays), parameters in sorted(groups.items(), key=lambda group: group[0])
    ]


def _depth(name: str) -> int | None:
    """0 for what feeds the slide encoder's layers, i + 1 for layer i, None for all that comes after or is no encoder's."""
    if not re.search(r"(^|\.)encoder\.", name):
        return None
    if match := re.search(r"encoder\.layers\.(\d+)\.", name):
        return int(match[1]) + 1
    return 0 if re.search(r"encoder\.(tile_projection|cls_token)", name) else None


REFERENCE_BAGS = 8
"""Bags of the steps that a learning rate is stated for."""


def configure(model: nn.Module, options: OptimiserOptions, learning_rate: float, trainer: Trainer) -> dict[str, Any]:
    """What `LightningModule.configure_optimizers` returns: AdamW, and the learning rate set at every step.

    Args:
        model: The module.
        options: The options.
        learning_rate: The highest learning rate, of steps that see 8 bags.
        trainer: Says how many steps there will be, and how many bags each sees.
    """
    total, bags = _course(trainer)
    warmup = min(total - 1, round(options.warmup * total))
    floor = options.min_learning_rate / learning_rate
    scaled = learning_rate * math.sqrt(bags / REFERENCE_BAGS)
    groups_of_parameters = parameter_groups(model, options, scaled)
    # One launch for many parameters, where they lie on a GPU.
    fused = all(parameter.is_cuda for group in groups_of_parameters for parameter in group["params"])
    optimiser = AdamW(groups_of_parameters, betas=options.betas, fused=fused or None)
    # It could take scaled gradients, and Lightning would then refuse to clip them; nobody gives it any.
    optimiser._step_supports_amp_scaling = False
    groups = len(optimiser.param_groups)
    schedule = LambdaLR(optimiser, [WarmupCosine(warmup, total, floor) for _ in range(groups)])
    return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _course(trainer: Trainer) -> tuple[int, float]:
    """Optimiser steps of the whole training, and bags that each sees on average, on all devices together.

    Not by `estimated_stepping_batches` where there is a data module: it would set up the loaders before a checkpoint is
    restored, and a run that was stopped within an epoch would begin that epoch anew.
    """
    datamodule: Any = getattr(trainer, "datamodule", None)
    if datamodule is None:
        return max(1, int(trainer.estimated_stepping_batches)), REFERENCE_BAGS
    every = len(datamodule.train_dataloader())
    limit = trainer.limit_train_batches
    batches = min(every, limit) if isinstance(limit, int) else int(every * limit)
    steps = max(1, math.ceil(batches / trainer.accumulate_grad_batches))
    epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None
    totals = [steps * epochs] if epochs else []
    totals += [trainer.max_steps] if trainer.max_steps > 0 else []
    bags = getattr(datamodule, "bags", None)  # of our data module; others train at the learning rate as it is
    seen = REFERENCE_BAGS if bags is None else len(bags("train")) / math.ceil(every / trainer.accumulate_grad_batches)
    return max(1, min(totals)) if totals else steps, seen
