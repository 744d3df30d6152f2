"""Files that can be opened without waiting for another program."""

import stat
from pathlib import Path

from ..errors import LongslideError


def check_regular(path: Path) -> None:
    """Refuse what is neither a file nor a folder: opening a named pipe waits for a program that writes into it.

    Raises:
        LongslideError: It is a pipe, a socket or a device.
        OSError: It is not there, or no permission.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise LongslideError(f"{path}: not a file but a pipe, a socket or a device")
