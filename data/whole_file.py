"""Files that appear under their name only when they are complete and on the disk; and folders, when they are complete."""

import errno
import io
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..errors import LongslideError

if TYPE_CHECKING:
    from PIL import Image


def temporary_name(path: Path) -> Path:
    """Where this process writes what will be `path`: in the same folder; see `remove_leftovers`."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextmanager
def whole_file(path: Path, option: str = "--output") -> Iterator[BinaryIO]:
    """Open a file to write under a temporary name in the same folder; it is flushed to the disk and renamed at the end.

    Args:
        path: Where to; an existing file is replaced, a missing folder made.
        option: What the user gives the folder by, for the message.

    Raises:
        LongslideError: The file cannot be written (full disk, read-only folder). Nothing is left behind then.
    """
    temporary = temporary_name(path)
    with _writing(path, option):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def whole_path(path: Path, option: str = "--output") -> Iterator[Path]:
    """A path of the same name at which a library writes a file or a folder; it takes the place of `path` at the end.

    A folder that is there is moved aside first, and removed last: a process that is killed meanwhile leaves the old one, the
    new one or none, never a part of either.

    Args:
        path: Where to; a missing folder is made.
        option: What the user gives the folder by, for the message.

    Raises:
        LongslideError: It cannot be written. Nothing is left behind then.
    """
    temporary = temporary_name(path)
    with _writing(path, option):
        try:
            # What a killed process of this number left: in a container each has the same.
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary / path.name
            if path.is_dir():
                path.rename(temporary / f"earlier {path.name}")
            (temporary / path.name).replace(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _writing(path: Path, option: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or error
        raise LongslideError(f"{path}: cannot write it ({reason}); make room or choose another {option}") from error


def write_whole(path: Path, content: bytes | memoryview, option: str = "--output") -> None:
    """Write a file that is in memory; see `whole_file`."""
    with whole_file(path, option) as file:
        file.write(content)


def write_picture(path: Path, picture: "Image.Image", *, quality: int = 88, **how: Any) -> None:
    """Write a picture in the format of its suffix, `.jpg` or `.png`; see `whole_file`.

    Args:
        path: Where to.
        picture: The picture.
        quality: Quality of a JPEG.
        **how: Other options of Pillow.
    """
    content = io.BytesIO()  # Pillow does not notice a file that it wrote only half, on a full disk
    picture.save(content, format={".jpg": "JPEG", ".png": "PNG"}[path.suffix], quality=quality, **how)
    write_whole(path, content.getbuffer())


def remove_leftovers(path: Path) -> None:
    """Remove what processes that were killed while they wrote this file or folder left; only while no other is writing it.

    The folder is listed again no more often than takes a twentieth of the time: there may be a million files in it.
    """
    folder, now = path.parent, time.monotonic()
    due, temporary = _listings.get(folder, (0.0, []))
    if now >= due:
        try:
            temporary = [name for name in os.listdir(folder) if name.startswith(".") and name.endswith(".tmp")]
        except FileNotFoundError:
            return
        listed = time.monotonic()
        _listings[folder] = listed + 20 * (listed - now), temporary
    for name in temporary:
        if re.fullmatch(rf"\.{re.escape(path.name)}\.\d+\.tmp", name):
            leftover = folder / name
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


_listings: dict[Path, tuple[float, list[str]]] = {}
"""Temporary files by folder, and when that is to be listed again."""
