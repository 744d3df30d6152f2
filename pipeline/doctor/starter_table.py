"""A table of slides to start from: to fill in, and to give to `embed` and `fit`."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...data.slides.slide_table import SlideEntry
from ...data.table import csv_of
from ...data.whole_file import write_whole
from ...errors import LongslideError

if TYPE_CHECKING:
    from .slide_check import SlideCheck

COLUMNS = ("slide", "slide_id", "patient_id", "slide_mpp", "tissue_mask", "label", "problem")


def check_starter_table(path: Path) -> None:
    """Refuse a table that is there already: somebody may have filled it in.

    Raises:
        LongslideError: It is there, or is no CSV.
    """
    if path.suffix.lower() != ".csv":
        raise LongslideError(f"--write-table {path}: it is written as CSV; give a name that ends in .csv")
    if path.exists():
        raise LongslideError(f"--write-table {path}: there is such a file already; delete it, or give another name")


def write_starter_table(
    path: Path, entries: Sequence[SlideEntry], checks: "Sequence[SlideCheck]", labels: Mapping[str, Mapping[str, str]]
) -> None:
    """Write one row per slide.

    Args:
        path: Where to. Paths of slides are relative to it where they lie below its folder.
        entries: The slides.
        checks: What was found about each.
        labels: Cells of a table of labels by slide, for the columns of the same name.

    Raises:
        LongslideError: It cannot be written.
    """
    extra = list(dict.fromkeys(name for cells in labels.values() for name in cells if name not in COLUMNS))
    rows: list[dict[str, str]] = []
    for entry, check in zip(entries, checks, strict=True):
        row = {
            "slide": _seen_from(path.absolute().parent, entry.path),
            "slide_id": entry.slide_id,
            "patient_id": entry.patient_id or "",
            "slide_mpp": "" if entry.slide_mpp is None else f"{entry.slide_mpp!r}",
            "tissue_mask": "" if entry.tissue_mask is None else _seen_from(path.absolute().parent, entry.tissue_mask),
            "problem": check.problem,
        }
        rows.append({**row, **{name: cell for name, cell in labels.get(entry.slide_id, {}).items() if cell}})
    write_whole(path, csv_of([*COLUMNS[:-1], *extra, COLUMNS[-1]], rows), "--write-table")


def _seen_from(folder: Path, path: Path) -> str:
    path = path.absolute()
    below = Path(os.path.normpath(path)).is_relative_to(os.path.normpath(folder))
    return os.path.relpath(path, folder) if below else str(path)
