"""Progress of a job over slides: slides, tiles, tiles per second, time left."""

import logging
import time
from dataclasses import asdict
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.text import Text

from ...plurals import count
from ..log_file import event
from .result import SlideResult

MINUTE = 60.0
"""Seconds between the lines that say how far a job is where no bar can be drawn."""

STYLES = {"done": "green", "failed": "bold red", "skipped": "yellow"}
LEVELS = {"done": logging.INFO, "failed": logging.ERROR, "skipped": logging.WARNING}


class _TilesPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        if not task.fields.get("tiles"):
            return Text("")
        return Text((f"{task.speed:,.0f} tiles/s " if task.speed else "- tiles/s ") + task.fields["remark"])


class Progress(Protocol):
    """What a job tells of how far it is."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def note(self, text: str) -> None:
        """Write a line."""
        ...

    def slide_started(self, slide_id: str, tiles: int) -> None:
        """The present slide and how many tiles it has."""
        ...

    def tiles_done(self, tiles: int, remark: str = "") -> None:
        """So many more tiles are embedded; with a remark on the speed."""
        ...

    def slide_ended(self, result: SlideResult) -> None:
        """A slide has ended."""
        ...


class JobProgress:
    """Two bars on standard error, all slides and the present one, and a line for each slide that ended.

    Where standard error is not a terminal (a cluster's log), only the lines are written, and every minute one more. What
    the lines say is in the log file too.
    """

    def __init__(self, slides: int) -> None:
        self._console = Console(stderr=True, soft_wrap=True, highlight=False)
        self._progress = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _TilesPerSecond(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._slides = self._progress.add_task("slides", total=slides)
        self._tiles = self._progress.add_task("tiles", total=None, tiles=True, remark="", visible=False)
        self._total = slides
        self._ended = 0
        self._done = self._done_before = 0
        self._began = self._said = time.monotonic()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def note(self, text: str) -> None:
        """Write a line."""
        self._console.print(escape(text))
        event("note", text)

    def slide_started(self, slide_id: str, tiles: int) -> None:
        """The present slide and how many tiles it has."""
        self._progress.reset(self._tiles, total=tiles, description=escape(slide_id), visible=True)

    def tiles_done(self, tiles: int, remark: str = "") -> None:
        """So many more tiles are embedded, of the present slide if it was said which; with a remark on the speed."""
        self._progress.update(self._tiles, advance=tiles, remark=remark, visible=True)
        self._done += tiles
        now = time.monotonic()
        if now - self._said < MINUTE:
            return
        rate = (self._done - self._done_before) / (now - self._said)
        line = f"[{self._ended}/{self._total}] {count(self._done, 'tile')}, {rate:,.0f} tiles/s {remark}".rstrip()
        left = (now - self._began) * (self._total - self._ended) / self._ended if self._ended else None
        if left is not None:
            line += f", about {duration(left)} left"
        if not self._console.is_terminal:
            self._console.print(escape(line))
        counts = {"slides": self._total, "ended": self._ended, "tiles": self._done, "tiles_per_second": round(rate, 1)}
        event("progress", line, counts | {"seconds_left": None if left is None else round(left)})
        self._said, self._done_before = now, self._done

    def slide_ended(self, result: SlideResult) -> None:
        """Write the slide's line and advance the bar of all slides."""
        self._ended += 1
        self._progress.advance(self._slides)
        style = STYLES[result.status]
        line = f"[{style}]{result.status:7}[/] {escape(result.slide_id)}"
        if result.tiles is not None:
            line += f"  {count(result.tiles, 'tile')}"
            if result.seconds:
                line += f" in {result.seconds:.1f} s ({result.tiles / result.seconds:,.0f}/s)"
        if result.took and result.seconds:
            line += f", {escape(result.took)}"
        if result.reason:
            line += f"  {escape(result.reason)}"
        self._console.print(f"{escape(f'[{self._ended}/{self._total}]')} {line}")
        message = f"{result.slide_id}: {result.status}" + (f", {result.reason}" if result.reason else "")
        event("slide", message, asdict(result), LEVELS[result.status])


def duration(seconds: float) -> str:
    """A time to be read, in hours, minutes or seconds."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"
