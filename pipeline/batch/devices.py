"""A batch job in several processes, one on each device of this machine or a cluster; each comes for slides."""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ...data.slides.slide_table import SlideEntry
from ..signals import Stopped, ending_soon
from .dispatch import Dispatch
from .ledger import SUMMARY, Summary
from .progress import JobProgress
from .result import SlideResult
from .shards import Shard, sizes_of
from .workers import Worker, WorkerRun


class Feed:
    """What a device's process gets from the job, and tells it: the slides to work on, in place of a list, and a progress.

    Attributes:
        on_slide: Is called with each slide, in their order.
    """

    def __init__(self, pipe: "Connection[Any, Any]", slides: int) -> None:
        self._pipe = pipe
        self._slides = slides
        self.on_slide: Callable[[SlideEntry], None] = lambda _: None
        self._ends_soon = False
        self._untold, self._told = 0, 0.0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._slides

    def __iter__(self) -> Iterator[SlideEntry | None]:
        """The slides; None where there is none now, but those of another process may come back."""
        while True:
            self._tell("next")
            answer = self._pipe.recv()
            if answer in ("over", "stop"):
                self._ends_soon = answer == "stop"
                return
            if answer is not None:
                self.on_slide(answer)
            yield answer

    def ends_soon(self) -> bool:
        """Whether slides that no model has begun with are to be left."""
        return self._ends_soon

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def note(self, text: str) -> None:
        """Write a line, once for all processes."""
        self._tell("note", text)

    def slide_started(self, slide_id: str, tiles: int) -> None:
        """Nothing: several slides are under way."""

    def tiles_done(self, tiles: int, remark: str = "") -> None:
        """So many more tiles are done; said twice a second."""
        self._untold += tiles
        if time.monotonic() - self._told >= 0.5:
            self._tell("tiles", self._untold, remark)
            self._untold, self._told = 0, time.monotonic()

    def slide_ended(self, result: SlideResult) -> None:
        """A slide has ended."""
        self._tell("ended", result)

    def _tell(self, *message: Any) -> None:
        with self._lock:
            self._pipe.send(message)


class DeviceRun(WorkerRun):
    """Works on slides with several workers, and gives on those of one that dies.

    Args:
        workers: The workers.
        work: Called in each process as `work(device, feed)`; what makes the job and runs it. It can be pickled.
        entries: The slides.
        output: Folder of the summary.
        shard: The shard that these slides are, if they are one.
    """

    GIVEN_ON = "its slides are given to others"

    def __init__(
        self,
        workers: Sequence[Worker],
        work: Callable[[str, Feed], object],
        entries: Sequence[SlideEntry],
        output: Path,
        shard: Shard | None = None,
    ) -> None:
        super().__init__(workers, partial(_work_on_slides, work, len(entries)))
        self._entries = entries
        self._dispatch = Dispatch(entries, sizes_of(entries))
        self._progress = JobProgress(len(entries))
        self._summary = Summary(output, SUMMARY if shard is None else shard.summary, self.note)

    def run(self) -> list[SlideResult]:
        """Work on the slides.

        Returns:
            One result per slide, in the order of the input.

        Raises:
            LongslideError: Wrong usage, as a process found it.
            Exception: What went wrong while a worker was answered, such as a full disk.
            Stopped: SIGUSR1 has ended the job before all slides were done.
        """
        with self._progress, self._summary, ending_soon() as soon:

            def between() -> None:
                if soon.is_set():
                    with self._lock:
                        self._dispatch.stop(soon=True)

            self.serve(between)
            if soon.is_set() and not self.done():
                raise Stopped(signal.SIGUSR1)
            for result in self._dispatch.give_up("no device is left: their processes have died"):
                self._end(result)
        return [self._dispatch.results[entry.slide_id] for entry in self._entries]

    def done(self) -> bool:
        """Whether all slides have ended."""
        return len(self._dispatch.results) == len(self._entries)

    def next(self, worker: int) -> object:
        """The next slide."""
        return self._dispatch.next(worker)

    def ended(self, worker: int, *result: Any) -> None:
        """A slide has ended."""
        if self._dispatch.ended(worker, result[0]):
            self._end(result[0])

    def died(self, worker: int, how: str) -> None:
        """Its slides go to others, or fail."""
        for result in self._dispatch.died(worker):
            self._end(result)

    def told(self, what: str, *details: Any) -> None:
        """Tiles are done."""
        if what == "tiles":
            self._progress.tiles_done(*details)

    def note(self, text: str) -> None:
        """Write a line above the progress."""
        self._progress.note(text)

    def _end(self, result: SlideResult) -> None:
        self._summary.add(result)
        self._progress.slide_ended(result)


def _work_on_slides(
    work: Callable[[str, Feed], object], slides: int, device: str, pipe: "Connection[Any, Any]"
) -> None:
    work(device, Feed(pipe, slides))
