"""Splits as they are read, checked and written. A patient is in one part of a fold, whole."""

from pathlib import Path
from typing import Literal, assert_never, get_args

import numpy as np
import pandas as pd

from ...errors import LongslideError
from ...plurals import count
from ...task import Task
from ..slides.slide_table import id_of_name
from ..table import ID_COLUMNS, SLIDE_COLUMNS, csv_of_frame, find_column, listed, read_table
from ..whole_file import write_whole
from .cohort import Cohort
from .split_folder import FOLD_COLUMN, names_in_splits, read_split_folder, split_key

Part = Literal["train", "val", "test"]

PARTS: tuple[Part, ...] = get_args(Part)
"""Parts of a fold."""

_SPELLINGS = {
    "training": "train",
    "valid": "val",
    "validation": "val",
    "tune": "val",
    "tuning": "val",
    "testing": "test",
}


def read_splits(path: Path, cohort: Cohort, patients: str | None = None) -> tuple[pd.DataFrame, list[str]]:
    """Read splits for a cohort.

    Args:
        path: A table with `slide_id` (or `patient_id`) and `fold_0`, `fold_1`, ... of train, val, test or nothing; or the
            folder of `train_0.csv`, `val_0.csv`, `test_0.csv`, ... of prov-gigapath.
        cohort: The cohort.
        patients: The column that names the patient, by the user's word.

    Returns:
        The splits of the cohort's slides, as `make_splits` gives them, and what the user should know.

    Raises:
        LongslideError: It cannot be read or has no folds, or none of the slides is in it.
    """
    table = read_split_folder(path, patients) if path.is_dir() else read_table(path)
    key = split_key(path, table, patients)
    of_slides = find_column(table, (*ID_COLUMNS, *SLIDE_COLUMNS)) is not None
    folds = [name for name in table.columns if FOLD_COLUMN.fullmatch(name)]
    if not folds and "split" in table.columns:
        table, folds = table.rename(columns={"split": "fold_0"}), ["fold_0"]
    if not folds:
        raise LongslideError(f"{path}: no column fold_0, fold_1, ... with train, val and test")
    names = names_in_splits(table, key).astype(str)
    if of_slides:
        known = set(cohort.rows["slide_id"])
        names = names.map(lambda name: id_of_name(name, known))
    parts = table[folds].assign(name=names).drop_duplicates().set_index("name")
    if parts.index.has_duplicates:
        raise LongslideError(
            f"{path}: {parts.index[parts.index.duplicated()][0]} is there with different parts; leave one row"
        )
    rows = cohort.rows[["slide_id", "patient_id"]].reset_index(drop=True)
    own = rows["slide_id" if of_slides else "patient_id"]
    result = pd.concat([rows, parts.reindex(own).reset_index(drop=True)], axis=1)
    missing = list(rows["slide_id"][~own.isin(parts.index)])
    if len(missing) == len(rows):
        raise LongslideError(
            f"{path}: none of the cohort's slides is in it (the first is {missing[0]}); make new splits"
        )
    notes = (
        [f"{count(len(missing), 'slide is', 'slides are')} not in {path} and not used: {listed(missing)}"]
        if missing
        else []
    )
    return result, notes


def write_splits(path: Path, splits: pd.DataFrame) -> None:
    """Write splits as CSV; the file is there whole or not at all.

    Raises:
        LongslideError: It cannot be written.
    """
    write_whole(path, csv_of_frame(splits), "--data.splits")


