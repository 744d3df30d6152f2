"""Training of several folds: one after the other in this process, or each by a worker on a device of its own."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from ...data.cohort.cohort import Cohort
from ...data.cohort.splits import Part
from ...data.table import read_table, typed
from ...errors import LongslideError
from ..batch.progress import duration
from ..batch.tasks import TaskFeed, TaskRun
from ..batch.workers import Worker
from ..report.run_folder import Run
from .run import HELD_OUT, HISTORY, TrainingRun
from .settings import Settings, alone

if TYPE_CHECKING:
    from ...data.cohort.datamodule import BagDataModule
    from .prediction_table import Outputs
    from .training import Training


BEST = ("epoch", "val_loss", "val_metric")
"""Columns of the history that a model is selected by."""


@dataclass(frozen=True)
class FoldJob:
    """A fold to train.

    Attributes:
        settings: How.
        fold: The fold.
        folder: Where its checkpoints and its history go.
        inner: The inner fold of it that is trained instead.
        trial: Number of the trial of a sweep that it belongs to.
        trained: Whether it is trained already, and its best model has only to be run.
        predicts: Whether its best model is run.
    """

    settings: Settings
    fold: int
    folder: Path
    inner: int | None = None
    trial: int | None = None
    trained: bool = False
    predicts: bool = True

    @property
    def name(self) -> str:
        """What it is called, for messages."""
        trial = "" if self.trial is None else f"trial {self.trial}, "
        return f"{trial}fold {self.fold}" + ("" if self.inner is None else f", inner fold {self.inner}")

    def data(self, every_fold: "BagDataModule") -> "BagDataModule":
        """The data of the fold."""
        return every_fold.with_fold(self.fold, self.inner, self.settings.data)


@dataclass(frozen=True)
class TrainedFold:
    """A fold that has been trained.

    Attributes:
        course: How long it was trained, for `run.json`.
        remark: What is to be remarked of its training, if anything is.
        best: The row of the history of its best model.
        outputs: Of its best model, for each part that is not empty; none of a job that predicts nothing.
    """

    course: list[dict[str, Any]]
    remark: str
    best: dict[str, float]
    outputs: "dict[Part, Outputs]"


def data_of_all(settings: Settings, cohort: Cohort, workers: Sequence[Worker], inner_folds: int = 1) -> "BagDataModule":
    """The data of all folds, for this process: where others train, it keeps no features."""
    from .training import open_data

    if workers:
        settings = replace(settings, data=replace(settings.data, cache_gb=0))
    return open_data(settings, cohort, inner_folds)


def cross_validate(
    record: TrainingRun,
    jobs: Sequence[FoldJob],
    data: "BagDataModule",
    workers: Sequence[Worker],
    **facts: Any,
) -> Run:
    """Train every fold, and finish the run with the predictions for the patients that each has not seen.

    Args:
        record: The run.
        jobs: The folds, from the first to the last.
        data: The data of all folds.
        workers: Who trains; nobody for this process.
        **facts: What else is to be in `run.json`.

    Raises:
        LongslideError: Wrong input; or a fold with which two processes have died.
    """
    from .held_out import HeldOut, predict_held_out

    first = checked_build(jobs[0], data)
    folds = [job.data(data) for job in jobs]
    counts = [row | {"fold": job.fold} for job, fold in zip(jobs, folds, strict=True) for row in fold.counts()]
    facts = {"aggregator": first.aggregator, "learning_rate": first.model.learning_rate, "seen": HELD_OUT} | facts
    record.describe(*folds, seed=jobs[0].settings.seed, counts=counts, steps=[], **facts)
    held_out: dict[int, HeldOut] = {}

    def trained(number: int, fold: TrainedFold) -> None:
        job = jobs[number]
        steps = [*record.facts["steps"], *fold.course]
        record.facts["steps"] = sorted(steps, key=lambda row: int(row["fold"]))
        held_out[number] = HeldOut(job.folder / "best.ckpt", folds[number], fold.outputs)
        record.fold_trained(job.fold, job.folder, fold.remark)

    known = [replace(job, trained=job.trained or job.fold in record.trained) for job in jobs]
    train_folds(known, data, workers, trained)
    in_order = [held_out[number] for number in range(len(jobs))]
    predictions: list[pd.DataFrame] = [table for fold in in_order for table in predict_held_out(fold, in_order, record)]
    return record.finish(predictions, data.task, data.cohort.rows)


def checked_build(job: FoldJob, data: "BagDataModule") -> "Training":
    """Build what a job trains, to see whether that goes.

    Raises:
        LongslideError: It does not, or not on one device.
    """
    from .training import build

    training = build(job.settings, job.data(data))
    if training.trainer.world_size > 1:
        raise LongslideError(
            "a fold is trained on one device: give --devices for several folds at a time, or train each fold by "
            "`longslide fit --data.fold` on several devices"
        )
    return training


def train_folds(
    jobs: Sequence[FoldJob],
    data: "BagDataModule",
    workers: Sequence[Worker],
    on_trained: Callable[[int, TrainedFold], None],
) -> None:
    """Train folds that do not depend on each other.

    Args:
        jobs: The folds; of one cohort, with the same feature files.
        data: Their data, for this process.
        workers: Who trains; nobody for this process.
        on_trained: Is called with the number of each job as it ends.

    Raises:
        LongslideError: Wrong input; or a fold with which two processes have died.
    """
    if not jobs:
        return
    to_train = sum(not job.trained for job in jobs)
    done, began = 0, time.monotonic()

    def ended(number: int, fold: TrainedFold) -> None:
        """Say how long the other folds take, which the lines of the epochs know nothing of."""
        nonlocal done
        on_trained(number, fold)
        done += not jobs[number].trained
        if not jobs[number].trained and done < to_train:
            taken = time.monotonic() - began
            left = duration(taken / done * (to_train - done))
            line = f"{jobs[number].name} is trained, {done} of {to_train} in {duration(taken)}, about {left} left"
            print(line, file=sys.stderr, flush=True)

    if workers:
        work = partial(_train_for, tuple(jobs), data.cohort, data.inner_folds)
        TaskRun(workers, work, [f"{job.folder}: {job.name}" for job in jobs], ended).run()
        return
    for number, job in enumerate(jobs):
        ended(number, _train(job, data))


def _train_for(
    jobs: Sequence[FoldJob], cohort: Cohort, inner_folds: int, device: str, pipe: "Connection[Any, Any]"
) -> None:
    """Train, in a process of its own, the folds that a `TaskRun` asks for."""
    alone()
    from .training import open_data

    feed = TaskFeed(pipe)
    data = None
    for number in feed:
        job = jobs[number]
        job = replace(job, settings=job.settings.on(device))
        data = data or open_data(job.settings, cohort, inner_folds)
        feed.ended(number, _train(job, data, beside=True))


def _train(job: FoldJob, data: "BagDataModule", *, beside: bool = False) -> TrainedFold:
    from .held_out import run_best_model
    from .training import best_epoch, build, train

    training = build(job.settings, job.data(data), folder=job.folder, name=job.name, beside=beside)
    remark = "" if job.trained else train(training)
    history = typed(read_table(job.folder / HISTORY, ("", "nan")))
    best = history[history["epoch"] == best_epoch(job.folder / "best.ckpt")].iloc[-1]
    outputs = run_best_model(training) if job.predicts else {}
    return TrainedFold(training.course, remark, {name: float(best[name]) for name in BEST}, outputs)
