"""What ends a job on several devices."""

import os
import queue
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from longslide.data.slides.slide_table import SlideEntry
from longslide.pipeline.batch.devices import DeviceRun


class Scripted:
    """A worker whose process sends these messages, or fails as these errors do, and is silent then until it is ended."""

    def __init__(self, name: str, *messages: tuple[Any, ...] | Exception) -> None:
        self.name = name
        self.messages: queue.Queue[tuple[Any, ...] | Exception] = queue.Queue()
        for message in messages:
            self.messages.put(message)

    def start(self, request: bytes, wanted: Callable[[float], bool], note: Callable[[str], None]) -> bool:
        return True

    def recv(self) -> tuple[Any, ...]:
        message = self.messages.get(timeout=60)
        if isinstance(message, Exception):
            raise message
        return message

    def send(self, answer: object) -> None:
        self.messages.put(("over",) if answer == "over" else ("next",))  # where there is no slide now it asks again

    def how_it_died(self) -> str:
        return "ended"

    def terminate(self) -> None:
        self.messages.put(EOFError())

    def wait(self) -> None:
        pass


def test_what_goes_wrong_in_answering_a_worker_ends_the_job_with_that_error(tmp_path: Path) -> None:
    entries = [SlideEntry(Path("a.svs"), "a"), SlideEntry(Path("b.svs"), "b")]
    takes_all = Scripted("cpu", ("next",), ("next",))
    broken = Scripted("cuda:1", KeyError("of a message that cannot be read"))
    with pytest.raises(KeyError, match="cannot be read"):
        DeviceRun([broken, takes_all], os.path.join, entries, tmp_path).run()
