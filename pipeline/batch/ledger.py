"""The summary of a batch job: one row per slide, written by several processes."""

import csv
import io
import tempfile
from dataclasses import asdict, fields
from functools import lru_cache
from pathlib import Path

from filelock import FileLock

from ...data.table import decimal_point, read_rows
from ...data.whole_file import remove_leftovers, write_whole
from ...errors import LongslideError
from .claims import lock_folder
from .result import BUSY, SlideResult

SUMMARY = "summary.csv"


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


def record(output: Path, result: SlideResult) -> None:
    """Write a slide's result into `<output>/summary.csv`, replacing its earlier row.

    Several processes may do so at once. What another process says of a slide is not replaced by the news that it is
    busy with it, nor the row of the run that embedded a slide by one that found it done.

    Raises:
        LongslideError: The summary cannot be written.
    """
    path = output / SUMMARY
    found_done = result.status == "done" and result.seconds is None
    try:
        with FileLock(lock_folder(output) / f".{SUMMARY}.lock"):  # no slide's own lock: an id has no dot in front
            rows = _rows(path)
            before = rows.get(result.slide_id)
            if before and (result.reason == BUSY or (found_done and before["status"] == "done")):
                return
            rows[result.slide_id] = asdict(result)
            table = io.StringIO(newline="")
            writer = csv.DictWriter(table, [field.name for field in fields(SlideResult)], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows[slide_id] for slide_id in sorted(rows))
            remove_leftovers(path)
            write_whole(path, table.getvalue().encode())
    except OSError as error:
        raise LongslideError(f"{path}: cannot write it ({error.strerror})") from error


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
    numbers = ("slide_mpp", "tile_mpp", "tissue_mm2", "seconds")  # a spreadsheet may have written them with commas
    return {
        row["slide_id"]: {name: decimal_point(cell) if name in numbers else cell for name, cell in row.items()}
        for row in rows
    }
