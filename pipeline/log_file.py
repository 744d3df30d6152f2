"""`--log-file`: what a command does as JSON lines, one for each slide, epoch and event.

Events are records of the logger `longslide.events`, so that a program may take them with handlers of its own.
"""

import inspect
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from ..errors import LongslideError
from ..version import __version__

TOGETHER = ("fit", "pretrain")
"""Commands whose processes work on one thing together: the first alone writes."""

P = ParamSpec("P")
T = TypeVar("T")

EVENTS = logging.getLogger("longslide.events")
EVENTS.propagate = False  # the command line has words of its own for them
EVENTS.addHandler(logging.NullHandler())
EVENTS.setLevel(logging.INFO)


def event(kind: str, message: str, fields: Mapping[str, Any] | None = None, level: int = logging.INFO) -> None:
    """Log an event.

    Args:
        kind: What kind it is of, for the field `event`.
        message: What happened, in words.
        fields: The same in fields; those that are None are left out.
        level: A level of `logging`.
    """
    EVENTS.log(level, "%s", message, extra={"fields": {"event": kind, **(fields or {})}})


class JsonLines(logging.Formatter):
    """A record as a line of JSON: `time`, `level`, `message`, and the fields of an event."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        content: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        fields: Mapping[str, Any] = getattr(record, "fields", {})
        content |= {name: value for name, value in fields.items() if not _is_missing(value)}
        return json.dumps(content, default=str, ensure_ascii=False)


def _is_missing(value: object) -> bool:
    """Whether there is no value, or one that JSON has no number for."""
    return value is None or (isinstance(value, float) and not math.isfinite(value))


@contextmanager
def log_to(path: str | Path | None, command: str) -> Iterator[None]:
    """Append to a log file: that the command has begun, its events, what the library logs, and how it ended.

    Args:
        path: The file; None writes nothing.
        command: The command.

    Raises:
        LongslideError: The file cannot be written to.
    """
    if path is None:
        yield
        return
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise LongslideError(f"{path}: cannot write it ({error.strerror}); choose another --log-file") from error
    handler.setFormatter(JsonLines())
    library = logging.getLogger("longslide")
    level = library.level
    if not library.isEnabledFor(logging.INFO):
        library.setLevel(logging.INFO)
    for logger in (library, EVENTS):
        logger.addHandler(handler)
    began = time.monotonic()

    def ended(message: str, level: int = logging.INFO, **fields: Any) -> None:
        facts = {"command": command, "seconds": round(time.monotonic() - began, 3)}
        event("end", message, facts | fields, level)

    try:
        event("begin", f"longslide {command} begins", {"command": command, "version": __version__})
        try:
            yield
        except KeyboardInterrupt as stopped:
            ended(f"longslide {command} was stopped", logging.WARNING, signal=str(stopped) or "SIGINT")
            raise
        except BaseException as error:
            ended(str(error) or type(error).__name__, logging.ERROR, error=type(error).__name__)
            raise
        ended(f"longslide {command} has ended")
    finally:
        for logger in (library, EVENTS):
            logger.removeHandler(handler)
        library.setLevel(level)
        handler.close()


def logged(function: Callable[P, T]) -> Callable[P, T]:
    """A command whose option `log_file` names a log file."""
    signature = inspect.signature(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        from .train.settings import first_process

        path = signature.bind(*args, **kwargs).arguments.get("log_file")
        if function.__name__ in TOGETHER and not first_process():
            path = None
        with log_to(path, function.__name__):
            return function(*args, **kwargs)

    return call
