"""The summary of a batch job: one row per slide, written by several processes."""

import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import Self

from ...data.table import csv_of, decimal_point, read_rows
from ...data.whole_file import remove_leftovers, write_whole
from ...errors import LongslideError
from ...plurals import count
from .claims import ClaimedError, lock_folder, waited_claim
from .result import BUSY, SlideResult

SUMMARY = "summary.csv"

SUMMARY_WAIT = 60.0
"""Seconds to wait for a process that writes the summary, which takes a moment."""

WRITING_SHARE = 0.05
"""Share of the time that goes into writing the summary, which is written whole: of a million slides, not after each."""


def make_output_folder(output: Path, option: str = "--output") -> None:
    """Create the output folder and make sure that files can be written there.

    Args:
        output: The folder.
        option: What the user gives it by, for the message.

    Raises:
        LongslideError: The folder cannot be created or written to.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise LongslideError(
            f"{output}: cannot write to the output folder ({error.strerror}); choose another {option}"
        ) from error


class Summary:
    """Writes the results of a job as its slides end, in a thread of its own; used as a context.

    Args:
        output: Folder of the summary.
        name: Its path there.
        note: Is told what cannot be written.
    """

    def __init__(self, output: Path, name: str, note: Callable[[str], None]) -> None:
        self._output = output
        self._name = name
        self._note = note
        self._waiting: list[SlideResult] = []
        self._in_vain = False
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._over = False
        self._thread = threading.Thread(target=self._write, name="summary", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._over = True
            self._changed.notify()
        self._thread.join()

    def add(self, *results: SlideResult) -> None:
        """Slides that have ended."""
        with self._lock:
            self._waiting += results
            self._changed.notify()

    def _write(self) -> None:
        pause = 0.0
        while True:
            with self._lock:
                self._changed.wait_for(lambda: self._over, pause)
                self._changed.wait_for(lambda: self._over or self._waiting)
                new, last = list(self._waiting), self._over
            started = time.monotonic()
            if new and self._recorded(new, last=last):
                with self._lock:
                    del self._waiting[: len(new)]
            pause = 0.0 if self._in_vain else (time.monotonic() - started) / WRITING_SHARE
            if last:
                return

    def _recorded(self, results: list[SlideResult], *, last: bool) -> bool:
        """Write results; whether that went well. Who has waited in vain once does not wait as long each time."""
        try:
            record(self._output, *results, name=self._name, timeout=SUMMARY_WAIT if last or not self._in_vain else 1.0)
        except LongslideError as error:  # the slides' own files are there
            if last or not self._in_vain:
                self._note(str(error))
            if last:
                missing = f"{count(len(results), 'slide is', 'slides are')} missing in {self._output / self._name}"
                self._note(f"{missing}; the same command adds them")
            self._in_vain = True
            return False
        self._in_vain = False
        return True


def record(output: Path, *results: SlideResult, name: str = SUMMARY, timeout: float = SUMMARY_WAIT) -> None:
    """Write the results of slides into the summary, replacing their earlier rows.

    Several processes may do so at once. What another process says of a slide is not replaced by the news that it is
    busy with it, nor the row of the run that embedded a slide by one that found it done.

    Args:
        output: The folder.
        *results: The results.
        name: Path of the summary in the folder.
        timeout: Seconds to wait for another process that writes.

    Raises:
        LongslideError: The summary cannot be written, or another process holds it.
    """
    path = output / name
    try:
        with waited_claim(lock_folder(output) / f".{path.name}.lock", timeout) as held:  # no id has a dot in front
            rows = read_summary(path)
            new = [result for result in results if not _said_better(result, rows)]
            if not new:
                return
            for result in new:
                cells = asdict(result).items()
                rows[result.slide_id] = {name: "" if cell is None else str(cell) for name, cell in cells}
            columns = [field.name for field in fields(SlideResult)]
            if not held.held:
                raise LongslideError(f"{path}: another process took it over while this one was stopped; tried again")
            remove_leftovers(path)
            write_whole(path, csv_of(columns, (rows[slide_id] for slide_id in sorted(rows))))
            _remember(path, _version(path), rows)
    except ClaimedError as error:
        raise LongslideError(
            f"{path}: locked by {error.who}, for more than {timeout:g} s: is it stopped? The job goes on, and tries again"
        ) from error
    except OSError as error:
        raise LongslideError(f"{path}: cannot write it ({error.strerror})") from error


def _said_better(result: SlideResult, rows: dict[str, dict[str, str]]) -> bool:
    """Whether the row that is there says more than this result."""
    before = rows.get(result.slide_id)
    found_done = result.status == "done" and result.seconds is None
    return before is not None and (result.reason.startswith(BUSY) or (found_done and before["status"] == "done"))


def read_summary(path: Path) -> dict[str, dict[str, str]]:
    """The rows of a summary by slide, cells as text; none if it is not there."""
    version = _version(path)
    if version is None:
        return {}
    known = _last.get(path)
    if known is not None and known[0] == version:
        return dict(known[1])
    rows = read_rows(path)
    if rows and not {"slide_id", "status"} <= rows[0].keys():
        raise LongslideError(f"{path}: not the summary of a job: no columns slide_id and status; move it away")
    # A spreadsheet may have written them with commas.
    numbers = ("slide_mpp", "tile_mpp", "tissue_mm2", "left_out_mm2", "blur", "seconds")
    by_slide = {
        row["slide_id"]: {name: decimal_point(cell) if name in numbers else cell for name, cell in row.items()}
        for row in rows
    }
    _remember(path, version, by_slide)
    return dict(by_slide)


_last: dict[Path, tuple[object, dict[str, dict[str, str]]]] = {}
"""The summary that this process has read or written last, with its version: to read a million rows takes a while."""


def _remember(path: Path, version: object, rows: dict[str, dict[str, str]]) -> None:
    _last.clear()
    _last[path] = version, rows


def _version(path: Path) -> object:
    try:
        now = path.stat()
    except FileNotFoundError:
        return None
    return now.st_ino, now.st_mtime_ns, now.st_size
