"""Slides of several files: which they are, and which of them is missing."""

import configparser
from pathlib import Path

from .dicom import series_of

_HAMAMATSU_PARTS = ("imagefile", "mapfile", "optimisationfile")


def missing_part(path: Path) -> str | None:
    """What a slide of several files (MIRAX, Hamamatsu, Olympus) lacks beside its first file; None if nothing is known.

    Args:
        path: The `.mrxs`, `.vms`, `.vmu` or `.vsi` file.

    Returns:
        The file or folder that is not there, in words.
    """
    suffix = path.suffix.lower()
    if suffix == ".mrxs":
        return _missing_of_mirax(path.with_suffix(""))
    if suffix == ".vsi" and not data_folder(path).is_dir():
        return f"the folder {data_folder(path).name}/ with the slide's data"
    if suffix in (".vms", ".vmu"):
        section = _read_ini(path)
        parts = [value for key, value in section.items() if key.startswith(_HAMAMATSU_PARTS)]
        return next((f"the file {name}" for name in parts if name and not (path.parent / name).is_file()), None)
    return None


def data_folder(path: Path) -> Path:
    """The folder beside a `.mrxs` or `.vsi` file that holds its pixels."""
    return path.with_suffix("") if path.suffix.lower() == ".mrxs" else path.parent / f"_{path.stem}_"


def files_of(path: Path) -> list[Path]:
    """The files that a slide consists of, itself the first if it is one; all lie in its folder or below."""
    suffix = path.suffix.lower()
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    if suffix in (".mrxs", ".vsi"):
        return [path, *sorted(file for file in data_folder(path).rglob("*") if file.is_file())]
    if suffix in (".vms", ".vmu"):
        names = [value for key, value in _read_ini(path).items() if key.startswith(_HAMAMATSU_PARTS) and value]
        return [path, *(path.parent / name for name in names)]
    if (series := series_of(path)) is not None:
        return [path, *sorted(file for file in path.parent.iterdir() if file != path and series_of(file) == series)]
    return [path]


def _missing_of_mirax(folder: Path) -> str | None:
    if not folder.is_dir():
        return f"the folder {folder.name}/ with the slide's data"
    index = folder / "Slidedat.ini"
    if not index.is_file():
        return f"the file {folder.name}/{index.name}"
    names = [
        value
        for key, value in _read_ini(index).items()
        if key == "indexfile" or (key.startswith("file_") and key[5:].isdecimal())
    ]
    return next((f"the file {folder.name}/{name}" for name in names if not (folder / name).is_file()), None)


def _read_ini(path: Path) -> dict[str, str]:
    """All entries of an INI file, keys in small letters; none if it is no INI file."""
    parser = configparser.RawConfigParser(strict=False, allow_no_value=True)
    try:
        parser.read_string(path.read_bytes()[: 16 * 2**20].decode("utf-8-sig", "replace"))
    except configparser.Error:
        return {}
    return {key: (value or "").strip() for name in parser.sections() for key, value in parser.items(name)}
