"""The data of a training run as a Lightning data module: cohort, splits, bags, loaders, and what is known of them."""

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any, Self, assert_never

import lightning
import numpy as np
import pandas as pd
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader

from ...errors import LongslideError
from ...plurals import count
from ...task import CLASSIFICATION, Task
from ..features.cache import FeatureCache
from ..features.statistics import FeatureStatistics
from ..features.survey import FeatureSurvey, survey_features
from ..table import listed
from .bags import Bag, BagDataset, make_bags
from .cohort import Cohort
from .labels import interval_ends
from .options import DataOptions
from .sampler import BagLoader, TokenBudgetBatchSampler
from .split_folder import FOLD_COLUMN
from .splits import PARTS, Part, check_splits, read_splits, write_splits
from .stratification import make_inner_splits, make_splits

logger = logging.getLogger(__name__)


def _first_rank() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0


def replicas(trainer: lightning.Trainer | None) -> tuple[int, int]:
    """How many processes have bags of their own, and which of them this one is: those that share slides count as one."""
    if trainer is None:
        return 1, 0
    shared = getattr(trainer.strategy, "sequence_parallel_size", 1)
    return max(1, trainer.world_size // shared), trainer.global_rank // shared


class BagDataModule(lightning.LightningDataModule):
    """A table of labels and a folder of feature files as batches for training, validation and test.

    Everything is read and checked when the first thing of it is asked for, `setup` at the latest.

    Args:
        options: What is read, and how.
        cohort: The cohort, if it has been read already.
        inner_folds: Inner folds that each fold may be divided into.
    """

    def __init__(self, options: DataOptions, cohort: Cohort | None = None, *, inner_folds: int = 1) -> None:
        super().__init__()
        self.options = options
        self._given_cohort = cohort
        self.fold = options.fold
        self.inner_fold: int | None = None
        self.inner_folds = inner_folds
        self._inner_splits: dict[int, pd.DataFrame] = {}
        self._logged: set[str] = set()  # of all folds: Lightning calls `setup` again, and most notes are of the cohort

    # What is read once and holds for all folds.

    @cached_property
    def cohort(self) -> Cohort:
        """The slides with features and labels."""
        return self._given_cohort or self.options.read_cohort()

    @property
    def task(self) -> Task:
        """What is to be predicted.

        Raises:
            LongslideError: There are no labels.
        """
        task = self.cohort.labelled_task
        if task.kind != "survival" or self.options.times or self.options.only_part == "test":
            return task
        # Of the training part: test times must not change the model, nor at which times it is tested.
        assert self.cohort.targets is not None
        time, event = self.cohort.targets[self._rows["train"]].astype(np.float64).T
        if not event.any():
            raise LongslideError(f"fold {self.fold} has no event in its training part; see --data.splits")
        return replace(task, times=interval_ends(time[event == 1], task.discrete_time))

    @cached_property
    def _splits_and_notes(self) -> tuple[pd.DataFrame, list[str]]:
        cohort, path = self.cohort, self.options.splits_file
        notes: list[str] = []
        if self.options.only_part is not None:
            return cohort.rows[["slide_id", "patient_id"]].assign(fold_0=self.options.only_part), notes
        if path is not None and path.exists():
            splits, notes = read_splits(path, cohort, self.options.patient_column)
            notes.append(f"splits are those of {path}")
        elif path is None and cohort.given_splits is not None:
            given = cohort.given_splits.drop(columns="patient_id")
            splits = cohort.rows[["slide_id", "patient_id"]].merge(given, on="slide_id", how="left")
            notes.append(f"splits are those of {self.options.table}")
        else:
            splits = make_splits(
                cohort,
                folds=self.options.folds,
                val_share=self.options.val_share,
                test_share=self.options.test_share,
                keep_sites_apart=self.options.keep_sites_apart,
                seed=self.options.seed,
            )
        return check_splits(splits, cohort, keep_sites_apart=self.options.keep_sites_apart), notes

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
        return FeatureCache(self.options.cache_gb, slide_embeddings=self.options.slide_embeddings)

    @cached_property
    def survey(self) -> FeatureSurvey:
        """What the feature files are; the first call reads and checks them all, those of the training part first."""
        rows = self._rows
        unused = np.setdiff1d(np.arange(len(self.cohort.files)), np.concatenate(list(rows.values())))
        return survey_features(
            self.cohort.files,
            self.cache,
            order=np.concatenate([*rows.values(), unused]).tolist(),
            threads=max(2, self.options.workers),
            quiet=not _first_rank(),
        )

    @property
    def feature_dim(self) -> int:
        """Length of a tile embedding; of a slide embedding with `slide_embeddings`."""
        return self.survey.dim

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What made the features, as `Preprocessing.to_dict` says it."""
        return self.survey.preprocessing.to_dict()

    @property
    def max_tiles(self) -> int | None:
        """Tiles of a training bag at most: as asked, else what the task file says."""
        return self.options.max_tiles if self.options.max_tiles is not None else self.cohort.max_tiles

    def cases(self, part: Part) -> dict[str, list[str]]:
        """Of each slide of a part of the fold: `patients`, `slides`, `images` (quickhash) and `features` (digest of the
        embeddings); lists of one length, with an empty text for what is not known."""
        index = self._rows[part]
        rows, moments = self.cohort.rows.iloc[index], [self.survey.moments[row] for row in index]
        return {
            "patients": list(rows["patient_id"]),
            "slides": list(rows["slide_id"]),
            "images": [one.quickhash or "" for one in moments],
            "features": [one.digest for one in moments],
        }

    @cached_property
    def _copies(self) -> list[str]:
        """Slides that are in the cohort twice under one patient.

        Raises:
            LongslideError: One image, or the same features, under two patients, who may be in two parts of a split.
        """
        rows, notes = self.cohort.rows, []
        for what in ("quickhash", "digest"):
            first: dict[str, int] = {}
            for number, moments in enumerate(self.survey.moments):
                key = getattr(moments, what)
                other = first.setdefault(key, number) if key else number
                if other == number:
                    continue
                a, b = rows.iloc[other], rows.iloc[number]
                same = (
                    f"{a['slide_id']} and {b['slide_id']} are the same {'image' if what == 'quickhash' else 'features'}"
                )
                if a["patient_id"] != b["patient_id"] and self.cohort.task is not None:
                    raise LongslideError(
                        f"{self.options.table or self.options.features}: {same} under two patients, {a['patient_id']} and "
                        f"{b['patient_id']}; leave one of them out of the table, or give both the same patient"
                    )
                notes.append(f"{same}: they count twice")
            if notes:  # the same image has the same features, mostly
                break
        return notes

    # What belongs to the fold.

    def with_fold(self, fold: int, inner: int | None = None, options: DataOptions | None = None) -> Self:
        """The same data in another fold; cohort, splits, checks and cache are shared.

        Args:
            fold: The fold.
            inner: The inner fold of it, if it is to be one: no test patient of the fold has a part in that.
            options: Other options of how bags are made of the same files.
        """
        _ = self._splits_and_notes, self.survey
        other = copy.copy(self)
        other.fold, other.inner_fold = fold, inner
        other.options = options or self.options
        other.trainer = None
        for name in ("_rows", "_bags", "training_features"):
            other.__dict__.pop(name, None)
        return other

    def inner_splits(self, fold: int) -> pd.DataFrame:
        """The splits of the inner folds of a fold, for `inner_folds` of them: see `make_inner_splits`."""
        if fold not in self._inner_splits:
            self._inner_splits[fold] = make_inner_splits(
                self.cohort,
                self.splits,
                fold,
                folds=self.inner_folds,
                keep_sites_apart=self.options.keep_sites_apart,
                seed=self.options.seed,
            )
        return self._inner_splits[fold]

    @cached_property
    def _rows(self) -> dict[str, np.ndarray]:
        name = f"fold_{self.fold}"
        if name not in self.splits.columns:
            raise LongslideError(
                f"--data.fold {self.fold}: the splits have {count(self.fold_count, 'fold')}, numbered from 0"
            )
        parts = self.splits[name].to_numpy()
        if self.inner_fold is not None:
            parts = self.inner_splits(self.fold)[f"fold_{self.inner_fold}"].to_numpy()
        return {part: np.flatnonzero(parts == part) for part in PARTS}

    @cached_property
    def _bags(self) -> dict[str, list[Bag]]:
        return {
            part: make_bags(self.cohort, rows, self.survey.tiles, self.options.bags)
            for part, rows in self._rows.items()
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
        """Weights that even out the classes of the training bags, as they are drawn.

        `(C,)` float32 n / (C * n_c) for binary, multiclass and ordinal; `(C,)` negatives / positives of each label for
        multilabel; None for other tasks. Where `balance` draws the classes equally often, nothing is left to even out.
        """
        task = self.task
        match task.kind:
            case "binary" | "multiclass" | "ordinal":
                shares = np.bincount(self.training_targets, self._draws, minlength=len(task.classes))
                return torch.from_numpy((1 / (len(task.classes) * shares)).astype(np.float32))
            case "multilabel":
                targets = self.training_targets
                positives, negatives = self._draws @ (targets == 1), self._draws @ (targets == 0)
                return torch.from_numpy((negatives / positives).astype(np.float32))
            case "regression" | "survival":
                return None
            case _:
                assert_never(task.kind)

    @property
    def _draws(self) -> np.ndarray:
        """`(n,)` share of the draws that each training bag has."""
        strata = self._stratum() if self.options.balance else np.zeros(len(self.bags("train")), np.int64)
        _, number, counts = np.unique(strata, return_inverse=True, return_counts=True)
        return np.asarray(1 / (len(counts) * counts[number]))

    @property
    def training_targets(self) -> np.ndarray:
        """Targets of the training bags, as in `Cohort.targets`."""
        return np.stack([bag.target for bag in self.bags("train") if bag.target is not None])

    @property
    def notes(self) -> list[str]:
        """What the user should know, one line each."""
        notes = [*self.cohort.notes, *self._splits_and_notes[1], *self.survey.notes, *self._copies]
        if self.cohort.task is not None and self.cohort.task.kind == "survival" and not self.options.times:
            times = ", ".join(f"{time:g}" for time in self.task.times)
            notes.append(f"fold {self.fold} reports survival at the times {times} (--data.times for others)")
        if mixed := self.cohort.mixed_patients:
            notes.append(
                f"{count(len(mixed), 'patient has', 'patients have')} slides with different labels ({listed(mixed)}): where "
                "they are tested, metrics are of slides, not of patients"
            )
        if self.truncated["bags"]:
            notes.append(
                f"{count(self.truncated['bags'], 'training bag has', 'training bags have')} more than "
                f"{self.max_tiles} tiles: "
                f"{count(self.truncated['tiles'], 'tile is', 'tiles are')} left out in each epoch (--data.max_tiles)"
            )
        if self.options.only_part is None and self.inner_fold is None:
            notes += self._notes_of_fold()
        if self.options.only_part == "test":
            found = self.counts()[-1]
            absent = [name for name, slides in found.get("classes", {}).items() if not slides]
            lack = f"slide of class {listed(absent)}" if absent else "event" if found.get("events") == 0 else ""
            if lack:
                notes.append(f"{self.options.table} has no {lack}: metrics that need one are not defined")
        return notes

    def _memory(self) -> str:
        """How many of the features are read once, and how many in every epoch."""
        slides, kept, size = len(self.cohort.files), len(self.cache), f"{self.cache.nbytes / 1e9:.2g} GB"
        if kept == slides:
            return f"features of {count(slides, 'slide')}, {size}, are kept in memory"
        return (
            f"features of {kept} of {count(slides, 'slide')}, {size}, are kept in memory; the others are "
            "read anew in every epoch "
            "(--data.cache-gb)"
        )

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
        """Read and check everything, and log what was found."""
        _ = self._bags, self._copies
        if self.options.only_part != "test":
            _ = self.training_features
        if _first_rank():
            if self.options.splits_file is not None and not self.options.splits_file.exists():
                write_splits(
                    self.options.splits_file, self.splits
                )  # only now: splits that are refused would be used again
            for note in (*self.notes, *([] if self.cache.limit == 0 else [self._memory()])):
                if note not in self._logged:
                    logger.info(note)
                    self._logged.add(note)

    def training_batches(self, replicas: int) -> int:
        """Batches per epoch of each of so many processes that have bags of their own."""
        return len(self._training_sampler(self._training_set(), replicas, 0))

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled, augmented batches; resumable."""
        dataset = self._training_set()
        sampler = self._training_sampler(dataset, *replicas(self.trainer))
        return BagLoader(dataset, sampler=sampler, threads=self.options.workers, device=self._device)

    def _training_set(self) -> BagDataset:
        return BagDataset(
            self.bags("train"),
            self.cache,
            augmentation=self.options.augment,
            max_tiles=self.max_tiles,
            feature_std=self.training_features.std,
            seed=self.options.seed,
            part=self._part,
        )

    def _training_sampler(self, dataset: BagDataset, number: int, rank: int) -> TokenBudgetBatchSampler:
        return TokenBudgetBatchSampler(
            dataset.lengths,
            max_tokens=self.options.max_tokens,
            max_bags=-(-self.options.bags_per_step // number),
            shuffle=True,
            stratum=self._stratum() if self.options.balance else None,
            num_replicas=number,
            rank=rank,
            seed=self.options.seed,
        )

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """All validation bags in order, whole."""
        return self._in_order("val")

    def test_dataloader(self) -> DataLoader[Any] | list[Any]:
        """All test bags in order, whole."""
        return self._in_order("test")

    def in_order(self, part: Part, device: torch.device | None = None) -> DataLoader[Any]:
        """The bags of any part in order, whole: for evaluation.

        Args:
            part: The part.
            device: The GPU that the batches are wanted on; None for the host, or for the trainer's.
        """
        dataset = BagDataset(self.bags(part), self.cache, seed=self.options.seed, part=self._part)
        number, rank = replicas(self.trainer)
        sampler = TokenBudgetBatchSampler(
            dataset.lengths, max_tokens=self.options.max_tokens, num_replicas=number, rank=rank
        )
        return BagLoader(dataset, sampler=sampler, threads=self.options.workers, device=device or self._device)

    def _in_order(self, part: Part) -> DataLoader[Any] | list[Any]:
        return self.in_order(part) if self.bags(part) else []

    def _stratum(self) -> np.ndarray:
        """What is balanced: the class; the combination of labels; whether there was an event."""
        task, targets = self.task, self.training_targets
        match task.kind:
            case "binary" | "multiclass" | "ordinal":
                return targets
            case "multilabel":
                return np.asarray(np.unique(np.nan_to_num(targets), axis=0, return_inverse=True)[1]).reshape(-1)
            case "survival":
                return targets[:, 1].astype(np.int64)
            case "regression":
                raise LongslideError("--data.balance needs classes; a regression task has none")
            case _:
                assert_never(task.kind)

    @property
    def _part(self) -> Callable[[int], slice] | None:
        """Which tiles of a slide this process holds, where the trainer's strategy shares slides."""
        return None if self.trainer is None else getattr(self.trainer.strategy, "own_tiles", None)

    @property
    def _device(self) -> torch.device | None:
        """Where the trainer wants batches."""
        return None if self.trainer is None else self.trainer.strategy.root_device
