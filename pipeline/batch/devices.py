"""A batch job in several processes, one on each device of this machine or a cluster; each comes for slides."""

import os
import pickle
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from ...data.child_process import end_with, start_child
from ...data.slides.slide_table import SlideEntry
from ...data.tiles.readers import usable_cores
from ...errors import LongslideError
from ...registry import adopt, registered
from ..signals import Stopped, ending_signals, ending_soon
from .dispatch import Dispatch
from .ledger import SUMMARY, Summary
from .progress import JobProgress, Progress
from .result import SlideResult
from .shards import Shard, sizes_of

MOST_RESTARTS = 3
"""A device whose process has died so often without a slide done in between is given up."""
PATIENCE = 60.0
"""Seconds that a worker waits for its place to be free when no other is at work."""


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


class Worker(Protocol):
    """Where a process works on slides. It may be started again when the process has died.

    Attributes:
        name: For messages.
    """

    name: str

    def start(self, request: bytes, wanted: Callable[[float], bool]) -> bool:
        """Start the process with what it is to do; whether that was possible while it was wanted after so many seconds."""
        ...

    def recv(self) -> tuple[Any, ...]:
        """The next message of its `Feed`.

        Raises:
            EOFError, OSError: It has died.
        """
        ...

    def send(self, answer: object) -> None:
        """Answer it.

        Raises:
            OSError: It has died.
        """
        ...

    def how_it_died(self) -> str:
        """In a word or two."""
        ...

    def terminate(self) -> None:
        """End it as SIGTERM does: it gives up its claims."""
        ...

    def wait(self) -> None:
        """Wait until it has ended; it is killed if that takes long."""
        ...


