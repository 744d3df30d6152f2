"""Tables of a cohort: CSV and Parquet as text, and the split folders of prov-gigapath."""

import difflib
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ...errors import LongslideError
from ..slides.slide_table import SLIDE_SUFFIXES

PATIENT_COLUMNS = ("patient_id", "pat_id", "case_id")
"""Columns that name the patient, in order of trust: ours, prov-gigapath's, CLAM's."""

FOLD_COLUMN = re.compile(r"fold_(\d+)")
"""Columns that hold a split: train, val, test or nothing."""

_SUFFIXES = SLIDE_SUFFIXES | {".h5", ".hdf5", ".pt"}
_MISSING = frozenset({"", "NA", "N/A", "n/a", "#N/A", "NaN", "nan", "null", "NULL", "None", "<NA>", "NaT"})


def read_split_folder(folder: Path) -> pd.DataFrame:
    """Read `train_<k>.csv`, `val_<k>.csv`, `test_<k>.csv` as prov-gigapath writes them.

    Returns:
        All their columns, one row a slide (or patient), and `fold_<k>` with train, val, test or nothing.

    Raises:
        LongslideError: No such files; one cannot be read; a slide in two parts of one fold.
    """
    found = {
        (int(match[2]), match[1]): path
        for path in sorted(folder.glob("*.csv"))
        if (match := re.fullmatch(r"(train|val|test)_(\d+)", path.stem))
    }
    if not found:
        raise LongslideError(f"{folder}: no train_0.csv, val_0.csv, test_0.csv in this folder")
    combined: pd.DataFrame | None = None
    folds: dict[str, dict[str, str]] = {}
    key = "slide_id"
    for (fold, part), path in sorted(found.items()):
        frame = read_text_table(path)
        if combined is None and "slide_id" not in frame.columns:
            key = next((name for name in PATIENT_COLUMNS if name in frame.columns), "slide_id")
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


def read_text_table(path: Path, never_missing: Iterable[str] = ()) -> pd.DataFrame:
    """Read a CSV or Parquet table with every cell as text, as the user spelt it.

    Args:
        path: The table.
        never_missing: Words that are values although they look like "nothing here", such as a class named `None`.

    Raises:
        LongslideError: It is not there, cannot be read, or has no rows.
    """
    if not path.is_file():
        raise LongslideError(f"{path}: no such table")
    try:
        if path.suffix.lower() == ".parquet":
            frame = pd.read_parquet(path)
            frame = frame.apply(lambda column: column.map(as_text, na_action="ignore")).astype(object)
        else:
            missing = sorted(_MISSING - set(never_missing))
            frame = pd.read_csv(path, dtype=str, keep_default_na=False, na_values=missing, encoding="utf-8-sig")
            frame = frame.apply(lambda column: column.str.strip()).replace("", pd.NA)
    except (OSError, ValueError) as error:  # pandas' and pyarrow's own errors are ValueErrors
        raise LongslideError(f"{path}: cannot be read as a table: {str(error).splitlines()[0]}") from error
    frame.columns = frame.columns.map(lambda name: str(name).strip())
    if frame.empty:
        raise LongslideError(f"{path}: the table has no rows")
    unnamed = [name for name in frame.columns if name.startswith("Unnamed: ")]  # the index that pandas writes
    named: pd.DataFrame = frame.drop(columns=unnamed)
    return named


def require_columns(path: Path, frame: pd.DataFrame, names: Iterable[str]) -> None:
    """Refuse a table that lacks a column, naming those that look alike.

    Raises:
        LongslideError: A column is not there.
    """
    for name in names:
        if name in frame.columns:
            continue
        lower = {column.lower(): column for column in frame.columns}
        near = difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(repr(lower[match]) for match in near)}?" if near else ""
        if not near:
            hint = f"it has {listed(list(frame.columns), 12)}"
        raise LongslideError(f"{path}: no column {name!r}; {hint}")


def without_suffix(name: str, known: Collection[str]) -> str:
    """A slide's id from the name of its file: without the suffix, unless the id that is known has it too."""
    stem, dot, suffix = name.rpartition(".")
    return stem if dot and f".{suffix.lower()}" in _SUFFIXES and name not in known else name


def listed(names: Sequence[str], limit: int = 3) -> str:
    """The first names and how many more there are, for messages."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def as_text(value: Any) -> str:
    """A value as a user would spell it: 1.0 is `1`."""
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return str(value).strip()
