"""Cross-validation: one model per fold, and the predictions of every patient by the model that has not seen it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ...data.cohort.options import DataOptions
from ...models.classifier.options import ClassifierOptions
from ...ranges import checked
from ..batch.places import check_places, workers_on
from ..log_file import logged
from ..report.run_folder import Run
from .run import TrainingRun, print_metrics
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
    devices: str | None = None,
    ray: str | None = None,
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
        monitor: What `best.ckpt` is chosen by, on the validation part: `val_loss`, the default, or `val_metric`, the rank
            measure of the task or R2. A validation part of one class is refused unless `val_loss` is asked for.
        epochs: Passes over the training bags, unless the trainer is given another limit.
        min_steps: Fewest optimiser steps: small cohorts are passed over more often than `epochs` says.
        patience: Epochs without improvement after which training stops, but not before `min_steps` steps.
        ema: Decay of an average of the weights, such as 0.999.
        checkpoint_every_n_steps: Also write `last.ckpt` within epochs, after this many steps.
        subgroups: Columns of the table by which to evaluate too, separated by commas. Default: site, if there is one.
        seed: Seed of weights, dropout and augmentation.
        devices: Train several folds at a time, a process on each of these: `all` GPUs, or some as `0,1,5`. A fold whose
            process dies is restarted by another.
        ray: Train the folds on the GPUs of a Ray cluster: `auto` where this machine is one of its nodes, or the address of
            its head.
        log_file: Append JSON lines to this file: one for each epoch, remark and metric.

    Returns:
        The finished run: its folder, predictions, metrics and checkpoints.

    Raises:
        LongslideError: Wrong input, options that do not go together, or a run folder that holds another run.
    """
    given = dict(trainer or {})
    for option in ("accelerator", "devices"):
        check_places(given.get(option), devices, ray, f"--trainer.{option}")
    settings = Settings(
        "crossval",
        settle("crossval", data, slide_embeddings=model.chosen.reads_slide_embedding, folds=folds),
        model,
        Path(run or f"runs/{model.chosen.class_path}"),
        TRAINER_DEFAULTS | {"devices": 1} | given,
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

    with record.alone(), workers_on(devices, ray, settings.run) as workers:
        from .folds import FoldJob, cross_validate, data_of_all

        every_fold = data_of_all(settings, cohort, workers)
        jobs = [FoldJob(settings, fold, settings.run / f"fold_{fold}") for fold in range(every_fold.fold_count)]
        finished = cross_validate(record, jobs, every_fold, workers, command="crossval")
    print_metrics(finished)
    return finished
