"""The options of training data. Nothing here imports torch, so that a command line is parsed without it."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ...ranges import check_options
from ...task import TaskKind
from .augmentation import Augmentation

if TYPE_CHECKING:
    from .cohort import Cohort


@dataclass(frozen=True)
class DataOptions:
    """A table of labels, a folder of feature files, and how training reads them.

    Attributes:
        features: Folder of feature files, `<slide_id>.h5`.
        table: CSV, TSV, Parquet or Excel (.xlsx) with `slide_id` or `slide`, optionally `patient_id` (or `pat_id`,
            `case_id`), label columns, optionally `site` and `fold_0`, `fold_1`, ... or `split`; or a folder of train_0.csv,
            val_0.csv, test_0.csv, ... Without a table every feature file is a slide, and there are no labels.
        task: Kind of task. Without it, and without a task file, no labels are read (self-supervised training).
        label: Label column; the label columns for multilabel; the columns of time and event for survival. Default: `label`.
        classes: Classes in their order: negative first for binary, low to high for ordinal. Default: sorted.
        positive: The positive class of a binary task. Default: the last of the classes.
        times: Ends of the time intervals of discrete-time survival, or the times at which Cox survival is reported.
            Default: from the quarters of the event times.
        discrete_time: Discrete-time survival instead of Cox's.
        task_file: YAML task file of prov-gigapath, instead of task, label and classes.
        patient_column: Column that names the patient, if it has another name; `none` if each slide is a patient of its own.
        splits: CSV with slide_id and fold_0, fold_1, ... of train, val, test; used if it is there, else the splits are made
            and written there. Also a folder of train_0.csv, ... of prov-gigapath; or `train` or `test`: every slide is in
            that part. Default: the split columns of the table, else made.
        fold: The fold that is used.
        folds: Folds that are made: 1 is one split into train, val and test.
        val_share: Share of the patients outside the test part that validate.
        test_share: Share of the patients that test, if folds is 1.
        keep_sites_apart: No site (column `site`) is in two parts of a fold.
        bags: One bag per slide, or one bag per patient: all slides of the patient as one sequence, their grids side by side.
        max_tokens: Tiles in a batch at most, for memory; a bag that has more is a batch of its own. None for no limit.
        bags_per_step: Bags that an optimiser step sees, on all devices together: where `max_tokens` divides them into
            several batches, their gradients are added up.
        max_tiles: Tiles of a bag at most in training, drawn at random again in each epoch. None, the default, cuts nothing.
        balance: Draw training bags so that each class comes equally often.
        augment: How training bags are changed.
        slide_embeddings: Use the slide embeddings of the files: each slide has one tile, its embedding (linear probes).
        cache_gb: Gigabytes of features that each training process (each rank) keeps in memory at most; 0 reads each file in
            every epoch. Default: as much as it leaves free.
        workers: Threads that put batches together ahead; 0 makes each one when it is wanted.
        seed: Of splits, order of bags and augmentation.

    Raises:
        LongslideError: A number is out of its range.
    """

    features: str | Path
    table: str | Path | None = None
    task: TaskKind | None = None
    label: list[str] | str | None = None
    classes: list[str | int | float] | None = None
    positive: str | int | float | None = None
    times: list[float] | None = None
    discrete_time: bool = False
    task_file: str | Path | None = None
    patient_column: str | None = None
    splits: str | Path | None = None
    fold: int = 0
    folds: int = 1
    val_share: float = 0.15
    test_share: float = 0.2
    keep_sites_apart: bool = False
    bags: Literal["slide", "patient"] = "slide"
    max_tokens: int | None = 32768
    bags_per_step: int = 8
    max_tiles: int | None = None
    balance: bool = False
    augment: Augmentation = Augmentation()
    slide_embeddings: bool = False
    cache_gb: float | None = None
    workers: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        check_options({field.name: getattr(self, field.name) for field in fields(self)}, "data.")

    @property
    def only_part(self) -> str | None:
        """The part that every slide is in, if `splits` names one."""
        return str(self.splits) if str(self.splits) in ("train", "test") else None

    @property
    def splits_file(self) -> Path | None:
        """The file or folder of the splits, if `splits` names one."""
        return None if self.splits is None or self.only_part else Path(self.splits)

    def read_cohort(self) -> "Cohort":
        """The slides with features and labels.

        Raises:
            LongslideError: Table, labels or feature files are wrong.
        """
        from .cohort import read_cohort

        return read_cohort(
            None if self.table is None else Path(self.table),
            Path(self.features),
            task=self.task,
            label=self.label,
            classes=self.classes,
            positive=self.positive,
            times=self.times,
            discrete_time=self.discrete_time,
            task_file=None if self.task_file is None else Path(self.task_file),
            all_classes=self.only_part != "test",
            patients=self.patient_column,
        )