class LocalWorker:
    """A process on a device of this machine.

    Args:
        name: For messages.
        device: The device.
        cores: The cores it works on.
    """

    def __init__(self, name: str, device: str, cores: Sequence[int]) -> None:
        self.name = name
        self._device = device
        self._cores = cores
        self._pipe: Connection[Any, Any] | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, request: bytes, wanted: Callable[[float], bool]) -> bool:
        """Start the process."""
        self._pipe, theirs = Pipe()
        self._process = start_child(__name__, theirs.fileno(), os.getpid(), *self._cores, pass_fds=[theirs.fileno()])
        theirs.close()
        self._pipe.send((self._device, request))
        return True

    def recv(self) -> tuple[Any, ...]:
        """The next message."""
        assert self._pipe is not None
        message: tuple[Any, ...] = self._pipe.recv()
        return message

    def send(self, answer: object) -> None:
        """Answer it."""
        assert self._pipe is not None
        self._pipe.send(answer)

    def how_it_died(self) -> str:
        """The signal or the exit status."""
        assert self._process is not None
        status = self._process.wait()
        return signal.Signals(-status).name if status < 0 else f"status {status}"

    def terminate(self) -> None:
        """Send it SIGTERM."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def wait(self) -> None:
        """Wait ten seconds, then kill it."""
        if self._process is not None:
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def local_workers(devices: Sequence[str]) -> list[Worker]:
    """A worker for each of these devices, with its share of the cores."""
    return [LocalWorker(name, name, cores_of(number, len(devices))) for number, name in enumerate(devices)]


def cores_of(number: int, of: int) -> list[int]:
    """The share that one of several processes has of the cores that this one may use."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(usable_cores()))
    share = max(1, len(cores) // of)
    return cores[number * share : (number + 1) * share] or cores


class DeviceRun:
    """Works on slides with several workers, and gives on those of one that dies.

    Args:
        workers: The workers.
        work: Called in each process as `work(device, feed)`; what makes the job and runs it. It can be pickled.
        entries: The slides.
        output: Folder of the summary.
        shard: The shard that these slides are, if they are one.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        work: Callable[[str, Feed], object],
        entries: Sequence[SlideEntry],
        output: Path,
        shard: Shard | None = None,
    ) -> None:
        try:
            self._request = pickle.dumps((registered(), work, len(entries)))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise LongslideError(
                f"what is to be run cannot be sent to other processes ({error}); give encoders, readers and segmenters "
                "by name"
            ) from error
        self._workers = workers
        self._entries = entries
        self._output = output
        self._summary_name = SUMMARY if shard is None else shard.summary
        self._lock = threading.RLock()
        self._dispatch = Dispatch(entries, sizes_of(entries))
        self._restarts = dict.fromkeys(range(len(workers)), 0)
        self._serving = 0
        self._refused: str | None = None
        self._noted: set[str] = set()
        self._stopped = False
        self._failed: BaseException | None = None

    def run(self) -> list[SlideResult]:
        """Work on the slides.

        Returns:
            One result per slide, in the order of the input.

        Raises:
            LongslideError: Wrong usage, as a process found it.
            Exception: What went wrong while a worker was answered, such as a full disk.
            Stopped: SIGUSR1 has ended the job before all slides were done.
        """
        with (
            JobProgress(len(self._entries)) as progress,
            Summary(self._output, self._summary_name, progress.note) as summary,
            ending_soon() as soon,
        ):
            threads = [
                threading.Thread(
                    target=self._serve_or_fail, args=(number, progress, summary), name=worker.name, daemon=True
                )
                for number, worker in enumerate(self._workers)
            ]
            for thread in threads:
                thread.start()
            try:
                for thread in threads:
                    while thread.is_alive():
                        thread.join(0.2)  # in pieces, between which Ctrl-C is seen
                        if soon.is_set():
                            with self._lock:
                                self._dispatch.stop(soon=True)
            finally:
                self._stop()
            if self._failed is not None:
                raise self._failed
            if self._refused is not None:
                raise LongslideError(self._refused)
            if soon.is_set() and len(self._dispatch.results) < len(self._entries):
                raise Stopped(signal.SIGUSR1)
            for result in self._dispatch.give_up("no device is left: their processes have died"):
                self._end(result, progress, summary)
        return [self._dispatch.results[entry.slide_id] for entry in self._entries]

    def _serve_or_fail(self, number: int, progress: Progress, summary: Summary) -> None:
        try:
            self._serve(number, progress, summary)
        except BaseException as error:  # the others would wait for this worker's slides for ever
            with self._lock:
                self._failed = self._failed or error

    def _serve(self, number: int, progress: Progress, summary: Summary) -> None:
        """Start a worker's process, answer it until all slides are done, and start another when it dies."""
        worker = self._workers[number]
        while not self._over() and self._restarts[number] <= MOST_RESTARTS:
            if not worker.start(self._request, self._wanted):
                return
            with self._lock:
                self._serving += 1
            over = self._answer(number, progress, summary)
            with self._lock:
                self._serving -= 1
                if over:
                    return
                self._restarts[number] += 1
                for result in self._dispatch.died(number):
                    self._end(result, progress, summary)
        if self._restarts[number] > MOST_RESTARTS:
            progress.note(f"{worker.name}: given up, its process has died {self._restarts[number]} times")

    def _answer(self, number: int, progress: Progress, summary: Summary) -> bool:
        """Answer a worker; whether it came to its end."""
        worker = self._workers[number]
        while True:
            try:
                what, *details = worker.recv()
                if what == "next":
                    with self._lock:
                        answer = "over" if self._over() else self._dispatch.next(number)
                    worker.send(answer)
            except (EOFError, OSError):
                if not self._stopped:
                    how = worker.how_it_died()
                    progress.note(f"{worker.name}: its process has died ({how}); its slides are given to others")
                return False
            if what == "ended":
                self._restarts[number] = 0
                with self._lock:
                    if self._dispatch.ended(number, details[0]):
                        self._end(details[0], progress, summary)
            elif what == "tiles":
                progress.tiles_done(*details)
            elif what == "refused":
                with self._lock:
                    self._refused = self._refused or details[0]
                return True
            elif what == "note" and details[0] not in self._noted:
                self._noted.add(details[0])
                progress.note(details[0])
            elif what == "over":
                return True

    def _end(self, result: SlideResult, progress: Progress, summary: Summary) -> None:
        with self._lock:
            summary.add(result)
            progress.slide_ended(result)

    def _over(self) -> bool:
        done = len(self._dispatch.results) == len(self._entries)
        return done or self._stopped or self._refused is not None or self._failed is not None

    def _wanted(self, waited: float) -> bool:
        """Whether a worker that cannot be started is to wait on: as long as others are at work."""
        with self._lock:
            return not self._over() and (self._serving > 0 or waited < PATIENCE)

    def _stop(self) -> None:
        with self._lock:
            self._stopped = True
        for worker in self._workers:
            worker.terminate()
        for worker in self._workers:
            worker.wait()


def serve(descriptor: int, parent: int, *cores: int) -> None:
    """Work for a `DeviceRun`, on some of the cores, until all slides are done."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    end_with(parent)
    for number in (signal.SIGINT, signal.SIGUSR1):  # a terminal or a cluster sends it to all: the job ends this one
        signal.signal(number, signal.SIG_IGN)
    pipe: Connection[Any, Any] = Connection(descriptor)
    try:
        with ending_signals():
            device, request = pipe.recv()
            plugins, work, slides = pickle.loads(request)
            adopt(plugins)
            try:
                work(device, Feed(pipe, slides))
            except LongslideError as error:
                pipe.send(("refused", str(error)))
                return
        pipe.send(("over",))
    except (KeyboardInterrupt, EOFError, OSError):  # the job is over, or was stopped
        return
