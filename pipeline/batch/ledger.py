"""The summary of a batch job: one row per slide, written by several processes."""

import tempfile
from dataclasses import asdict, fields
from functools import lru_cache
from pathlib import Path

from ...data.table import csv_of, decimal_point, read_rows
from ...data.whole_file import remove_leftovers, write_whole
from ...errors import LongslideError
from .claims import ClaimedError, lock_folder, waited_claim
from .result import BUSY, SlideResult

SUMMARY = "summary.csv"

SUMMARY_WAIT = 60.0
"""Seconds to wait for a process that writes the summary, which takes a moment."""


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


def record(output: Path, *results: SlideResult, timeout: float = SUMMARY_WAIT) -> None:
    """Write the results of slides into `<output>/summary.csv`, replacing their earlier rows.

    Several processes may do so at once. What another process says of a slide is not replaced by the news that it is
    busy with it, nor the row of the run that embedded a slide by one that found it done.

    Args:
        output: The folder.
        *results: The results.
        timeout: Seconds to wait for another process that writes.

    Raises:
        LongslideError: The summary cannot be written, or another process holds it.
    """
    path = output / SUMMARY
    try:
        with waited_claim(lock_folder(output) / f".{SUMMARY}.lock", timeout) as held:  # no id has a dot in front
            rows = _rows(path)
            new = {result.slide_id: asdict(result) for result in results if not _said_better(result, rows)}
            if not new:
                return
            rows |= new
            columns = [field.name for field in fields(SlideResult)]
            if not held.held:
                raise LongslideError(f"{path}: another process took it over while this one was stopped; tried again")
            remove_leftovers(path)
            write_whole(path, csv_of(columns, (rows[slide_id] for slide_id in sorted(rows))))
    except ClaimedError as error:
        holder = str(error).removeprefix(BUSY).strip(" ()")
        raise LongslideError(
            f"{path}: locked by {holder}, for more than {timeout:g} s: is it stopped? The job goes on, and tries again"
        ) from error
    except OSError as error:
        raise LongslideError(f"{path}: cannot write it ({error.strerror})") from error


def _said_better(result: SlideResult, rows: dict[str, dict[str, object]]) -> bool:
    """Whether the row that is there says more than this result."""
    before = rows.get(result.slide_id)
    found_done = result.status == "done" and result.seconds is None
    return before is not None and (result.reason.startswith(BUSY) or (found_done and before["status"] == "done"))


def _rows(path: Path) -> dict[str, dict[str, object]]:
    try:
        now = path.stat()
    except FileNotFoundError:
        return {}
    return dict(_read_rows(path, now.st_ino, now.st_mtime_ns, now.st_size))


@lru_cache(maxsize=1)  # a run that finds ten thousand slides done would read ten thousand rows for each
def _read_rows(path: Path, *version: int) -> dict[str, dict[str, object]]:
    rows = read_rows(path)
    if rows and not {"slide_id", "status"} <= rows[0].keys():
        raise LongslideError(f"{path}: not the summary of a job: no columns slide_id and status; move it away")
    # A spreadsheet may have written them with commas.
    numbers = ("slide_mpp", "tile_mpp", "tissue_mm2", "left_out_mm2", "blur", "seconds")
    return {
        row["slide_id"]: {name: decimal_point(cell) if name in numbers else cell for name, cell in row.items()}
        for row in rows
    }
