"""What every batch job over slides shares: one result a slide, the summary table, and claims between processes."""

import csv
import os
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from ..errors import LongslideError

SUMMARY = "summary.csv"


@dataclass(frozen=True)
class SlideResult:
    """How one slide of a job ended; the columns of `summary.csv`.

    Attributes:
        slide_id: The slide's id, the stem of its output files.
        slide: Path of the slide file.
        status: `done` (the output is complete), `failed`, or `skipped` (nothing to do here: no tissue, or another
            process is at work on it).
        reason: Why it failed or was skipped, or a remark on a slide that is done.
        tiles: Tiles embedded.
        bad_tiles: Tiles that could not be read and were left out.
        mpp: Microns per pixel at level 0.
        mpp_source: Where the mpp came from.
        tissue_mm2: Area of the tissue in square millimetres.
        seconds: Time spent on the slide in this run.
        features: Path of the feature file.
    """

    slide_id: str
    slide: str
    status: Literal["done", "failed", "skipped"]
    reason: str = ""
    tiles: int | None = None
    bad_tiles: int | None = None
    mpp: float | None = None
    mpp_source: str | None = None
    tissue_mm2: float | None = None
    seconds: float | None = None
    features: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the slide does not count against the exit status."""
        return self.status != "failed"


def make_output_folder(output: Path) -> None:
    """Create the output folder and make sure that files can be written there.

    Raises:
        LongslideError: The folder cannot be created or written to.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise LongslideError(
            f"{output}: cannot write to the output folder ({error.strerror}); choose another --output"
        ) from error


def claim(output: Path, slide_id: str) -> FileLock | None:
    """Claim a slide for this process.

    The claim is an operating-system lock: it ends with the process, however that dies.

    Returns:
        The lock to release when the slide is finished, or None when another process holds it.
    """
    folder = output / ".locks"
    folder.mkdir(exist_ok=True)
    lock = FileLock(folder / f"{slide_id}.lock", thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    return lock


def record(output: Path, result: SlideResult) -> None:
    """Write a slide's result into `<output>/summary.csv`, replacing its earlier row.

    Several processes may do so at once. A slide that one process finished stays `done` when another one reports that it
    skipped it.
    """
    path = output / SUMMARY
    (output / ".locks").mkdir(exist_ok=True)
    with FileLock(output / ".locks" / "summary.lock"):
        rows: dict[str, dict[str, object]] = {}
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                rows = {row["slide_id"]: dict(row) for row in csv.DictReader(file)}
        if result.status == "skipped" and rows.get(result.slide_id, {}).get("status") == "done":
            return
        rows[result.slide_id] = asdict(result)
        temporary = path.with_name(f".{SUMMARY}.{os.getpid()}.tmp")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(SlideResult)], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows[slide_id] for slide_id in sorted(rows))
        temporary.replace(path)
