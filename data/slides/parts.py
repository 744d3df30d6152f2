"""Slides of several files: which of them is missing."""

import configparser
from pathlib import Path


def missing_part(path: Path) -> str | None:
    """What a slide of several files (MIRAX, Hamamatsu VMS and VMU) lacks beside its first file; None if nothing is known.

    Args:
        path: The `.mrxs`, `.vms` or `.vmu` file.

    Returns:
        The file or folder that is not there, in words.
    """
    suffix = path.suffix.lower()
    if suffix == ".mrxs":
        return _missing_of_mirax(path.with_suffix(""))
    if suffix in (".vms", ".vmu"):
        section = _read_ini(path)
        parts = [
            value for key, value in section.items() if key.startswith(("imagefile", "mapfile", "optimisationfile"))
        ]
        return next((f"the file {name}" for name in parts if name and not (path.parent / name).is_file()), None)
    return None


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
