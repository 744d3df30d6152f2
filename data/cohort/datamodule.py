"""The data of a training run as a Lightning data module: cohort, splits, bags, loaders, and what is known of them."""

import copy
import multiprocessing
import sys
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import lightning
import numpy as np
import pandas as pd
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader

from ...errors import LongslideError
from ...task import CLASSIFICATION, Task, TaskKind
from ..features.cache import FeatureCache
from ..features.statistics import FeatureStatistics
from ..features.survey import FeatureSurvey, survey_features
from ..table import listed
from .augmentation import Augmentation
from .bags import Bag, BagDataset, make_bags
from .cohort import Cohort, read_cohort
from .sampler import BagLoader, TokenBudgetBatchSampler
from .split_folder import FOLD_COLUMN
from .splits import PARTS, Part, check_splits, make_splits, read_splits, write_splits

NO_AUGMENTATION = Augmentation()


def _first_rank() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0


class BagDataModule(lightning.LightningDataModule):
    """A table of labels and a folder of feature files as batches for training, validation and test.

    Everything is read and checked when the first thing of it is asked for, `setup` at the latest.

    Args:
        features: Folder of feature files, `<slide_id>.h5`.
        table: CSV, TSV, Parquet or Excel (.xlsx) with `slide_id` or `slide`, optionally `patient_id` (or `pat_id`,
            `case_id`), label columns, optionally `site` and `fold_0`, `fold_1`, ... or `split`; or a folder of train_0.csv,
            val_0.csv, test_0.csv, ... Without a table every feature file is a slide, and there are no labels.
        task: Kind of task. Without it, and without a task file, no labels are read (self-supervised training).
        label: Label column; the label columns for multilabel; the columns of time and event for survival. Default: `label`.
        classes: Classes in their order: negative first for binary, low to high for ordinal. Default: sorted.
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
        bags: A bag a slide, or a bag a patient: all slides of the patient as one sequence, their grids side by side.
        max_tokens: Tiles in a batch at most; a bag that has more is a batch of its own. None for no limit.
        max_bags: Bags in a batch at most. None for no limit.
        max_tiles: Tiles of a bag at most in training, drawn at random anew in each epoch. None, the default, cuts nothing.
        balance: Draw training bags so that each class comes equally often.
        augment: How training bags are changed.
        slide_embeddings: Use the slide embeddings of the files: each slide has one tile, its embedding (linear probes).
        cache_gb: Gigabytes of features that each training process (each rank) keeps in memory.
        workers: Processes that put batches together; 0 does it in the training process.
        seed: Of splits, order of bags and augmentation.
    """

    def __init__(
        self,
        features: Path,
        table: Path | None = None,
        task: TaskKind | None = None,
        label: list[str] | str | None = None,
        classes: list[str | int | float] | None = None,
        times: list[float] | None = None,
        discrete_time: bool = False,
        task_file: Path | None = None,
        patient_column: str | None = None,
        splits: Literal["train", "test"] | Path | None = None,
        fold: int = 0,
        folds: int = 1,
        val_share: float = 0.15,
        test_share: float = 0.2,
        keep_sites_apart: bool = False,
        bags: Literal["slide", "patient"] = "slide",
        max_tokens: int | None = 32768,
        max_bags: int | None = None,
        max_tiles: int | None = None,
        balance: bool = False,
        augment: Augmentation = NO_AUGMENTATION,
        slide_embeddings: bool = False,
        cache_gb: float = 8.0,
        workers: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("max_tokens", max_tokens, 1),
            ("max_bags", max_bags, 1),
            ("max_tiles", max_tiles, 1),
            ("fold", fold, 0),
            ("cache_gb", cache_gb, 0),
            ("workers", workers, 0),
            ("seed", seed, 0),
        ):
            if value is not None and value < least:
                raise LongslideError(f"--data.{name} {value} must be at least {least}")
        self.features = Path(features)
        self.table = None if table is None else Path(table)
        self.patient_column = patient_column
        self.task_kind = task
        self.label = label
        self.classes = classes
        self.times = times
        self.discrete_time = discrete_time
        self.task_file = None if task_file is None else Path(task_file)
        self.only_part = str(splits) if splits is not None and str(splits) in ("train", "test") else None
        self.splits_file = None if splits is None or self.only_part else Path(splits)
        self.fold = fold
        self.folds = folds
        self.val_share = val_share
        self.test_share = test_share
        self.keep_sites_apart = keep_sites_apart
        self.bag_unit = bags
        self.max_tokens = max_tokens
        self.max_bags = max_bags
        self.max_tiles_asked = max_tiles
        self.balance = balance
        self.augment = augment
        self.slide_embeddings = slide_embeddings
        self.cache_gb = cache_gb
        self.workers = workers
        self.seed = seed
        self._told: set[str] = set()  # of all folds: Lightning calls `setup` again, and most notes are of the cohort

    # What is read once and holds for all folds.

    @cached_property
    def cohort(self) -> Cohort:
        """The slides with features and labels."""
        return read_cohort(
            self.table,
            self.features,
            task=self.task_kind,
            label=self.label,
            classes=self.classes,
            times=self.times,
            discrete_time=self.discrete_time,
            task_file=self.task_file,
            all_classes=self.only_part != "test",
            patients=self.patient_column,
        )

    @property
    def task(self) -> Task:
        """What is to be predicted.

        Raises:
            LongslideError: There are no labels.
        """
        if self.cohort.task is None:
            raise LongslideError("no labels: give --data.table and --data.task, or --data.task_file")
        return self.cohort.task

    @cached_property
    def _splits_and_notes(self) -> tuple[pd.DataFrame, list[str]]:
        cohort, path = self.cohort, self.splits_file
        notes: list[str] = []
        if self.only_part is not None:
            return cohort.rows[["slide_id", "patient_id"]].assign(fold_0=self.only_part), notes
        if path is not None and path.exists():
            splits, notes = read_splits(path, cohort, self.patient_column)
            notes.append(f"splits are those of {path}")
        elif path is None and cohort.given_splits is not None:
            given = cohort.given_splits.drop(columns="patient_id")
            splits = cohort.rows[["slide_id", "patient_id"]].merge(given, on="slide_id", how="left")
            notes.append(f"splits are those of {self.table}")
        else:
            splits = make_splits(
                cohort,
                folds=self.folds,
                val_share=self.val_share,
                test_share=self.test_share,
                keep_sites_apart=self.keep_sites_apart,
                seed=self.seed,
            )
        return check_splits(splits, cohort, keep_sites_apart=self.keep_sites_apart), notes

    @property
    def splits(self) -> pd.DataFrame:
        """A row for each slide of the cohort: `slide_id`, `patient_id`, `fold_0`, ... with train, val, test or nothing."""
        return self._splits_and_notes[0]

    @property
    def fold_count(self) -> int:
        """Folds that the splits have."""
        return sum(bool(FOLD_COLUMN.fullmatch(name)) for name in self.splits.columns)

    @cached_property
    def cache(self) -> FeatureCache:
        """The features in memory."""
        return FeatureCache(self.cache_gb, slide_embeddings=self.slide_embeddings)

    @cached_property
    def survey(self) -> FeatureSurvey:
        """What the feature files are; the first call reads and checks them all, those of the training part first."""
        rows = self._rows
        unused = np.setdiff1d(np.arange(len(self.cohort.files)), np.concatenate(list(rows.values())))
        return survey_features(
            self.cohort.files,
            self.cache,
            order=np.concatenate([*rows.values(), unused]).tolist(),
            threads=max(2, self.workers),
            quiet=not _first_rank(),
        )

    @property
    def feature_dim(self) -> int:
        """Length of a tile embedding; of a slide embedding with `slide_embeddings`."""
        return self.survey.dim

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What made the features; see `FeatureSurvey.preprocessing`."""
        return dict(self.survey.preprocessing)

    @property
    def max_tiles(self) -> int | None:
        """Tiles of a training bag at most: as asked, else what the task file says."""
        return self.max_tiles_asked if self.max_tiles_asked is not None else self.cohort.max_tiles

    # What belongs to the fold.

    def with_fold(self, fold: int) -> Self:
        """The same data in another fold; cohort, splits, checks and cache are shared."""
        _ = self._splits_and_notes, self.survey
        other = copy.copy(self)
        other.fold = fold
        other.trainer = None
        for name in ("_rows", "_bags", "training_features"):
            other.__dict__.pop(name, None)
        return other

    @cached_property
    def _rows(self) -> dict[str, np.ndarray]:
        name = f"fold_{self.fold}"
        if name not in self.splits.columns:
            raise LongslideError(f"--data.fold {self.fold}: the splits have {self.fold_count} folds, numbered from 0")
        parts = self.splits[name].to_numpy()
        return {part: np.flatnonzero(parts == part) for part in PARTS}

    @cached_property
    def _bags(self) -> dict[str, list[Bag]]:
        return {
            part: make_bags(self.cohort, rows, self.survey.tiles, self.bag_unit) for part, rows in self._rows.items()
        }

    def bags(self, part: Part) -> list[Bag]:
        """The bags of a part of the fold; `index` in a batch is the position in this list."""
        return self._bags[part]

    @cached_property
    def training_features(self) -> FeatureStatistics:
        """Statistics of the tiles of the training part, and of nothing else.

        Raises:
            LongslideError: There is no training part.
        """
        rows = self._rows["train"]
        if not len(rows):
            raise LongslideError(f"fold {self.fold} has no slides to train on; see --data.splits")
        return FeatureStatistics.of([self.survey.moments[row] for row in rows])

    @property
    def class_weights(self) -> Tensor | None:
        """Weights that even out the classes of the training bags.

        `(C,)` float32 n / (C * n_c) for binary, multiclass and ordinal; `(C,)` negatives / positives of each label for
        multilabel; None for other tasks.
        """
        task = self.task
        if task.kind not in (*CLASSIFICATION, "multilabel"):
            return None
        targets = self.training_targets
        if task.kind == "multilabel":
            positives, negatives = (targets == 1).sum(0), (targets == 0).sum(0)
            return torch.from_numpy((negatives / positives).astype(np.float32))
        counts = np.bincount(targets, minlength=len(task.classes))
        return torch.from_numpy((len(targets) / (len(task.classes) * counts)).astype(np.float32))

    @property
    def training_targets(self) -> np.ndarray:
        """Targets of the training bags, as in `Cohort.targets`."""
        return np.stack([bag.target for bag in self.bags("train") if bag.target is not None])

    @property
    def notes(self) -> list[str]:
        """What the user should be told, a line each."""
        notes = [*self.cohort.notes, *self._splits_and_notes[1], *self.survey.notes]
        if self.cohort.mixed_patients:
            notes.append(f"{len(self.cohort.mixed_patients)} patients have slides with different labels")
        if self.truncated["bags"]:
            notes.append(
                f"{self.truncated['bags']} training bags have more than {self.max_tiles} tiles: "
                f"{self.truncated['tiles']:,} tiles are left out in each epoch (--data.max_tiles)"
            )
        if self.only_part is None:
            notes += self._notes_of_fold()
        return notes

    def _notes_of_fold(self) -> list[str]:
        """What the validation and test parts lack: metrics need all classes."""
        notes = []
        for row in self.counts()[1:]:
            if not row["slides"]:
                notes.append(f"fold {self.fold} has no {row['part']} part")
                continue
            absent = [name for name, count in row.get("classes", {}).items() if not count]
            if absent:
                notes.append(f"the {row['part']} part of fold {self.fold} has no slide of class {listed(absent)}")
        return notes

    @property
    def truncated(self) -> dict[str, int]:
        """`bags` of the training part with more tiles than `max_tiles`, and `tiles` that are left out in an epoch."""
        limit = self.max_tiles
        surplus = [sum(bag.tiles) - limit for bag in self.bags("train") if limit is not None and sum(bag.tiles) > limit]
        return {"bags": len(surplus), "tiles": sum(surplus)}

    def counts(self) -> list[dict[str, Any]]:
        """For each part of the fold: `part`, `patients`, `slides`, `tiles`; slides of each of the `classes`, or `events`."""
        rows = []
        task = self.cohort.task
        for part, index in self._rows.items():
            row: dict[str, Any] = {
                "part": part,
                "patients": int(self.cohort.rows["patient_id"].iloc[index].nunique()),
                "slides": len(index),
                "tiles": int(self.survey.tiles[index].sum()),
            }
            if task is not None and self.cohort.targets is not None:
                targets = self.cohort.targets[index]
                if task.kind in CLASSIFICATION:
                    row["classes"] = {name: int((targets == i).sum()) for i, name in enumerate(task.classes)}
                elif task.kind == "multilabel":
                    row["classes"] = {name: int((targets[:, i] == 1).sum()) for i, name in enumerate(task.classes)}
                elif task.kind == "survival":
                    row["events"] = int(targets[:, 1].sum())
            rows.append(row)
        return rows

    # Lightning.

    def setup(self, stage: str | None = None) -> None:
        """Read and check everything, and tell what was found."""
        _ = self._bags
        if self.only_part != "test":
            _ = self.training_features
        if _first_rank():
            if self.splits_file is not None and not self.splits_file.exists():
                write_splits(self.splits_file, self.splits)  # only now: splits that are refused would be used again
            for note in self.notes:
                if note not in self._told:
                    print(note, file=sys.stderr)
                    self._told.add(note)

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled, augmented batches; resumable."""
        dataset = BagDataset(
            self.bags("train"),
            self.cache,
            augmentation=self.augment,
            max_tiles=self.max_tiles,
            feature_std=self.training_features.std,
            seed=self.seed,
        )
        sampler = TokenBudgetBatchSampler(
            dataset.lengths, shuffle=True, stratum=self._stratum() if self.balance else None, **self._sampling()
        )
        return BagLoader(dataset, batch_size=None, sampler=sampler, **self._loading())

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """All validation bags in order, whole."""
        return self._in_order("val")

    def test_dataloader(self) -> DataLoader[Any] | list[Any]:
        """All test bags in order, whole."""
        return self._in_order("test")

    def in_order(self, part: Part) -> DataLoader[Any]:
        """The bags of any part in order, whole: for evaluation."""
        dataset = BagDataset(self.bags(part), self.cache, seed=self.seed)
        sampler = TokenBudgetBatchSampler(dataset.lengths, **self._sampling())
        return DataLoader(dataset, batch_size=None, sampler=sampler, **self._loading())

    def _in_order(self, part: Part) -> DataLoader[Any] | list[Any]:
        return self.in_order(part) if self.bags(part) else []

    def _stratum(self) -> np.ndarray:
        """What is balanced: the class; the combination of labels; whether there was an event."""
        task, targets = self.task, self.training_targets
        if task.kind == "regression":
            raise LongslideError("--data.balance needs classes; a regression task has none")
        if task.kind == "survival":
            return targets[:, 1].astype(np.int64)
        if task.kind == "multilabel":
            return np.asarray(np.unique(np.nan_to_num(targets), axis=0, return_inverse=True)[1]).reshape(-1)
        return targets

    def _sampling(self) -> dict[str, Any]:
        trainer = self.trainer
        return {
            "max_tokens": self.max_tokens,
            "max_bags": self.max_bags,
            "num_replicas": 1 if trainer is None else trainer.world_size,
            "rank": 0 if trainer is None else trainer.global_rank,
            "seed": self.seed,
        }

    def _loading(self) -> dict[str, Any]:
        """Options of the loaders. Forked workers share the memory of the cache, which the survey has filled."""
        options: dict[str, Any] = {"num_workers": self.workers, "pin_memory": torch.cuda.is_available()}
        if self.workers:
            fork = "fork" in multiprocessing.get_all_start_methods() and sys.platform == "linux"
            options |= {"prefetch_factor": 2, "multiprocessing_context": "fork" if fork else None}
            options["persistent_workers"] = True
        return options
