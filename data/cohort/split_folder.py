"""The split folders of prov-gigapath, and the columns of splits."""

import re
from pathlib import Path

import pandas as pd

from ...errors import LongslideError
from ..patients import patient_column
from ..slides.slide_table import slide_ids
from ..table import ID_COLUMNS, SLIDE_COLUMNS, find_column, is_table, read_table, require_columns

FOLD_COLUMN = re.compile(r"fold_(\d+)")
"""Columns that hold a split: train, val, test or nothing."""


def read_split_folder(folder: Path, patients: str | None = None) -> pd.DataFrame:
    """Read `train_<k>.csv`, `val_<k>.csv`, `test_<k>.csv` as prov-gigapath writes them; any kind of table will do.

    Args:
        folder: The folder.
        patients: The column that names the patient, by the user's word.

    Returns:
        All their columns, one row per slide (or patient), and `fold_<k>` with train, val, test or nothing.

    Raises:
        LongslideError: No such files; one cannot be read; a slide in two parts of one fold.
    """
    found = {
        (int(match[2]), match[1]): path
        for path in sorted(folder.iterdir())
        if is_table(path) and (match := re.fullmatch(r"(train|val|test)_(\d+)", path.stem))
    }
    if not found:
        raise LongslideError(f"{folder}: no train_0.csv, val_0.csv, test_0.csv in this folder")
    combined: pd.DataFrame | None = None
    folds: dict[str, dict[str, str]] = {}
    key = ""
    for (fold, part), path in sorted(found.items()):
        frame = read_table(path)
        if combined is None:
            key = split_key(path, frame, patients)
        require_columns(path, frame, [key])
        parts = folds.setdefault(f"fold_{fold}", {})
        for name in frame[key].dropna().unique():
            if parts.setdefault(name, part) != part:
                raise LongslideError(f"{path}: {name} is also in {parts[name]}_{fold}.csv; leave it in one of the two")
        frame = frame.drop_duplicates(key)
        combined = frame if combined is None else pd.concat([combined, frame[~frame[key].isin(combined[key])]])
    assert combined is not None
    combined = combined.reset_index(drop=True)
    marked: pd.DataFrame = combined.assign(**{fold: combined[key].map(parts) for fold, parts in folds.items()})
    return marked


def split_key(path: Path, frame: pd.DataFrame, patients: str | None = None) -> str:
    """The column whose slides, or else patients, a table of splits is about.

    Raises:
        LongslideError: There is none, or which column names the patient must be asked.
    """
    slide = find_column(frame, (*ID_COLUMNS, *SLIDE_COLUMNS))
    if slide is not None:
        return slide
    chosen = patients if patients in frame.columns else None
    patient = patient_column(path, frame, chosen, option="--data.patient-column")
    if patient is None:
        require_columns(path, frame, ID_COLUMNS)
    assert patient is not None
    return patient


def names_in_splits(frame: pd.DataFrame, key: str) -> pd.Series:
    """The slide ids, or the patients, of a table of splits."""
    names = frame[key] if find_column(frame, (*ID_COLUMNS, *SLIDE_COLUMNS)) is None else slide_ids(frame)
    assert names is not None
    return names
