"""Which slides a job is about: files, folders and slide tables."""

import logging
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any, Literal

from ...errors import LongslideError, is_printable, printable
from ..patients import patient_column
from ..table import ID_COLUMNS, SLIDE_COLUMNS, decimal_points, find_column, is_table, listed, read_table
from .base import SlideReader, without_suffix
from .folder import folders_looked_at, looked_at, read_folder
from .mpp import plausible

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

IdFrom = Literal["name", "path"]
"""What the id of a slide that has none in a table is made of: the name of its file, or its path."""

MPP_COLUMNS = ("slide_mpp", "mpp")
"""Columns of a slide table with the microns per pixel of level 0, the first that says something."""


@dataclass(frozen=True)
class SlideEntry:
    """One slide of a job.

    Attributes:
        path: The slide file.
        slide_id: Its id, unique within the job and usable as a file name.
        slide_mpp: Microns per pixel at level 0 by the user's word.
        patient_id: The patient.
        tissue_mask: The user's own tissue mask, PNG or GeoJSON.
    """

    path: Path
    slide_id: str
    slide_mpp: float | None = None
    patient_id: str | None = None
    tissue_mask: Path | None = None

    @property
    def shown(self) -> str:
        """The path as text that can be written anywhere."""
        return printable(str(self.path)).replace("\n", "\\n")


def find_slides(
    inputs: str | Path | Sequence[str | Path],
    slide_mpp: float | None = None,
    patients: str | None = None,
    ask: bool = True,
    reader: str | type[SlideReader] | None = None,
    id_from: IdFrom = "name",
) -> list[SlideEntry]:
    """List the slides of a job.

    Args:
        inputs: Slide files, folders (see `read_folder`; what in them was not looked at is logged) and tables (see
            `read_table`). A table has a column `slide` or `slide_path` (paths relative to the table) and
            optionally `slide_id`, `slide_mpp` (or `mpp`), `patient_id`, `tissue_mask`.
        slide_mpp: Microns per pixel at level 0 for all slides that have none in a table.
        patients: The column of tables that names the patient, or `none`. Default: `patient_id`, `pat_id` or `case_id`.
        ask: Whether a column that only looks like the patient is an error; else it is logged.
        reader: The slide reader, if one is named: folders are searched for its suffixes.
        id_from: `path` makes ids of the paths of slides, with `__` between folders, so that equal names in different folders
            go together: relative to the folder that is given (with its name, if it is one of several inputs), or as they
            are given.

    Returns:
        The slides, in the order of the input; those of a folder by path.

    Raises:
        LongslideError: Nothing there, a table that is broken or lacks the column, two slides with one id, a `slide_mpp` that
            is not plausible, or a table whose column of patients must be asked for.
    """
    if slide_mpp is not None:
        plausible(slide_mpp, f"--slide-mpp {slide_mpp:g}", "it is microns per pixel of level 0")
    entries: list[SlideEntry] = []
    items = [Path(item) for item in ([inputs] if isinstance(inputs, str | Path) else inputs)]
    for item in items:
        if not os.path.exists(item):  # Path.exists raises where a folder above may not be entered
            raise LongslideError(f"{item}: no such file or folder, or no permission to see it")
        folders = folders_looked_at(reader)
        if item.is_dir() and item.suffix.lower() not in folders:
            suffixes = looked_at(reader)
            content = read_folder(item, suffixes, folders)
            if not content.slides:
                there = f"; {content.remark}" if content.remark else ""
                raise LongslideError(
                    f"{item}: no slides in this folder (looked for {', '.join(sorted(suffixes | folders))}{there})"
                )
            if content.remark:
                logger.warning("%s: %s", item, content.remark)
            above = item.resolve().name if len(items) > 1 else ""
            entries += [SlideEntry(path, _id_of(above / name, id_from)) for path, name in content.slides]
        elif is_table(item):
            entries += _read_slide_table(item, patients, ask, id_from)
        else:
            entries.append(SlideEntry(item, _id_of(without_suffix(item), id_from)))
    if slide_mpp is not None:
        entries = [entry if entry.slide_mpp is not None else replace(entry, slide_mpp=slide_mpp) for entry in entries]
    return _distinct(entries)


def _id_of(name: Path, id_from: IdFrom) -> str:
    """The id of a slide from its path without suffix; what of it cannot be printed, or be in any file name, is spelt as in a
    URL: `%0A`, `%E9`, `%5C`.
    """
    parts = [name.name] if id_from == "name" else [part for part in name.parts if part not in (name.anchor, "..")]
    return "".join(
        letter if is_printable(letter) and letter != "\\" else "".join(f"%{byte:02X}" for byte in os.fsencode(letter))
        for letter in "__".join(parts)
    )


