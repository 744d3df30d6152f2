"""Which slides a job is about: files, folders and slide tables."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...errors import LongslideError
from .mpp import plausible

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})
"""Plain images: slides only in a folder without others. Beside slides they are thumbnails, masks or parts of a .vms."""

SLIDE_SUFFIXES = IMAGE_SUFFIXES | frozenset(
    {".svs", ".svslide", ".tif", ".tiff", ".ndpi", ".vms", ".vmu", ".scn", ".mrxs", ".bif", ".czi", ".zvi", ".dcm"}
)
"""Files of a folder that are taken for slides; a file named by the user is tried whatever its suffix."""

MPP_COLUMNS = ("slide_mpp", "mpp")
"""Columns of a slide table with the microns per pixel of level 0."""

_TABLE_SUFFIXES = (".csv", ".parquet")


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


def find_slides(inputs: str | Path | Sequence[str | Path], slide_mpp: float | None = None) -> list[SlideEntry]:
    """List the slides of a job.

    Args:
        inputs: Slide files, folders (searched through all their subfolders; a folder of DICOM files is one slide, with
            the folder's name as its id) and tables. A table is CSV or Parquet with a column `slide` (paths relative to
            the table) and optionally `slide_id`, `slide_mpp` (or `mpp`), `patient_id`, `tissue_mask`.
        slide_mpp: Microns per pixel at level 0 for all slides that have none in a table.

    Returns:
        The slides, in the order of the input; those of a folder by path.

    Raises:
        LongslideError: Nothing there, a table that is broken or lacks the column, two slides with one id, or a
            `slide_mpp` that is not plausible.
    """
    if slide_mpp is not None:
        plausible(slide_mpp, f"--slide-mpp {slide_mpp:g}", "it is microns per pixel of level 0")
    entries: list[SlideEntry] = []
    for item in map(Path, [inputs] if isinstance(inputs, str | Path) else inputs):
        if not os.path.exists(item):  # Path.exists raises where a folder above may not be entered
            raise LongslideError(f"{item}: no such file or folder, or no permission to see it")
        if item.is_dir():
            found = list(_slides_in(item))
            if not found:
                raise LongslideError(
                    f"{item}: no slides in this folder (looked for {', '.join(sorted(SLIDE_SUFFIXES))})"
                )
            slides = [entry for entry in found if entry.path.suffix.lower() not in IMAGE_SUFFIXES]
            entries += slides or found
        elif item.suffix.lower() in _TABLE_SUFFIXES:
            entries += _read_table(item)
        else:
            entries.append(SlideEntry(item, item.stem))
    if slide_mpp is not None:
        entries = [entry if entry.slide_mpp is not None else replace(entry, slide_mpp=slide_mpp) for entry in entries]
    _check_ids(entries)
    return entries


def _slides_in(folder: Path) -> Iterator[SlideEntry]:
    dicom_folders: set[Path] = set()
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.suffix.lower() not in SLIDE_SUFFIXES or any(part.startswith(".") for part in inside.parts):
            continue
        # A folder beside a .mrxs file and of its name holds that slide's data.
        if any((folder / f"{parent}.mrxs").is_file() for parent in inside.parents if parent.name):
            continue
        if path.is_dir() or (path.parent.name == "qc" and (path.parent.parent / "summary.csv").is_file()):
            continue  # a folder, or a picture that an earlier job made
        if path.suffix.lower() != ".dcm":
            yield SlideEntry(path, path.stem)
        elif path.parent not in dicom_folders:  # a folder of DICOM files is one slide, and any of its files opens it
            dicom_folders.add(path.parent)
            yield SlideEntry(path, path.parent.resolve().name)


def _read_table(table: Path) -> list[SlideEntry]:
    import pandas as pd

    try:
        if table.suffix.lower() == ".csv":
            # As text: an id may be 007, or NA.
            frame = pd.read_csv(
                table,
                dtype=str,
                keep_default_na=False,
                na_values={name: ["NA", "N/A", "nan", "NaN"] for name in MPP_COLUMNS},
            )
        else:
            frame = pd.read_parquet(table)
    except (OSError, ValueError) as error:  # pandas' and pyarrow's own errors are ValueErrors
        raise LongslideError(f"{table}: cannot be read as a table: {str(error).splitlines()[0]}") from error
    if "slide" not in frame.columns:
        raise LongslideError(
            f"{table}: no column `slide`; it has {', '.join(map(str, frame.columns))}. "
            "Name the column of slide paths `slide`"
        )
    if frame.empty:
        raise LongslideError(f"{table}: the table has no rows")

    entries = []
    for number, row in enumerate(frame.to_dict("records"), start=1):
        cells = {str(key): value for key, value in row.items() if not pd.isna(value) and str(value) != ""}
        if "slide" not in cells:
            raise LongslideError(f"{table}: row {number} has no `slide`")
        path = table.parent / str(cells["slide"])
        mask = cells.get("tissue_mask")
        column = next((name for name in MPP_COLUMNS if name in cells), MPP_COLUMNS[0])
        try:
            slide_mpp = float(cells[column]) if column in cells else None
        except ValueError as error:
            raise LongslideError(f"{table}: row {number} has `{column}` {cells[column]!r}, not a number") from error
        entries.append(
            SlideEntry(
                path=path,
                slide_id=str(cells.get("slide_id", path.stem)),
                slide_mpp=slide_mpp,
                patient_id=str(cells["patient_id"]) if "patient_id" in cells else None,
                tissue_mask=table.parent / str(mask) if mask is not None else None,
            )
        )
    return entries


def _check_ids(entries: list[SlideEntry]) -> None:
    paths: dict[str, Path] = {}
    for entry in entries:
        if not re.fullmatch(r"[^/\\\0]+", entry.slide_id) or entry.slide_id.startswith("."):
            raise LongslideError(f"{entry.path}: the slide_id {entry.slide_id!r} cannot be a file name; give another")
        # Case is ignored: on some file systems a.h5 and A.h5 are one file.
        other = paths.setdefault(entry.slide_id.casefold(), entry.path)
        if other is not entry.path:
            raise LongslideError(
                f"two slides have the id {entry.slide_id!r}: {other} and {entry.path}; "
                "list them in a table with a column `slide_id` that tells them apart"
            )
