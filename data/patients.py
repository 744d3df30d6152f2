"""Which column of a table names the patient: known, asked for, or a question to the user. And patients that may be one."""

import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import LongslideError
from .table import listed, plain_name, require_columns, require_printable

if TYPE_CHECKING:
    import pandas as pd

PATIENT_COLUMNS = ("patient_id", "pat_id", "case_id")
"""Columns that name the patient, in any case: ours, prov-gigapath's, CLAM's."""

NO_COLUMN = "none"
"""The answer that no column names the patient."""

_LIKE_A_PATIENT = re.compile(
    r"(?:patient|pat|case|subject|submitter|donor|participant|person)(?:_?(?:id|no|nr|number|code))?"
)


def patient_column(
    path: Path, frame: "pd.DataFrame", chosen: str | None = None, *, option: str, others: Collection[str] = ()
) -> str | None:
    """The column that names the patient.

    Args:
        path: The table, for messages.
        frame: The table.
        chosen: The user's word: a column, or `none`.
        option: The option of that, for messages.
        others: Columns that are something else, such as labels.

    Returns:
        The column as it is spelt in the table; None if it has none.

    Raises:
        LongslideError: The chosen column is not there; columns look like one, and which it is must be asked; or a patient is
            a text with control characters.
    """
    column = _column(path, frame, chosen, option, others)
    if column is not None:
        require_printable(path, column, frame[column])
    return column


def _column(path: Path, frame: "pd.DataFrame", chosen: str | None, option: str, others: Collection[str]) -> str | None:
    if chosen is not None and chosen.lower() == NO_COLUMN and chosen not in frame.columns:
        return None
    if chosen is not None:
        require_columns(path, frame, [chosen])
        return chosen
    alike = [name for name in map(str, frame) if name not in others and _LIKE_A_PATIENT.fullmatch(plain_name(name))]
    named = [name for name in alike if plain_name(name) == PATIENT_COLUMNS[0]]
    if not named and len(alike) == 1 and plain_name(alike[0]) in PATIENT_COLUMNS:
        named = alike
    if len(named) == 1:
        return named[0]
    if alike:
        which = f"the column {alike[0]}" if len(alike) == 1 else f"one of the columns {listed(alike)}"
        raise LongslideError(
            f"{path}: is {which} the patient? Give {option} {alike[0]}, or {option} {NO_COLUMN} if each slide is a patient "
            "of its own"
        )
    return None


def probable_twins(patients: Iterable[str]) -> list[tuple[str, ...]]:
    """Patients whose ids differ in case, leading zeros, a `.0` or the sign between parts alone: `P1`, `p01` and `P-1`."""
    groups: dict[str, dict[str, None]] = {}
    for patient in patients:
        key = re.sub(r"(?<=\d)\.0+$", "", patient.casefold())
        key = re.sub(r"[\s_-]+", "-", key)
        key = re.sub(r"(?<=[^\W\d])-(?=\d)", "", key)
        key = re.sub(r"(?<!\d)0+(?=\d)", "", key)
        groups.setdefault(key, {})[patient] = None
    return [tuple(group) for group in groups.values() if len(group) > 1]
