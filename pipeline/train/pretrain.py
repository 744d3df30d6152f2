"""Pretrain a slide encoder on unlabelled slides, by masked autoencoding."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...data.cohort.options import DataOptions
from ...models.slide_encoder.mae_options import PretrainingOptions
from ...ranges import checked
from ..log_file import logged
from .run import TrainingRun
from .settings import TRAINER_DEFAULTS, Settings, first_process, settle


@dataclass(frozen=True)
class PretrainedEncoder:
    """A slide encoder that was pretrained.

    Attributes:
        folder: The run folder, with `config.yaml`, `run.json` and `history.csv`.
        checkpoint: The best checkpoint: `ClassifierOptions(checkpoint=...)` begins with it.
    """

    folder: Path
    checkpoint: Path

    @property
    def ok(self) -> bool:
        """A run that has finished counts as done."""
        return True


@checked
@logged
def pretrain(
    data: DataOptions,
    model: PretrainingOptions = PretrainingOptions(),
    run: str | Path = Path("runs/mae"),
    trainer: Mapping[str, Any] | None = None,
    epochs: int = 40,
    min_steps: int = 1000,
    patience: int | None = None,
    ema: float | None = None,
    checkpoint_every_n_steps: int | None = None,
    seed: int = 0,
    log_file: str | Path | None = None,
) -> PretrainedEncoder:
    """Pretrain a slide encoder on feature files without labels, by masked autoencoding.

    A run that was stopped goes on when it is asked for again with the same options; one that has finished is returned.
    `best.ckpt` has the lowest loss on the
    validation part.

    Args:
        data: The slides.
        model: The slide encoder, and how it is pretrained.
        run: Run folder.
        trainer: Options of Lightning's Trainer, by name.
        epochs: Passes over the training bags, unless the trainer is given another limit.
        min_steps: Fewest optimiser steps: small cohorts are passed over more often than `epochs` says.
        patience: Epochs without improvement after which training stops, but not before `min_steps` steps.
        ema: Decay of an average of the weights, such as 0.999.
        checkpoint_every_n_steps: Also write `last.ckpt` within epochs, after this many steps.
        seed: Seed of weights, masks and augmentation.
        log_file: Append JSON lines to this file: one for each epoch, remark and metric.

    Returns:
        The checkpoint and its folder.

    Raises:
        LongslideError: Wrong input, options that do not go together, or a run folder that holds another run.
    """
    settings = Settings(
        "pretrain",
        settle("pretrain", data),
        model,
        Path(run),
        TRAINER_DEFAULTS | dict(trainer or {}),
        "val_loss",
        epochs,
        min_steps,
        patience,
        ema,
        checkpoint_every_n_steps,
        seed,
        {},
    )
    there = TrainingRun(settings.run, settings.configuration)
    cohort = settings.read_cohort()
    if there.finished:
        there.say_finished(cohort)
        return PretrainedEncoder(settings.run, settings.run / "best.ckpt")
    record = there if first_process() else None
    if record is not None:
        record.begin(cohort)

    from .training import build, open_data, train

    training = build(settings, open_data(settings, cohort))
    if record is not None:
        facts = {"aggregator": training.aggregator, "seed": seed, "counts": training.counts, "steps": training.course}
        record.describe(training.data, command="pretrain", **facts)
    fold = training.data.fold
    remark = "" if fold in there.trained else train(training)
    encoder = PretrainedEncoder(settings.run, settings.run / "best.ckpt")
    if record is not None:
        record.fold_trained(fold, training.folder, remark)
        record.finish_without_predictions()
        print(f"pretrained: use it by --model.checkpoint {encoder.checkpoint}")
    return encoder
