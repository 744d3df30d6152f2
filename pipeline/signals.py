"""Signals that end a command: Ctrl-C, SIGTERM (a cluster's, a container's) and SIGHUP (a terminal that closed)."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


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
