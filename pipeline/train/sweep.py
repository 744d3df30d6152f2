"""A hyperparameter grid, nested in a cross-validation: what is chosen for a fold has not seen its test patients."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...data.cohort.options import DataOptions
from ...data.table import csv_of_frame, read_table, typed
from ...data.whole_file import write_whole
from ...errors import LongslideError
from ...models.classifier.options import ClassifierOptions
from ...ranges import checked
from ..batch.places import check_places, workers_on
from ..log_file import logged
from ..report.run_folder import TRIALS, Run
from .grid import Trial, read_grid, text_of, trials_of
from .run import HISTORY, TrainingRun, print_metrics
from .settings import TRAINER_DEFAULTS, Settings, column_names, settle

if TYPE_CHECKING:
    import pandas as pd

    from ...data.cohort.datamodule import BagDataModule
    from ..batch.workers import Worker
    from .folds import FoldJob, TrainedFold


@checked
@logged
def sweep(
    data: DataOptions,
    model: ClassifierOptions = ClassifierOptions(),
    grid: Mapping[str, Any] | None = None,
    folds: int = 5,
    inner_folds: int = 3,
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
    """Try a grid of options in each fold of a cross-validation, and evaluate what was chosen on its test patients.

    Each fold chooses by the mean validation metric over inner folds of its own training and validation patients: the metrics
    of the run are those of choosing and training together (nested cross-validation, Varma & Simon 2006). A sweep that was
    stopped goes on when it is asked for again with the same options.

    Args:
        data: The cohort.
        model: The classifier, but for the grid.
        grid: Values to try for options of the model, the trainer, the course of training and the bags:
            `--grid.model.optimiser.learning-rate 1e-4,3e-4`.
        folds: Folds, if the splits are not given.
        inner_folds: Inner folds by which a fold chooses; 1 for its own training and validation part.
        run: Run folder. Default: `runs/<aggregator>-sweep`.
        trainer: Options of Lightning's Trainer, by name.
        monitor: What `best.ckpt` is chosen by, on the validation part: `val_loss`, the default, or `val_metric`, the rank
            measure of the task or R2. Options are chosen by `val_metric`, and among equals by `val_loss`.
        epochs: Passes over the training bags, unless the trainer is given another limit.
        min_steps: Fewest optimiser steps: small cohorts are passed over more often than `epochs` says.
        patience: Epochs without improvement after which training stops, but not before `min_steps` steps.
        ema: Decay of an average of the weights, such as 0.999.
        checkpoint_every_n_steps: Also write `last.ckpt` within epochs, after this many steps.
        subgroups: Columns of the table by which to evaluate too, separated by commas. Default: site, if there is one.
        seed: Seed of weights, dropout and augmentation.
        devices: Train several folds at a time, as `crossval` does.
        ray: Train on the GPUs of a Ray cluster, as `crossval` does.
        log_file: Append JSON lines to this file: one for each epoch, remark and metric.

    Returns:
        The finished run: that of a cross-validation, whose folds have chosen their own options.

    Raises:
        LongslideError: Wrong input, options that do not go together, or a run folder that holds another run.
    """
    given = dict(trainer or {})
    for option in ("accelerator", "devices"):
        check_places(given.get(option), devices, ray, f"--trainer.{option}")
    values = read_grid(grid or {})
    settings = Settings(
        "sweep",
        settle("sweep", data, slide_embeddings=model.chosen.reads_slide_embedding, folds=folds),
        model,
        Path(run or f"runs/{model.chosen.class_path}-sweep"),
        TRAINER_DEFAULTS | {"devices": 1} | given,
        monitor,
        epochs,
        min_steps,
        patience,
        ema,
        checkpoint_every_n_steps,
        seed,
        {"folds": folds, "inner_folds": inner_folds, "grid": values, "subgroups": subgroups},
    )
    # A trial trains as a cross-validation does, of which it is one without the options of the sweep.
    trials = trials_of(values, replace(settings, command="crossval", further={"folds": folds, "subgroups": subgroups}))
    record = TrainingRun(settings.run, settings.configuration, column_names(subgroups))
    cohort = settings.read_cohort()
    if record.finished:
        finished = record.again(cohort)
        print_metrics(finished)
        return finished
    record.begin(cohort)

    with record.alone(), workers_on(devices, ray, settings.run) as workers:
        from .folds import cross_validate, data_of_all

        every_fold = data_of_all(settings, cohort, workers, inner_folds)
        chosen = _select(record, trials, every_fold, workers)
        jobs = _finals(chosen, settings.run, inner_folds)
        finished = cross_validate(record, jobs, every_fold, workers, **_facts(trials, chosen, inner_folds, every_fold))
        for checkpoint in (settings.run / "trials").rglob("*.ckpt"):
            checkpoint.unlink()
    print_metrics(finished)
    for fold, trial in enumerate(chosen):
        print(f"fold {fold} chose {trial.words}")
    return finished


def _select(
    record: TrainingRun, trials: Sequence[Trial], data: "BagDataModule", workers: "Sequence[Worker]"
) -> list[Trial]:
    """Train every trial in every inner fold, and choose one for each fold; what `trials.csv` has is not trained again."""
    import pandas as pd

    from ...data.cohort.splits import check_validation
    from .folds import FoldJob, checked_build, train_folds

    several = data.inner_folds > 1
    for fold in range(data.fold_count):
        if not several and not (data.splits[f"fold_{fold}"] == "val").any():
            raise LongslideError(f"fold {fold} has no validation part to choose by: take --inner-folds 2 or more")
        splits = data.inner_splits(fold) if several else data.splits
        try:
            check_validation(splits, data.cohort, None if several else fold)
        except LongslideError as error:
            raise LongslideError(f"{'the inner folds of ' if several else ''}fold {fold}: {error}") from error
    jobs = [
        FoldJob(
            trial.settings,
            fold,
            record.folder / "trials" / str(trial.number) / f"fold_{fold}{f'_{inner}' if several else ''}",
            inner if several else None,
            trial.number,
            predicts=False,
        )
        for trial in trials
        for fold in range(data.fold_count)
        for inner in range(data.inner_folds)
    ]
    for trial, job in zip(trials, jobs[:: data.fold_count * data.inner_folds], strict=True):
        try:
            checked_build(job, data)
        except LongslideError as error:
            raise LongslideError(f"trial {trial.number} ({trial.words}): {error}") from error
    record.describe(data.with_fold(0), command="sweep")  # from now on the folder belongs to these options
    path = record.folder / TRIALS
    options = list(trials[0].values)
    table = typed(read_table(path, ("", "nan")), options) if path.is_file() else pd.DataFrame()
    rows: dict[tuple[int, int, int], dict[Any, Any]]
    rows = {(int(row["trial"]), int(row["fold"]), int(row["inner_fold"])): row for row in table.to_dict("records")}

    def key(job: FoldJob) -> tuple[int, int, int]:
        return job.trial or 0, job.fold, job.inner or 0

    left = [job for job in jobs if key(job) not in rows]

    def trained(number: int, fold: "TrainedFold") -> None:
        nonlocal table
        job = left[number]
        texts = {name: text_of(value) for name, value in trials[job.trial or 0].values.items()}
        names = dict(zip(("trial", "fold", "inner_fold"), key(job), strict=True))
        rows[key(job)] = {**names, **texts, **fold.best}
        table = pd.DataFrame([rows[one] for one in sorted(rows)])
        write_whole(path, csv_of_frame(table), "--run")
        (job.folder / "last.ckpt").unlink(missing_ok=True)
        if several:
            (job.folder / "best.ckpt").unlink(missing_ok=True)

    train_folds(left, data, workers, trained)
    return [trials[number] for number in choose(table)]


def choose(table: "pd.DataFrame") -> list[int]:
    """The trial of each fold: the highest mean of `val_metric`, among equals the lowest of `val_loss`, then the first.

    Args:
        table: `trial`, `fold`, `inner_fold`, `val_metric`, `val_loss`.
    """
    means = table.groupby(["fold", "trial"])[["val_metric", "val_loss"]].mean().reset_index()
    ordered = means.sort_values(["fold", "val_metric", "val_loss", "trial"], ascending=[True, False, True, True])
    return ordered.groupby("fold")["trial"].first().astype(int).tolist()


def _finals(chosen: Sequence[Trial], run: Path, inner_folds: int) -> "list[FoldJob]":
    """The trainings of the folds with what they have chosen; without inner folds they are done."""
    from .folds import FoldJob

    jobs = []
    for fold, trial in enumerate(chosen):
        folder = run / f"fold_{fold}"
        if inner_folds == 1:
            folder.mkdir(exist_ok=True)
            for name in (HISTORY, "best.ckpt"):
                source = run / "trials" / str(trial.number) / f"fold_{fold}" / name
                write_whole(folder / name, source.read_bytes(), "--run")
        jobs.append(FoldJob(trial.settings, fold, folder, trained=inner_folds == 1))
    return jobs


def _facts(trials: Sequence[Trial], chosen: Sequence[Trial], inner_folds: int, data: "BagDataModule") -> dict[str, Any]:
    """What `run.json` says of a sweep; of the model and the learning rate what all folds have in common."""
    from .folds import FoldJob, checked_build

    built = [
        checked_build(FoldJob(trial.settings, 0, trial.settings.run), data)
        for trial in {trial.number: trial for trial in chosen}.values()
    ]
    models = [training.aggregator for training in built]
    model = {name: value for name, value in models[0].items() if all(other.get(name) == value for other in models)}
    rates = {training.model.learning_rate for training in built}
    names = sorted({str(one["name"]) for one in models})
    return {
        "command": "sweep",
        "aggregator": model | {"name": " or ".join(names)},
        "learning_rate": rates.pop() if len(rates) == 1 else None,
        "trials": len(trials),
        "inner_folds": inner_folds,
        "chosen": [
            {"fold": fold, "trial": trial.number} | {name: text_of(value) for name, value in trial.values.items()}
            for fold, trial in enumerate(chosen)
        ],
    }
