"""Train one slide classifier."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ...data.cohort.options import DataOptions
from ...models.classifier.options import ClassifierOptions
from ...ranges import checked
from ..log_file import logged
from ..report.run_folder import Run
from .run import HELD_OUT, TrainingRun, print_metrics
from .settings import TRAINER_DEFAULTS, Settings, column_names, first_process, settle


@checked
@logged
def fit(
    data: DataOptions,
    model: ClassifierOptions = ClassifierOptions(),
    run: str | Path | None = None,
    trainer: Mapping[str, Any] | None = None,
    monitor: Literal["val_metric", "val_loss"] | None = None,
    epochs: int = 40,
    min_steps: int = 1000,
    patience: int | None = 10,
    ema: float | None = None,
    checkpoint_every_n_steps: int | None = None,
    subgroups: list[str] | str = "",
    seed: int = 0,
    log_file: str | Path | None = None,
) -> Run:
    """Train a slide classifier on feature files, and evaluate it on the test part.

    A run that was stopped goes on when it is asked for again with the same options; one that has finished is returned.

    Args:
        data: The cohort.
        model: The classifier.
        run: Run folder. Default: `runs/<aggregator>`.
        trainer: Options of Lightning's Trainer, by name.
        monitor: What `best.ckpt` is chosen by, on the validation part: `val_loss`, the default, or `val_metric`, the rank
            measure of the task or R2. A validation part of one class is refused unless `val_loss` is asked for.
        epochs: Passes over the training bags, unless the trainer is given another limit.
        min_steps: Fewest optimiser steps: small cohorts are passed over more often than `epochs` says.
        patience: Epochs without improvement after which training stops, but not before `min_steps` steps.
        ema: Decay of an average of the weights, such as 0.999.
        checkpoint_every_n_steps: Also write `last.ckpt` within epochs, after this many steps.
        subgroups: Columns of the table by which to evaluate too, separated by commas. Default: site, if there is one.
        seed: Seed of weights, dropout and augmentation.
        log_file: Append JSON lines to this file: one for each epoch, remark and metric.

    Returns:
        The finished run: its folder, predictions, metrics and checkpoints. Where several processes train together, those
        after the first have no predictions.

    Raises:
        LongslideError: Wrong input, options that do not go together, or a run folder that holds another run.
    """
    settings = Settings(
        "fit",
        settle("fit", data, slide_embeddings=model.chosen.reads_slide_embedding),
        model,
        Path(run or f"runs/{model.chosen.class_path}"),
        TRAINER_DEFAULTS | dict(trainer or {}),
        monitor,
        epochs,
        min_steps,
        patience,
        ema,
        checkpoint_every_n_steps,
        seed,
        {"subgroups": subgroups},
    )
    there = TrainingRun(settings.run, settings.configuration, column_names(subgroups))
    cohort = settings.read_cohort()
    if there.finished:
        finished = there.again(cohort)
        print_metrics(finished)
        return finished
    record = there if first_process() else None
    if record is not None:
        record.begin(cohort)

    from .held_out import HeldOut, predict_held_out
    from .training import build, open_data, train

    training = build(settings, open_data(settings, cohort))
    if record is not None:
        facts = {"aggregator": training.aggregator, "seed": seed, "counts": training.counts, "steps": training.course}
        facts |= {"learning_rate": training.model.learning_rate, "seen": HELD_OUT}
        record.describe(training.data, command="fit", **facts)
    fold = training.data.fold
    remark = "" if fold in there.trained else train(training)
    if record is None or not training.trainer.is_global_zero:
        return Run.without_predictions(settings.run, training.data.task, {})
    record.fold_trained(fold, training.folder, remark)
    held_out = HeldOut.of(training)
    predictions = predict_held_out(held_out, [held_out], record)
    finished = record.finish(predictions, training.data.task, training.data.cohort.rows)
    print_metrics(finished)
    return finished
