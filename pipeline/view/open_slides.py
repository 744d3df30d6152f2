"""The slides of a viewer: read by processes of their own, so that one that crashes or hangs takes nothing else along."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from ...data.slides.base import recorded_reader
from ...errors import LongslideError
from ..batch.watched import CrashedError, OverdueError, WatchedProcess
from . import pictures
from .pictures import SlideFacts, SlideFile

T = TypeVar("T")

PROCESSES = 4
"""Processes that read slides, each started when it is first needed: two for a slide that is looked at, as many for one that
hangs meanwhile."""

OF_ONE_SLIDE = 2
"""Processes that read one slide at the same time; one where the slide takes much memory."""

LARGE_BYTES = 2**28

PICTURE_BYTES = 256 * 2**20
"""JPEG that are kept."""

MOST_CRASHES = 3
"""Crashes after which nothing of a slide is read any more until its page is opened again."""


@dataclass
class _State:
    """What is known of a slide's file as it is now."""

    facts: SlideFacts | None = None
    reading: int = 0
    home: "_Process | None" = None
    crashes: int = 0
    refused: str = ""
    failed: dict[tuple[object, ...], str] = field(default_factory=dict)

    @property
    def most_reading(self) -> int:
        """Until one process has opened it, no other tries."""
        return 1 if self.facts is None or self.facts.memory_bytes > LARGE_BYTES else OF_ONE_SLIDE


@dataclass(eq=False)
class _Process:
    watched: WatchedProcess
    files: list[SlideFile] = field(default_factory=list)
    reading: SlideFile | None = None


