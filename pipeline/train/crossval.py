"""Cross-validation: one model per fold, and the predictions of every patient by the model that has not seen it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ...data.cohort.options import DataOptions
from ...errors import LongslideError
from ...models.classifier.options import ClassifierOptions
from ...ranges import checked
from ..log_file import logged
from ..report.run_folder import Run
from .run import HELD_OUT, TrainingRun, print_metrics
from .settings import TRAINER_DEFAULTS, Settings, column_names, settle


@checked
@logged
def crossval(
    data: DataOptions,
    model: ClassifierOptions = ClassifierOptions(),
    folds: int = 5,
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
    """Train one classifier per fold, and evaluate on the patients that each has not seen.

    A run that was stopped goes on when it is asked for again with the same options; one that has finished is returned.

    Args:
        data: The cohort.
        model: The classifier.
        folds: Folds, if the splits are not given.
        run: Run folder. Default: `runs/<aggregator>`.
        trainer: Options of Lightning's Trainer, by name.
        monitor: What `best.ckpt` is best by, on the validation part: `val_loss`, the default, or `val_metric`, the rank
            measure of the task or R2. A validation part of one class is refused unless `val_loss` is asked for.
        epochs: Passes over the training bags, unless the trainer is given another limit.
        min_steps: Optimiser steps at least: small cohorts are passed over more often than `epochs` says.
        patience: Epochs without a better one after which training stops, once there were `min_steps` steps.
        ema: Decay of an average of the weights, such as 0.999.
        checkpoint_every_n_steps: Write `last.ckpt` within epochs too.
        subgroups: Columns of the table to evaluate by too, separated by commas. Default: site, if there is one.
        seed: Seed of weights, dropout and augmentation.
        log_file: Append what happens to this file as JSON lines: one for each epoch, remark and metric.

    Returns:
        The finished run: its folder, predictions, metrics and checkpoints.

    Raises:
        LongslideError: Wrong input, options that do not go together, or a run folder that holds another run.
    """
    settings = Settings(
        "crossval",
        settle("crossval", data, slide_embeddings=model.chosen.reads_slide_embedding, folds=folds),
        model,
        Path(run or f"runs/{model.chosen.class_path}"),
        TRAINER_DEFAULTS | {"devices": 1} | dict(trainer or {}),
        monitor,
        epochs,
        min_steps,
        patience,
        ema,
        checkpoint_every_n_steps,
        seed,
        {"folds": folds, "subgroups": subgroups},
    )
    record = TrainingRun(settings.run, settings.configuration, column_names(subgroups))
    cohort = settings.read_cohort()
    if record.finished:
        finished = record.again(cohort)
        print_metrics(finished)
        return finished
    record.begin(cohort)

    from .held_out import predict_held_out, run_best_model
    from .training import build, open_data, train

    every_fold = open_data(settings, cohort)
    held_out, counts, steps = [], [], []
    for fold in range(every_fold.fold_count):
        training = build(settings, every_fold.with_fold(fold))
        if training.trainer.world_size > 1:
            raise LongslideError(
                "crossval trains on one device; train the folds by `longslide fit --data.fold` on several"
            )
        counts += training.counts
        steps += training.course
        facts = {"aggregator": training.aggregator, "seed": seed, "counts": counts, "steps": steps, "seen": HELD_OUT}
        facts["learning_rate"] = training.model.learning_rate
        record.describe(training.data, command="crossval", **facts)
        print(f"fold {fold} of {every_fold.fold_count}")
        train(training, record)
        held_out.append(run_best_model(training))
    predictions = [table for fold in held_out for table in predict_held_out(fold, held_out, record)]
    finished = record.finish(predictions, every_fold.task, every_fold.cohort.rows)
    print_metrics(finished)
    return finished
