"""Claims of slides, and of the summary, between processes that share an output folder; on one machine or on many.

A claim is a file with an operating-system lock, which ends with its process, however that dies. File systems of clusters may
have no locks (Lustre, NFS without lockd), or keep those of a machine that died: so the file also says who holds it, and is
touched as long as that one lives. Of a holder that has been silent for `SILENT` seconds the claim is taken over; should it
wake, both make the same whole files.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from ...errors import LongslideError
from .result import BUSY

HEARTBEAT = 30.0
"""Seconds after which a holder touches its claims again."""

SILENT = 300.0
"""Seconds without a touch after which a holder is taken for dead."""

_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}  # of a file system without flock

logger = logging.getLogger(__name__)


class ClaimedError(LongslideError):
    """Another process holds the claim; the message says who.

    Args:
        record: What the claim says.

    Attributes:
        record: As given.
        who: The holder, in words.
    """

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record = record
        since = record.get("since")
        age = f", for {max(0.0, time.time() - since) / 60:.0f} min" if isinstance(since, float) else ""
        self.who = f"process {record.get('process', '?')} on {record.get('host', '?')}{age}"
        super().__init__(f"{BUSY} ({self.who})")

    def __reduce__(self) -> tuple[type["ClaimedError"], tuple[Mapping[str, Any]]]:
        return type(self), (self.record,)


class Claim:
    """A claim that this process holds.

    Args:
        path: Its file.
        descriptor: The file, open, with the lock where there are locks.
        about: What else it says.

    Attributes:
        path: As given.
        since: When it was taken, in seconds since 1970 by the clock of the file system: those of machines differ.
    """

    def __init__(self, path: Path, descriptor: int, about: Mapping[str, Any]) -> None:
        self.path = path
        self._descriptor = descriptor
        self.touch()
        self.since = os.fstat(descriptor).st_mtime
        record = {"host": socket.gethostname(), "process": os.getpid(), "since": self.since, **about}
        with contextlib.suppress(OSError):  # a full disk: the lock is what counts
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(record).encode(), 0)
        _Heart.beat_for(self)

    @property
    def held(self) -> bool:
        """Whether it is still this one's: another process may have taken over from one that was stopped for long."""
        return _same_file(self._descriptor, self.path)

    def touch(self) -> None:
        """Say that this process lives."""
        with contextlib.suppress(OSError):
            os.utime(self._descriptor)

    def release(self) -> None:
        """End the claim."""
        _Heart.stop_for(self)
        with contextlib.suppress(OSError):
            if self.held:
                self.path.unlink()
            os.close(self._descriptor)


def claim(output: Path, slide_id: str) -> Claim:
    """Claim a slide for this process.

    Returns:
        The claim, to release when the slide is finished.

    Raises:
        ClaimedError: Another process holds it.
    """
    return take(lock_folder(output) / f"{slide_id}.lock")


@contextlib.contextmanager
def waited_claim(path: Path, timeout: float) -> Iterator[Claim]:
    """Hold a claim for a moment, after waiting for those before.

    Raises:
        ClaimedError: It was not free within `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            held = take(path)
            break
        except ClaimedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
    try:
        yield held
    finally:
        held.release()


def take(path: Path, about: Mapping[str, Any] = MappingProxyType({})) -> Claim:
    """Take a claim by its file.

    Args:
        path: The file.
        about: What it says beside who holds it, in plain types.

    Raises:
        ClaimedError: Another process holds it.
    """
    while True:
        try:
            descriptor, new = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), True
        except FileExistsError:
            try:
                descriptor, new = os.open(path, os.O_RDWR | os.O_CLOEXEC), False
            except FileNotFoundError:  # released in between
                continue
        try:
            if _locked(descriptor, new):
                if _same_file(descriptor, path):  # else released, or taken over, in between
                    taken, descriptor = Claim(path, descriptor, about), -1
                    return taken
            else:
                silence = _now(path.parent) - os.fstat(descriptor).st_mtime
                busy = ClaimedError(_record(descriptor))
                if silence <= SILENT:
                    raise busy
                logger.warning("%s: taken over from %s, silent for %.0f min", path, busy.who, silence / 60)
                if _same_file(descriptor, path):
                    path.unlink(missing_ok=True)
        finally:
            if descriptor >= 0:
                os.close(descriptor)


def lock_folder(output: Path) -> Path:
    """Where the claims of an output folder are; made if need be."""
    folder = output / ".locks"
    folder.mkdir(exist_ok=True)
    return folder


def _locked(descriptor: int, new: bool) -> bool:
    """Whether the claim is this one's: by the lock, or without locks by having made the file or its maker's death."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:  # EAGAIN, EWOULDBLOCK, EACCES: held
            return False
        return new or _died_here(descriptor)
    return True


def _died_here(descriptor: int) -> bool:
    """Whether the holder was a process of this machine, and is no more."""
    record = _record(descriptor)
    process = record.get("process")
    if record.get("host") != socket.gethostname() or not isinstance(process, int):
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _record(descriptor: int) -> dict[str, Any]:
    try:
        content = json.loads(os.pread(descriptor, 2**20, 0))
    except ValueError:  # not written yet
        return {}
    return content if isinstance(content, dict) else {}


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def _now(folder: Path) -> float:
    """The time by the clock of the file system, which touches claims too."""
    with tempfile.TemporaryFile(dir=folder) as probe:
        return os.fstat(probe.fileno()).st_mtime


class _Heart:
    """Touches all claims of this process."""

    _claims: ClassVar[set[Claim]] = set()
    _lock = threading.Lock()
    _thread: threading.Thread | None = None

    @classmethod
    def beat_for(cls, held: Claim) -> None:
        with cls._lock:
            cls._claims.add(held)
            if cls._thread is None or not cls._thread.is_alive():
                cls._thread = threading.Thread(target=cls._beat, name="claims", daemon=True)
                cls._thread.start()

    @classmethod
    def stop_for(cls, held: Claim) -> None:
        with cls._lock:
            cls._claims.discard(held)

    @classmethod
    def _beat(cls) -> None:
        while True:
            time.sleep(HEARTBEAT)
            with cls._lock:
                for held in cls._claims:
                    held.touch()