class OpenSlides:
    """Reads slides in watched processes; used by several threads at once.

    What a process crashed over is not read again; a slide that hangs, or over which several crashed, is not read at all,
    until it is written anew or `try_again` is called.

    Args:
        timeout: Seconds that opening a slide or drawing a picture may take.
    """

    def __init__(self, timeout: float) -> None:
        self._free = [_Process(WatchedProcess(timeout)) for _ in range(PROCESSES)]
        self._all = tuple(self._free)
        self._states: dict[SlideFile, _State] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._pictures: OrderedDict[tuple[object, ...], bytes] = OrderedDict()
        self._picture_bytes = 0

    def close(self) -> None:
        """End the processes; what is under way raises."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for process in self._all:
            process.watched.stop()

    def facts(self, file: SlideFile) -> SlideFacts:
        """What the slide is.

        Raises:
            LongslideError: It cannot be opened, or is not there any more.
        """
        file = _as_it_is(file)
        known = self._state(file).facts
        return self._facts(file) if known is None else known

    def version(self, file: SlideFile) -> int:
        """Changes when the file is written anew.

        Raises:
            LongslideError: It is not there.
        """
        return _as_it_is(file).version

    def tile(self, file: SlideFile, level: int, column: int, row: int) -> bytes | None:
        """A tile of the deep zoom as JPEG, as `pictures.tile` draws it; None if there is no such tile.

        Raises:
            LongslideError: The slide cannot be opened, or its reader crashes or hangs.
        """
        return self._picture(
            file, pictures.tile, level, column, row, at_home=pictures.is_of_overview(self.facts(file), level)
        )

    def region(self, file: SlideFile, x: int, y: int, size: int, px: int) -> bytes:
        """A square of a slide as JPEG, as `pictures.region` draws it.

        Raises:
            LongslideError: As of `tile`.
        """
        return self._picture(file, pictures.region, x, y, size, px)

    def thumbnail(self, file: SlideFile, px: int) -> bytes:
        """A slide's thumbnail as JPEG, with no edge longer than `px`.

        Raises:
            LongslideError: As of `tile`; or nothing of the slide can be read.
        """
        return self._picture(file, pictures.thumbnail, px)

    def tissue(self, file: SlideFile) -> str:
        """The contours of a slide's tissue by the default segmenter, as GeoJSON in level-0 pixels.

        Raises:
            LongslideError: As of `tile`; or the tissue cannot be found.
        """
        return self._call(_as_it_is(file), pictures.tissue)

    def try_again(self, file: SlideFile) -> None:
        """Forget that a slide crashed or hung."""
        with self._changed:
            for known, state in self._states.items():
                if known.path == file.path:
                    state.refused, state.crashes = "", 0
                    state.failed.clear()

    def _picture(self, file: SlideFile, draw: Callable[..., T], *args: Any, at_home: bool = False) -> T:
        file = _as_it_is(file)
        key = (file, draw.__name__, *args)
        with self._changed:
            if (known := self._pictures.get(key)) is not None:
                self._pictures.move_to_end(key)
                return known  # type: ignore[return-value]
        if self._state(file).facts is None:
            self._facts(file)
        drawn = self._call(file, draw, *args, at_home=at_home)
        if isinstance(drawn, bytes):
            with self._changed:
                self._picture_bytes += len(drawn) - len(self._pictures.get(key, b""))
                self._pictures[key] = drawn
                while self._picture_bytes > PICTURE_BYTES:
                    self._picture_bytes -= len(self._pictures.popitem(last=False)[1])
        return drawn

    def _facts(self, file: SlideFile) -> SlideFacts:
        facts = self._call(file, pictures.look)
        self._state(file).facts = facts
        return facts

    def _state(self, file: SlideFile) -> _State:
        with self._changed:
            if file not in self._states:
                for other in [other for other in self._states if other.path == file.path]:  # written anew since
                    del self._states[other]
                self._states[file] = _State()
            return self._states[file]

    def _call(self, file: SlideFile, function: Callable[..., T], *args: Any, at_home: bool = False) -> T:
        """Call a function of `pictures` in a process, one that has the slide open if one is free.

        Args:
            file: The slide as it is now.
            function: The function.
            *args: Its arguments but the slide.
            at_home: Whether it needs the overview, which one process makes.
        """
        state, key = self._state(file), (function.__name__, *args)
        with self._changed:
            while (process := self._free_process(file, state, at_home)) is None:
                self._refuse(file, state, key)
                self._changed.wait()
            self._refuse(file, state, key)
            self._free.remove(process)
            process.reading = file
            state.home = state.home or process
            state.reading += 1
        try:
            answer: T = process.watched.call(file.path, function, file, *args)
        except (CrashedError, OverdueError) as error:
            with self._changed:
                process.files.clear()
                state.crashes += 1
                state.failed[key] = str(error)
                if isinstance(error, OverdueError) or state.facts is None or state.crashes >= MOST_CRASHES:
                    state.refused = f"{error}. Open its page again to try once more."
            raise
        else:
            process.files = [file, *(other for other in process.files if other != file)][: pictures.MOST_OPEN]
            return answer
        finally:
            with self._changed:
                state.reading -= 1
                process.reading = None
                self._free.append(process)
                self._changed.notify_all()

    def _refuse(self, file: SlideFile, state: _State, key: tuple[object, ...]) -> None:
        if self._closed:
            raise LongslideError(f"{file.path}: the viewer was ended")
        if refused := state.refused or state.failed.get(key):
            raise LongslideError(refused)

    def _free_process(self, file: SlideFile, state: _State, at_home: bool) -> _Process | None:
        if not self._free or state.reading >= state.most_reading:
            return None
        if at_home and state.home is not None:
            if state.home in self._free:
                return state.home
            if state.home.reading == file:
                return None
        return next((one for one in self._free if file in one.files), self._free[-1])


def _as_it_is(file: SlideFile) -> SlideFile:
    """How the file is opened as it is now, by a process that may not have imported the reader yet.

    Raises:
        LongslideError: It is not there, or nobody has imported its reader.
    """
    reader = recorded_reader(file.reader) if isinstance(file.reader, str) else file.reader
    try:
        return replace(file, version=file.path.stat().st_mtime_ns, reader=reader)
    except OSError as error:
        raise LongslideError(f"{file.path}: the slide cannot be opened ({error.strerror}); was it moved?") from error
