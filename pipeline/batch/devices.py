"""A batch job on several devices of this machine: a process for each, which is given slides as it gets through them."""

import os
import pickle
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from ...data.child_process import end_with, start_child
from ...data.slides.slide_table import SlideEntry
from ...data.tiles.readers import usable_cores
from ...errors import LongslideError
from ...registry import adopt, registered
from ..signals import ending_signals
from .ledger import record
from .progress import JobProgress, Progress
from .result import SlideResult

MOST_DEATHS = 2
"""A slide that is in the hands of so many processes that die fails."""
MOST_RESTARTS = 3
"""A device whose process has died so often without a slide done in between is given up."""


class Feed:
    """What a device's process gets from the job, and tells it: the slides to work on, in place of a list, and a progress."""

    def __init__(self, pipe: "Connection[Any, Any]", slides: int) -> None:
        self._pipe = pipe
        self._slides = slides
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._slides

    def __iter__(self) -> Iterator[SlideEntry | None]:
        """The slides; None where there is none now, but those of another process may come back."""
        while True:
            self._tell("next")
            answer = self._pipe.recv()
            if answer == "over":
                return
            yield answer

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
        """So many more tiles are done."""
        self._tell("tiles", tiles, remark)

    def slide_ended(self, result: SlideResult) -> None:
        """A slide has ended."""
        self._tell("ended", result)

    def _tell(self, *message: Any) -> None:
        with self._lock:
            self._pipe.send(message)


class _Device:
    def __init__(self, name: str, cores: Sequence[int]) -> None:
        self.name = name
        self.cores = cores
        self.pipe: Connection[Any, Any] | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.in_hand: dict[str, SlideEntry] = {}
        self.restarts = 0


class DeviceRun:
    """Works on slides with a process on each device, and gives on those of a process that dies.

    Args:
        devices: Their names, such as `cuda:0`.
        work: Called in each process as `work(device, feed)`; what makes the job and runs it. It can be pickled.
        entries: The slides.
        output: Folder of the summary.
    """

    def __init__(
        self,
        devices: Sequence[str],
        work: Callable[[str, Feed], object],
        entries: Sequence[SlideEntry],
        output: Path,
    ) -> None:
        try:
            self._request = pickle.dumps((registered(), work, len(entries)))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise LongslideError(
                f"--devices: what is to be run cannot be sent to other processes ({error}); give encoders, readers and "
                "segmenters by name"
            ) from error
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(usable_cores()))
        share = max(1, len(cores) // len(devices))
        self._devices = [_Device(name, cores[i * share : (i + 1) * share] or cores) for i, name in enumerate(devices)]
        self._entries = entries
        self._output = output
        self._lock = threading.RLock()
        # The largest first: a large one that is begun last would keep one device at work alone.
        self._left = deque(sorted(entries, key=_size, reverse=True))
        self._results: dict[str, SlideResult] = {}
        self._deaths: dict[str, int] = {}
        self._refused: str | None = None
        self._noted: set[str] = set()
        self._stopped = False

    def run(self) -> list[SlideResult]:
        """Work on the slides.

        Returns:
            One result per slide, in the order of the input.

        Raises:
            LongslideError: Wrong usage, as a process found it; or all processes died.
        """
        with JobProgress(len(self._entries)) as progress:
            threads = [
                threading.Thread(target=self._serve, args=(device, progress), name=device.name, daemon=True)
                for device in self._devices
            ]
            for thread in threads:
                thread.start()
            try:
                for thread in threads:
                    while thread.is_alive():
                        thread.join(0.2)  # in pieces, between which Ctrl-C is seen
            finally:
                self._stop()
            if self._refused is not None:
                raise LongslideError(self._refused)
            for entry in self._left:
                self._end(
                    SlideResult.failed(entry, LongslideError("no device is left: their processes have died")), progress
                )
        return [self._results[entry.slide_id] for entry in self._entries]

    def _serve(self, device: _Device, progress: Progress) -> None:
        """Start the process of a device, answer it until all slides are done, and start another when it dies."""
        while not self._stopped and self._refused is None and device.restarts <= MOST_RESTARTS:
            self._start(device)
            if self._answer(device, progress):
                return
            device.restarts += 1
            self._take_back(device, progress)
        if device.restarts > MOST_RESTARTS:
            progress.note(f"{device.name}: given up, its process has died {device.restarts} times")

    def _start(self, device: _Device) -> None:
        device.pipe, theirs = Pipe()
        device.process = start_child(__name__, theirs.fileno(), os.getpid(), *device.cores, pass_fds=[theirs.fileno()])
        theirs.close()
        device.pipe.send((device.name, self._request))

    def _answer(self, device: _Device, progress: Progress) -> bool:
        """Answer a process; whether it came to its end."""
        assert device.pipe is not None
        assert device.process is not None
        try:
            while True:
                what, *details = device.pipe.recv()
                if what == "next":
                    device.pipe.send(self._next(device))
                elif what == "ended":
                    device.restarts = 0
                    self._end(details[0], progress, device)
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
        except (EOFError, OSError):
            if not self._stopped:
                status = device.process.wait()
                how = signal.Signals(-status).name if status < 0 else f"status {status}"
                progress.note(f"{device.name}: its process has died ({how}); its slides are given to others")
            return False

    def _next(self, device: _Device) -> SlideEntry | Literal["over"] | None:
        """The next slide for a process; None where there is none now, but may be later.

        One that was in the hands of a process that died is worked on alone, so that it takes no other with it.
        """
        with self._lock:
            if self._stopped or self._refused is not None:
                return "over"
            if not self._left:
                others = any(other.in_hand for other in self._devices if other is not device)
                return None if others else "over"
            suspect = self._left[0].slide_id in self._deaths
            if device.in_hand and (suspect or any(slide_id in self._deaths for slide_id in device.in_hand)):
                return None
            entry = self._left.popleft()
            device.in_hand[entry.slide_id] = entry
            return entry

    def _end(self, result: SlideResult, progress: Progress, device: _Device | None = None) -> None:
        with self._lock:
            self._results[result.slide_id] = result
            if device is not None:
                device.in_hand.pop(result.slide_id, None)
            else:
                record(self._output, result)
            progress.slide_ended(result)

    def _take_back(self, device: _Device, progress: Progress) -> None:
        """Give the slides of a process that died to others; one that was in several such processes fails."""
        with self._lock:
            back = list(device.in_hand.values())
            device.in_hand.clear()
            for entry in back:
                self._deaths[entry.slide_id] = self._deaths.get(entry.slide_id, 0) + 1
                if self._deaths[entry.slide_id] < MOST_DEATHS:
                    self._left.append(entry)  # after all others
                else:
                    why = LongslideError(
                        f"{entry.path}: {MOST_DEATHS} processes died while they had this slide; it is damaged, or the "
                        "machine lacks memory: embed it alone to see"
                    )
                    self._end(SlideResult.failed(entry, why), progress)

    def _stop(self) -> None:
        with self._lock:
            self._stopped = True
        for device in self._devices:
            if device.process is not None and device.process.poll() is None:
                device.process.terminate()  # as by SIGTERM: it gives up its claims
        for device in self._devices:
            if device.process is not None:
                try:
                    device.process.wait(10)
                except subprocess.TimeoutExpired:
                    device.process.kill()
                    device.process.wait()


def serve(descriptor: int, parent: int, *cores: int) -> None:
    """Work for a `DeviceRun`, on some of the cores, until all slides are done."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all processes: the job ends this one
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


def _size(entry: SlideEntry) -> int:
    try:
        return entry.path.stat().st_size
    except OSError:
        return 0