def check_splits(splits: pd.DataFrame, cohort: Cohort, *, keep_sites_apart: bool = False) -> pd.DataFrame:
    """Check splits before they are used, whoever made them.

    Args:
        splits: One row per slide of the cohort, in its order: `slide_id`, `patient_id`, `fold_0`, ...
        cohort: The cohort.
        keep_sites_apart: Whether a site may be in one part only.

    Returns:
        The splits, with parts spelt train, val, test or empty.

    Raises:
        LongslideError: A word that is no part; a patient or site in two parts of a fold; no training slides, or a class
            without one.
    """
    folds = [name for name in splits.columns if FOLD_COLUMN.fullmatch(name)]
    splits = splits.copy()
    task, targets = cohort.task, cohort.targets
    for fold in folds:
        parts = splits[fold].fillna("").astype(str).str.lower().replace(_SPELLINGS)
        strange = parts[~parts.isin([*PARTS, ""])]
        if len(strange):
            raise LongslideError(f"{fold} has {splits[fold][strange.index[0]]!r}; it must be train, val, test or empty")
        splits[fold] = parts
        used = parts != ""
        _check_apart(fold, "patient", splits["patient_id"][used], parts[used])
        if keep_sites_apart and "site" in cohort.rows.columns:
            _check_apart(fold, "site", cohort.rows["site"][used], parts[used])
        train = (parts == "train").to_numpy()
        if not train.any():
            raise LongslideError(f"{fold} has no slides to train on; mark some of them train in the splits")
        if task is None or targets is None:
            continue
        if lacking := _lacking_in_training(task, targets[train]):
            raise LongslideError(f"{fold}: {lacking}; make new splits")
    return splits


def _lacking_in_training(task: Task, targets: np.ndarray) -> str:
    """Why nothing can be learnt from these targets, `(N, ...)` as in `Cohort.targets`; empty if it can."""
    match task.kind:
        case "binary" | "multiclass" | "ordinal":
            absent = [name for number, name in enumerate(task.classes) if not (targets == number).any()]
            return f"no slide of class {absent[0]!r} is in the training part" if absent else ""
        case "multilabel":
            values = (np.unique(column[~np.isnan(column)]) for column in targets.T)
            single = [name for name, found in zip(task.classes, values, strict=True) if len(found) < 2]
            return f"label {single[0]!r} has one value in the training part" if single else ""
        case "survival":
            return "" if targets[:, 1].any() else "the training part has no event"
        case "regression":  # that the values differ is asked when the loss is standardised
            return ""
        case _:
            assert_never(task.kind)


def check_validation(splits: pd.DataFrame, cohort: Cohort, fold: int | None = None) -> None:
    """Refuse a validation part that leaves the metric which selects a model undefined: AUROC, kappa, R2 or c-index.

    Args:
        splits: As `check_splits` gives them. A fold without a validation part selects by no metric, and passes.
        cohort: The cohort.
        fold: The fold that is trained; None for all of them.

    Raises:
        LongslideError: A validation part of one class, one value (of each label, for several), or no two times to compare.
    """
    task, targets = cohort.task, cohort.targets
    if task is None or targets is None:
        return
    for name in splits.columns:
        if not FOLD_COLUMN.fullmatch(name) or fold not in (None, int(name.removeprefix("fold_"))):
            continue
        part = targets[(splits[name] == "val").to_numpy()]
        if len(part) and (lack := _lack(task, part)):
            raise LongslideError(
                f"{name}: the validation part {lack}, which cannot select a model; move others there in the splits (where "
                "none are given, by a larger --data.val_share), or use --monitor val_loss anyway"
            )


def _lack(task: Task, targets: np.ndarray) -> str:
    """Why a metric is not defined on these targets, `(N, ...)` as in `Cohort.targets`; empty if it is."""
    match task.kind:
        case "binary" | "multiclass" | "ordinal":
            return f"has only slides of class {task.classes[targets[0]]!r}" if len(np.unique(targets)) == 1 else ""
        case "multilabel":
            both = ((targets == 0).any(0) & (targets == 1).any(0)).any()
            return "" if both else "has only slides with, or only slides without, each label"
        case "regression":
            return f"has only slides with {task.label[0]} {targets[0]:g}" if len(np.unique(targets)) == 1 else ""
        case "survival":
            time, event = targets[:, 0], targets[:, 1] > 0
            first = time[event].min(initial=np.inf)  # who is known to be later than it can be compared with it
            comparable = ((time > first) | ((time == first) & ~event)).any()
            return "" if comparable else "has no event with a later time to compare it with"
        case _:
            assert_never(task.kind)


def _check_apart(fold: str, what: str, names: pd.Series, parts: pd.Series) -> None:
    counts = parts.groupby(names.to_numpy()).nunique()
    if (counts > 1).any():
        name = counts.index[counts > 1][0]
        both = " and ".join(sorted(set(parts[(names == name).to_numpy()])))
        raise LongslideError(f"{fold}: {what} {name} is in {both}; move all of its slides to one part")
