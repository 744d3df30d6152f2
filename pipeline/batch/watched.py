"""Work on files from outside, in a process that may crash or hang in the job's stead."""

import ctypes
import importlib
import logging
import pickle
import queue
import signal
import subprocess
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from types import TracebackType
from typing import Any, Literal, ParamSpec, Self, TypeVar, cast

from ...data.child_process import leave_signals_to_parent, start_child
from ...errors import LongslideError
from ...registry import adopt, registered

P = ParamSpec("P")
T = TypeVar("T")

MEMORY_BYTES = 4 * 2**30
"""Memory that the process may take: more is an error there, not the end of the job."""

logger = logging.getLogger(__name__)


class CrashedError(LongslideError):
    """The process crashed over a call."""


class OverdueError(LongslideError):
    """A call was not done in time."""


class WatchedProcess:
    """Calls functions, one at a time, in a process of its own; one that crashes or hangs there is an error of that call.

    The process is no fork of this one, whose threads and GPU it would break, and does not run the user's script again, as
    those of `multiprocessing` do. What it cannot be sent, such as a network on a GPU or a class of a notebook, a thread of
    this process calls: the time is limited then, but not the memory, and a crash is one of the job.

    Args:
        timeout: Seconds that a call may take.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._stopped = False
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the process; a call that is under way raises."""
        self._stopped = True
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def call(self, what: object, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function there.

        Args:
            what: What it is about, such as the path of a slide, for the messages.
            function: The function.
            *args: Its arguments.
            **kwargs: Its arguments by name.

        Returns:
            What it returns.

        Raises:
            CrashedError: It crashed.
            OverdueError: It was not done in time.
            LongslideError: It needs too much memory.
            Exception: What the function raises.
        """
        with self._lock:
            try:
                request = pickle.dumps((registered(), function, args, kwargs))
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                return self._here(what, error, function, *args, **kwargs)
            answer, value, messages = self._answer(what, request)
        for name, level, message in messages:
            logging.getLogger(name).log(level, "%s", message)
        if answer == "unknown":
            with self._lock:
                return self._here(what, value, function, *args, **kwargs)
        if answer == "no memory":
            raise LongslideError(f"{what}: needs more than {MEMORY_BYTES / 1e9:.1f} GB of memory; convert it")
        if answer == "raised":
            raise value
        return cast(T, value)

    def _here(self, what: object, why: Any, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        logger.debug("called in this process: %s", why)
        ended: queue.SimpleQueue[tuple[Literal[True], T] | tuple[Literal[False], BaseException]] = queue.SimpleQueue()

        def work() -> None:
            try:
                ended.put((True, function(*args, **kwargs)))
            except BaseException as error:
                ended.put((False, error))

        thread = threading.Thread(target=work, name="watched", daemon=True)
        thread.start()
        until = time.monotonic() + self.timeout
        while not self._stopped and time.monotonic() < until:
            try:
                answer = ended.get(timeout=0.2)
            except queue.Empty:
                continue
            if answer[0]:
                return answer[1]
            raise answer[1]
        _give_up(thread)
        raise LongslideError(f"{what}: the job was stopped") if self._stopped else self._overdue(what)

    def _overdue(self, what: object) -> OverdueError:
        return OverdueError(
            f"{what}: not done within {self.timeout:g} s: damaged, or on a slow disk; look at it, or raise --slide-timeout"
        )

    def _answer(self, what: object, request: bytes) -> tuple[str, Any, list[tuple[str, int, str]]]:
        if self._stopped:
            raise LongslideError(f"{what}: the job was stopped")
        if self._process is None or self._process.poll() is not None:
            self._start()
        assert self._pipe is not None
        assert self._process is not None
        if self._stopped:  # while it was being started
            self.stop()
            raise LongslideError(f"{what}: the job was stopped")
        try:
            self._pipe.send_bytes(request)
            if self._pipe.poll(self.timeout):
                return cast(tuple[str, Any, list[tuple[str, int, str]]], pickle.loads(self._pipe.recv_bytes()))
        except (EOFError, OSError):
            status = self._process.wait()
            if self._stopped:
                raise LongslideError(f"{what}: the job was stopped") from None
            name = signal.Signals(-status).name if status < 0 else f"status {status}"
            raise CrashedError(
                f"{what}: the library that reads it crashed ({name}); it is damaged, or needs more than "
                f"{MEMORY_BYTES / 1e9:.1f} GB: copy it again, or convert it"
            ) from None
        self._process.kill()
        self._process.wait()
        raise self._overdue(what)

    def _start(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
        self._pipe, theirs = Pipe()
        self._process = start_child(__name__, theirs.fileno(), pass_fds=[theirs.fileno()])
        theirs.close()


class _GivenUpError(BaseException):
    """Ends a thread for which nobody waits any more."""


def _give_up(thread: threading.Thread) -> None:
    """End a thread at the next Python instruction that it comes to; one that a library holds stays until the job ends."""
    if thread.ident is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(_GivenUpError))


def can_be_sent(thing: object) -> bool:
    """Whether a watched process can be sent something."""
    try:
        pickle.dumps(thing)
    except (pickle.PicklingError, AttributeError, TypeError):
        return False
    return True


class WatchedProcesses:
    """Several watched processes, for calls from several threads; each is started when it is first needed.

    Args:
        timeout: Seconds that a call may take.
        count: How many calls may be under way.
    """

    def __init__(self, timeout: float, count: int) -> None:
        self.timeout = timeout
        self._all = [WatchedProcess(timeout) for _ in range(count)]
        self._free: queue.LifoQueue[WatchedProcess] = queue.LifoQueue()
        for process in reversed(self._all):
            self._free.put(process)

    def __enter__(self) -> Self:
        self._all[0].__enter__()  # it imports what it needs while this process loads its models
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the processes; calls that are under way raise."""
        for process in self._all:
            process.stop()

    def call(self, what: object, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function in one of the processes, as `WatchedProcess.call` does."""
        process = self._free.get()
        try:
            return process.call(what, function, *args, **kwargs)
        finally:
            self._free.put(process)


def serve(descriptor: int) -> None:
    """Answer calls until the other end of the pipe is closed, or the process there is gone."""
    leave_signals_to_parent()
    _limit_memory()
    messages = _Messages()
    package = __name__.partition(".")[0]
    logging.getLogger(package).addHandler(messages)
    logging.getLogger(package).setLevel(logging.INFO)
    for module in (
        "data.slides.openslide",
        "data.slides.image",
        "data.tissue.optical_density",
        "pipeline.embed.layout",
    ):
        importlib.import_module(f"{package}.{module}")  # while the parent loads its models
    pipe = Connection(descriptor)
    while True:
        try:
            request = pipe.recv_bytes()
        except (EOFError, ConnectionError):
            return
        messages.clear()
        reply = pickle.dumps((*_reply(request), messages.all))
        try:
            pipe.send_bytes(reply)
        except ConnectionError:
            return


def _reply(request: bytes) -> tuple[Literal["returned", "raised", "unknown", "no memory"], Any]:
    try:
        plugins, function, args, kwargs = pickle.loads(request)
        adopt(plugins)
    except Exception as error:  # a module or a class that only the parent has
        return "unknown", repr(error)
    try:
        return "returned", function(*args, **kwargs)
    except MemoryError:
        return "no memory", None
    except Exception as error:
        if not isinstance(error, LongslideError):
            error.add_note("".join(traceback.format_exception(error)))
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return "raised", RuntimeError(repr(error))
        return "raised", error


class _Messages(logging.Handler):
    """Keeps what the library logs, for the parent to say."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[tuple[str, int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.all.append((record.name, record.levelno, record.getMessage()))

    def clear(self) -> None:
        self.all = []


def _limit_memory() -> None:
    try:
        import resource

        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        soft = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    except (ImportError, OSError, ValueError):  # not on this system
        pass