def slide_ids(frame: "pd.DataFrame", id_from: IdFrom = "name") -> "pd.Series[Any] | None":
    """The id of each slide of a table: as it says, else of the slide's file.

    NA where a row has neither; None if the table has no such columns.
    """
    given, slide = find_column(frame, ID_COLUMNS), find_column(frame, SLIDE_COLUMNS)
    if slide is None:
        return None if given is None else frame[given]
    stems = frame[slide].map(lambda path: _id_of(without_suffix(_path(path)), id_from), na_action="ignore")
    return stems if given is None else frame[given].where(frame[given].notna(), stems)


def _path(cell: str) -> Path:
    r"""A path as it is written here; one that was written on Windows, `C:\data\a.svs`, has its parts here too."""
    return Path(cell if "/" in cell else PureWindowsPath(cell).as_posix())


def id_of_name(name: str, known: Collection[str]) -> str:
    """A slide's id from the name of its file: without the suffix, unless the id that is known has it too."""
    suffix = Path(name).suffix.lower()
    of_a_file = suffix in looked_at() | folders_looked_at() | {".h5", ".hdf5", ".pt"}
    return without_suffix(Path(name)).name if of_a_file and name not in known else name


def _read_slide_table(table: Path, patients: str | None, ask: bool, id_from: IdFrom) -> list[SlideEntry]:
    frame = read_table(table)
    slide = find_column(frame, SLIDE_COLUMNS)
    if slide is None:
        raise LongslideError(
            f"{table}: no column `slide`; it has {listed(list(frame.columns), 12)}. Name the column of slide paths `slide`"
        )
    ids = slide_ids(frame, id_from)
    assert ids is not None
    try:
        patient = patient_column(table, frame, patients, option="--patient-column")
    except LongslideError as question:
        if ask:
            raise
        logger.warning("%s", str(question).replace("Give --patient", "Give `predict` --patient"))
        patient = None
    columns = {"slide": slide, "patient": patient} | {
        name: find_column(frame, (name,)) for name in (*MPP_COLUMNS, "tissue_mask")
    }
    for mpp in (columns[name] for name in MPP_COLUMNS):
        if mpp is not None:
            frame[mpp] = decimal_points(frame[mpp])
    entries = []
    for number, row in enumerate(frame.to_dict("records")):
        cells = {name: row[column] for name, column in columns.items() if column and isinstance(row[column], str)}
        if "slide" not in cells:
            raise LongslideError(f"{table}: row {number + 1} has no `{slide}`")
        mpp = next((name for name in MPP_COLUMNS if name in cells), None)
        try:
            slide_mpp = None if mpp is None else float(cells[mpp])
        except ValueError as error:
            raise LongslideError(f"{table}: row {number + 1} has `{mpp}` {cells[str(mpp)]!r}, not a number") from error
        entries.append(
            SlideEntry(
                path=table.parent / cells["slide"],
                slide_id=str(ids.iloc[number]),
                slide_mpp=slide_mpp,
                patient_id=cells.get("patient"),
                tissue_mask=table.parent / cells["tissue_mask"] if "tissue_mask" in cells else None,
            )
        )
    return entries


def _distinct(entries: list[SlideEntry]) -> list[SlideEntry]:
    """Each slide once: a file that was given twice, such as by itself and with its folder, is one slide.

    Raises:
        LongslideError: An id that cannot be the name of a file, or one of two slides.
    """
    first: dict[str, SlideEntry] = {}
    for entry in entries:
        if not re.fullmatch(r"[^/\\\0]+", entry.slide_id) or entry.slide_id.startswith("."):
            raise LongslideError(f"{entry.path}: the slide_id {entry.slide_id!r} cannot be a file name; give another")
        # Case is ignored: on some file systems a.h5 and A.h5 are one file.
        other = first.setdefault(entry.slide_id.casefold(), entry)
        if other is entry:
            continue
        if other.path.resolve() != entry.path.resolve():
            raise LongslideError(
                f"two slides have the id {entry.slide_id!r}: {other.path} and {entry.path}; "
                "list them in a table with a column `slide_id` that distinguishes them, or give --id-from path"
            )
        first[entry.slide_id.casefold()] = _of_both(other, entry)
    if len(first) < len(entries):
        twice = len(entries) - len(first)
        logger.warning(
            "%s; each counts once", "one slide is given twice" if twice == 1 else f"{twice} slides are given twice"
        )
    return list(first.values())


def _of_both(one: SlideEntry, other: SlideEntry) -> SlideEntry:
    """What two entries say of one slide.

    Raises:
        LongslideError: They contradict each other.
    """
    for name in ("slide_mpp", "patient_id", "tissue_mask"):
        said = [getattr(entry, name) for entry in (one, other) if getattr(entry, name) is not None]
        if len(said) == 2 and said[0] != said[1]:
            raise LongslideError(f"{one.path}: given twice, with {name} {said[0]} and {said[1]}; give it once")
    return replace(
        one,
        slide_mpp=other.slide_mpp if one.slide_mpp is None else one.slide_mpp,
        patient_id=one.patient_id or other.patient_id,
        tissue_mask=one.tissue_mask or other.tissue_mask,
    )
