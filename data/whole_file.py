"""Files that appear under their name only when they are complete and on the disk."""

import errno
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..errors import LongslideError


@contextmanager
def whole_file(path: Path, option: str = "--output") -> Iterator[BinaryIO]:
    """Open a file to write under a temporary name in the same folder; it is flushed to the disk and renamed at the end.

    Args:
        path: Where to; an existing file is replaced, a missing folder made.
        option: What the user gives the folder by, for the message.

    Raises:
        LongslideError: The file cannot be written (full disk, read-only folder). Nothing is left behind then.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
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
    except OSError as error:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
        raise LongslideError(f"{path}: cannot write it ({reason}); make room or choose another {option}") from error


def write_whole(path: Path, content: bytes | memoryview, option: str = "--output") -> None:
    """Write a file that is in memory; see `whole_file`."""
    with whole_file(path, option) as file:
        file.write(content)


def remove_leftovers(path: Path) -> None:
    """Remove what processes that were killed while they wrote this file left; only while no other is writing it.

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
            (folder / name).unlink(missing_ok=True)


_listings: dict[Path, tuple[float, list[str]]] = {}
"""Temporary files by folder, and when that is to be listed again."""
