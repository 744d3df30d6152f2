"""The slides of a folder, and what in it was not looked at."""

import os
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..table import listed
from .base import IMAGE_SUFFIXES, READERS, SlideReader, without_suffix
from .dicom import series_of
from .parts import data_folder


@dataclass(frozen=True)
class FolderContent:
    """What a folder of slides holds.

    Attributes:
        slides: The slide files by path, and the name of each within the folder, without its suffix.
        passed_over: How many files of each suffix (in small letters, with its dot; empty for none) are no slides, or not
            of a format that is read.
    """

    slides: tuple[tuple[Path, Path], ...]
    passed_over: Counter[str]

    @property
    def remark(self) -> str:
        """What was not looked at, most first; empty if nothing."""
        if not self.passed_over:
            return ""
        counts = sorted(self.passed_over.items(), key=lambda item: (-item[1], item[0]))
        kinds = [f"{count} {suffix or 'without suffix'}" for suffix, count in counts]
        return f"not looked at: {listed(kinds, 20)}"


def looked_at(reader: str | type[SlideReader] | None = None) -> frozenset[str]:
    """Suffixes of the files of a folder that are taken for slides: those of all readers, or of the one that is named."""
    if reader is not None and ((cls := READERS.get(reader)).SUFFIXES or cls.FOLDER_SUFFIXES):
        return cls.SUFFIXES
    return frozenset[str]().union(*(READERS.get(name).SUFFIXES for name in READERS.names()))


def folders_looked_at(reader: str | type[SlideReader] | None = None) -> frozenset[str]:
    """Suffixes of the folders that are taken for slides: those of all readers, or of the one that is named."""
    if reader is not None and ((cls := READERS.get(reader)).SUFFIXES or cls.FOLDER_SUFFIXES):
        return cls.FOLDER_SUFFIXES
    return frozenset[str]().union(*(READERS.get(name).FOLDER_SUFFIXES for name in READERS.names()))


def read_folder(folder: Path, suffixes: Collection[str], folders: Collection[str] = ()) -> FolderContent:
    """Search a folder through all its subfolders.

    The DICOM files of one series are one slide, with the folder's name, or its first file's where a folder holds several
    series. Plain images are slides only where there are no others. Neither slides nor passed over are hidden files, the data
    of a .mrxs or .vsi file, and the pictures of an earlier job.

    Args:
        folder: The folder.
        suffixes: Suffixes of slides, as `looked_at` gives them.
        folders: Suffixes of folders that are slides, as `folders_looked_at` gives them. Others that end in `.zarr` are
            passed over as one.
    """
    slides: dict[Path, Path] = {}
    passed_over: Counter[str] = Counter()
    dicom: dict[Path, dict[str | None, Path]] = {}
    for path in sorted(_files(folder, {*folders, ".zarr"})):
        inside = path.relative_to(folder)
        if path.parent.name == "qc" and any((path.parent.parent / made).exists() for made in ("summary.csv", "shards")):
            continue
        suffix = path.suffix.lower()
        if suffix not in (folders if path.is_dir() else suffixes):
            passed_over[suffix] += 1
        elif suffix == ".dcm":  # a series is one slide, and any of its files opens it
            dicom.setdefault(path.parent, {}).setdefault(series_of(path), path)
        else:
            slides[path] = without_suffix(inside)
    for parent, series in dicom.items():
        for path in series.values():
            inside = path.relative_to(folder)
            slides[path] = inside.parent if len(series) == 1 else without_suffix(inside)
            if not slides[path].name:
                slides[path] = Path(parent.resolve().name)
    images = [path for path in slides if path.suffix.lower() in IMAGE_SUFFIXES]
    if len(images) < len(slides):
        for path in images:
            del slides[path]
            passed_over[path.suffix.lower()] += 1
    return FolderContent(tuple(sorted(slides.items())), passed_over)


def _files(folder: Path, whole: Collection[str]) -> Iterator[Path]:
    """The files below a folder that are not hidden, and the folders of these suffixes, which are not entered."""
    for above, folders, files in os.walk(folder):
        here = Path(above)
        names = {name for name in folders if not name.startswith(".")}
        yield from (here / name for name in names if Path(name).suffix.lower() in whole)
        names -= {data_folder(here / name).name for name in files if name.lower().endswith((".mrxs", ".vsi"))}
        folders[:] = [name for name in names if Path(name).suffix.lower() not in whole]
        yield from (here / name for name in files if not name.startswith("."))
