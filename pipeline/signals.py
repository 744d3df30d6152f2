"""Signals that end a command: Ctrl-C, SIGTERM (of a cluster), SIGHUP (a terminal that closed); SIGUSR1 ends it soon."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

GRACE = 60.0
"""Seconds for the slides in hand after SIGUSR1, which clusters send some time before they end a job."""


LINGERING = 30.0
"""Seconds for threads that are left when a command has ended."""


_abandoned: list[threading.Thread] = []


def abandon(threads: Iterable[threading.Thread]) -> None:
    """Let the process end at once where one of these threads is still at work when the command has ended.

    A thread that is inside a library while Python comes to its end aborts the process, or holds a lock for ever.
    """
    _abandoned.extend(threads)


def end_surely(status: int) -> None:
    """See to it that the process ends with this status soon, whatever threads or libraries keep it from ending by itself."""
    if any(thread.is_alive() for thread in _abandoned):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def end() -> None:
        time.sleep(LINGERING)
        left = [one.name for one in threading.enumerate() if not one.daemon and one is not threading.main_thread()]
        os.write(
            2, f"longslide: ended without waiting for {', '.join(left) or 'what a library does at exit'}\n".encode()
        )
        os._exit(status)

    threading.Thread(target=end, name="end-surely", daemon=True).start()


class Stopped(KeyboardInterrupt):
    """A signal has ended the command. Whoever tidies up after Ctrl-C does so after this.

    Args:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Signals:
    """What came while a command ran.

    Attributes:
        last: The last signal that ended it; None if none did.
    """

    last: int | None = None

    @property
    def status(self) -> int:
        """The exit status of a process that the signal has ended: 130, 143, 129."""
        return 128 + (self.last or signal.SIGINT)


@contextmanager
def ending_signals() -> Iterator[Signals]:
    """Raise `Stopped` in the main thread where a signal of `ENDING` comes; one that is ignored, as by nohup, stays so."""
    signals = Signals()

    def stop(number: int, frame: FrameType | None) -> None:
        signals.last = number
        raise Stopped(number)

    def again(dropped: "sys.UnraisableHookArgs") -> None:
        """Python drops what is raised while an object is destroyed, a slide's cache for one: repeat it soon after."""
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            # To the main thread: that ends a wait, too.
            repeat = (threading.main_thread().ident, signals.last or signal.SIGINT)
            threading.Timer(0.05, signal.pthread_kill, repeat).start()
        else:
            sys.__unraisablehook__(dropped)

    in_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in ENDING}
    hook, sys.unraisablehook = sys.unraisablehook, again
    for number, handler in before.items():
        if in_main and handler in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, stop)
    try:
        yield signals
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            if in_main and handler is not None:
                signal.signal(number, handler)


@contextmanager
def ending_soon() -> Iterator[threading.Event]:
    """An event that SIGUSR1 sets: finish what is in hand, and begin nothing.

    After `GRACE` seconds, or at a second SIGUSR1, `Stopped` is raised in the main thread. A signal that is ignored, or that
    others handle, is left alone.
    """
    soon = threading.Event()
    timers: list[threading.Timer] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if soon.is_set():
            raise Stopped(number)
        soon.set()
        timers.append(threading.Timer(GRACE, signal.pthread_kill, (threading.main_thread().ident, number)))
        timers[0].daemon = True
        timers[0].start()

    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGUSR1, stop)
    try:
        yield soon
    finally:
        for timer in timers:
            timer.cancel()
        if ours:
            signal.signal(signal.SIGUSR1, signal.SIG_DFL)
