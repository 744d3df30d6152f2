"""Processes that come for work, one on each device of this machine or a cluster; those that die are started again."""

import logging
import os
import pickle
import signal
import subprocess
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from typing import Any, Protocol

from ...data.child_process import start_child
from ...data.tiles.readers import usable_cores
from ...errors import LongslideError
from ...registry import adopt, registered
from ..log_file import EVENTS
from ..signals import ending_signals

MOST_RESTARTS = 3
"""A device whose process has died so often without anything done in between is given up."""
PATIENCE = 60.0
"""Seconds that a worker waits for a place that is nowhere when no other is at work."""

Work = Callable[[str, "Connection[Any, Any]"], object]
"""What each process runs, as `work(device, pipe)`. It can be pickled."""


class Worker(Protocol):
    """Where a process works. It may be started again when the process has died.

    Attributes:
        name: For messages.
    """

    name: str

    def start(self, request: bytes, wanted: Callable[[float], bool], note: Callable[[str], None]) -> bool:
        """Start the process with what it is to do.

        Args:
            request: What it is to do.
            wanted: Whether it is still wanted after so many seconds for which there was no place for it.
            note: Is told that it waits for a place.

        Returns:
            Whether it was started.
        """
        ...

    def recv(self) -> tuple[Any, ...]:
        """The next message of the process.

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

    def start(self, request: bytes, wanted: Callable[[float], bool], note: Callable[[str], None]) -> bool:
        """Start the process."""
        self._pipe, theirs = Pipe()
        self._process = start_child(__name__, theirs.fileno(), *self._cores, pass_fds=[theirs.fileno()])
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


class WorkerRun(ABC):
    """Answers workers until all is done, and gives on what one that dies had in hand.

    The class that inherits says what is worked on and what the processes are answered; its methods are called one at a time.

    Args:
        workers: The workers.
        work: What each process runs. It sends `("next",)`, `("ended", ...)`, `("note", text)`, and what else `told` knows;
            what is logged there is logged by this process too.
    """

    GIVEN_ON: str
    """What becomes of what a process that died had in hand, for the message."""

    def __init__(self, workers: Sequence[Worker], work: Work) -> None:
        try:
            self._request = pickle.dumps((registered(), work))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise LongslideError(
                f"what is to be run cannot be sent to other processes ({error}); give encoders, readers, segmenters and "
                "callbacks by name"
            ) from error
        self._workers = workers
        self._lock = threading.RLock()
        self._restarts = dict.fromkeys(range(len(workers)), 0)
        self._serving = 0
        self._refused: str | None = None
        self._noted: set[str] = set()
        self._stopped = False
        self._failed: BaseException | None = None

    @abstractmethod
    def done(self) -> bool:
        """Whether all has ended."""

    @abstractmethod
    def next(self, worker: int) -> object:
        """What a worker that asks for more is answered; `over` for nothing more."""

    @abstractmethod
    def ended(self, worker: int, *result: Any) -> None:
        """A worker says how something ended."""

    @abstractmethod
    def died(self, worker: int, how: str) -> None:
        """A worker's process has died."""

    @abstractmethod
    def note(self, text: str) -> None:
        """Write a line for the user."""

    def told(self, what: str, *details: Any) -> None:
        """A worker says something else."""
        raise ValueError(f"a worker sent {what!r}")

    def serve(self, between: Callable[[], None] = lambda: None) -> None:
        """Answer the workers until all is done, or none is left.

        Args:
            between: Is called again and again meanwhile.

        Raises:
            LongslideError: Wrong usage, as a process found it.
            Exception: What went wrong while a worker was answered, such as a full disk.
        """
        threads = [
            threading.Thread(target=self._serve_or_fail, args=(number,), name=worker.name, daemon=True)
            for number, worker in enumerate(self._workers)
        ]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.2)  # in pieces, between which Ctrl-C is seen
                    between()
        finally:
            self._stop()
        if self._failed is not None:
            raise self._failed
        if self._refused is not None:
            raise LongslideError(self._refused)

    def _serve_or_fail(self, number: int) -> None:
        try:
            self._serve(number)
        except BaseException as error:  # the others would wait for what this worker has for ever
            with self._lock:
                self._failed = self._failed or error

    def _serve(self, number: int) -> None:
        """Start a worker's process, answer it until all is done, and start another when it dies."""
        worker = self._workers[number]
        while not self._over() and self._restarts[number] <= MOST_RESTARTS:
            if not worker.start(self._request, self._wanted, self.note):
                return
            with self._lock:
                self._serving += 1
            how = self._answer(number)
            with self._lock:
                self._serving -= 1
                if how is None:
                    return
                self._restarts[number] += 1
                self.died(number, how)
        if self._restarts[number] > MOST_RESTARTS:
            self.note(f"{worker.name}: given up, its process has died {self._restarts[number]} times")

    def _answer(self, number: int) -> str | None:
        """Answer a worker until it comes to its end; how it died, if it did."""
        worker = self._workers[number]
        while True:
            try:
                what, *details = worker.recv()
                if what == "next":
                    with self._lock:
                        answer = "over" if self._over() else self.next(number)
                    worker.send(answer)
            except (EOFError, OSError):
                if self._stopped:
                    return None
                how = worker.how_it_died()
                self.note(f"{worker.name}: its process has died ({how}); {self.GIVEN_ON}")
                return how
            if what == "over":
                return None
            with self._lock:
                if what == "refused":
                    self._refused = self._refused or details[0]
                    return None
                if what == "ended":
                    self._restarts[number] = 0
                    self.ended(number, *details)
                elif what == "note":
                    if details[0] not in self._noted:
                        self._noted.add(details[0])
                        self.note(details[0])
                elif what == "logged":
                    self._log(*details)
                elif what != "next":
                    self.told(what, *details)

    def _log(self, name: str, level: int, message: str, fields: dict[str, Any] | None) -> None:
        """Log what a process has logged; what the library says, once for all processes."""
        if fields is None:
            if message in self._noted:
                return
            self._noted.add(message)
        logging.getLogger(name).log(level, "%s", message, extra=None if fields is None else {"fields": fields})

    def _over(self) -> bool:
        return self.done() or self._stopped or self._refused is not None or self._failed is not None

    def _wanted(self, waited: float) -> bool:
        """Whether a worker that there is no place for is to wait on: as long as others are at work."""
        with self._lock:
            return not self._over() and (self._serving > 0 or waited < PATIENCE)

    def _stop(self) -> None:
        with self._lock:
            self._stopped = True
        for worker in self._workers:
            worker.terminate()
        for worker in self._workers:
            worker.wait()


def serve(descriptor: int, *cores: int) -> None:
    """Work for a `WorkerRun`, on some of the cores, until it says that all is done."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    for number in (signal.SIGINT, signal.SIGUSR1):  # a terminal or a cluster sends it to all: the job ends this one
        signal.signal(number, signal.SIG_IGN)
    pipe = _SharedPipe(descriptor)
    forward = _Forward(pipe)  # of the library warnings alone: what else it says, the job's own process has said
    for logger in (logging.getLogger(__name__.partition(".")[0]), EVENTS):
        logger.addHandler(forward)
    try:
        with ending_signals():
            device, request = pipe.recv()
            plugins, work = pickle.loads(request)
            adopt(plugins)
            try:
                work(device, pipe)
            except LongslideError as error:
                pipe.send(("refused", str(error)))
                return
        pipe.send(("over",))
    except (KeyboardInterrupt, EOFError, OSError):  # the job is over, or was stopped
        return


class _SharedPipe(Connection):
    """A pipe into which several threads write."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor)
        self._sending = threading.Lock()

    def send(self, obj: Any) -> None:
        """Send a message whole."""
        with self._sending:
            super().send(obj)


class _Forward(logging.Handler):
    """Tells the `WorkerRun` what is logged, for the terminal and the log file that its process has."""

    def __init__(self, pipe: "Connection[Any, Any]") -> None:
        super().__init__()
        self._pipe = pipe

    def emit(self, record: logging.LogRecord) -> None:
        """Send it; what is logged after the job is over is lost."""
        with suppress(OSError):
            self._pipe.send(
                ("logged", record.name, record.levelno, record.getMessage(), getattr(record, "fields", None))
            )
