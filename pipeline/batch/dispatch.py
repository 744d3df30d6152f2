"""Which worker gets which slide, and what becomes of the slides of one that dies. It only decides; others do."""

import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Literal

from ...data.slides.slide_table import SlideEntry
from ...errors import LongslideError
from .claims import HEARTBEAT, SILENT
from .result import BUSY, SlideResult

MOST_DEATHS = 2
"""A slide that is in the hands of so many workers that die fails."""
RETRY = 10.0
"""Seconds until a slide is tried again that a dead worker's claim still holds: where a file system keeps its locks."""


class Dispatch:
    """Slides for workers that come for them, the largest first: one that is begun last would keep one worker busy alone.

    Not safe for threads.

    Args:
        entries: The slides.
        sizes: How much work each is, in any unit.
        clock: Tells the time in seconds.

    Attributes:
        results: Of the slides that have ended, by id.
    """

    def __init__(
        self, entries: Sequence[SlideEntry], sizes: Sequence[float], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        order = sorted(range(len(entries)), key=lambda number: -sizes[number])
        self._left = deque(entries[number] for number in order)
        self._later: deque[tuple[float, SlideEntry]] = deque()
        self._in_hand: dict[Hashable, dict[str, SlideEntry]] = {}
        self._in_hands = 0
        self._deaths: dict[str, list[float]] = {}
        self._stop: Literal["over", "stop"] | None = None
        self.results: dict[str, SlideResult] = {}

    def next(self, worker: Hashable) -> SlideEntry | Literal["over", "stop"] | None:
        """The next slide for a worker; None where there is none now, but may be later.

        One that was in the hands of a worker that died is worked on alone, so that it takes no other with it.
        """
        if self._stop is not None:
            return self._stop
        own = self._in_hand.setdefault(worker, {})
        while self._later and self._later[0][0] <= self._clock():
            self._left.append(self._later.popleft()[1])
        if not self._left:
            return None if self._later or self._in_hands > len(own) else "over"
        suspect = self._left[0].slide_id in self._deaths
        if own and (suspect or any(slide_id in self._deaths for slide_id in own)):
            return None
        entry = self._left.popleft()
        own[entry.slide_id] = entry
        self._in_hands += 1
        return entry

    def ended(self, worker: Hashable, result: SlideResult) -> bool:
        """A worker says how a slide ended; whether that is so, for it may be tried again."""
        entry = self._in_hand[worker].pop(result.slide_id)
        self._in_hands -= 1
        died = self._deaths.get(result.slide_id)
        if died and result.reason.startswith(BUSY) and self._clock() < died[-1] + SILENT + 2 * HEARTBEAT:
            self._later.append((self._clock() + RETRY, entry))
            return False
        self.results[result.slide_id] = result
        return True

    def died(self, worker: Hashable) -> list[SlideResult]:
        """A worker has died; what it had in hand goes to others, after all that is left. Returns the slides that so fail."""
        back = list(self._in_hand.pop(worker, {}).values())
        self._in_hands -= len(back)
        failed = []
        for entry in back:
            deaths = self._deaths.setdefault(entry.slide_id, [])
            deaths.append(self._clock())
            if len(deaths) < MOST_DEATHS:
                self._left.append(entry)
            else:
                why = (
                    f"{entry.path}: {MOST_DEATHS} processes died while they had this slide; it is damaged, or the "
                    "machine lacks memory: embed it alone to see"
                )
                failed.append(self._fail(entry, why))
        return failed

    def give_up(self, why: str) -> list[SlideResult]:
        """Fail what is left."""
        left = [*self._left, *(entry for _, entry in self._later)]
        self._left.clear()
        self._later.clear()
        return [self._fail(entry, why) for entry in left]

    def stop(self, *, soon: bool = False) -> None:
        """Give no more slides; `soon` leaves what workers have and no model has begun with."""
        self._stop = "stop" if soon else "over"

    def _fail(self, entry: SlideEntry, why: str) -> SlideResult:
        result = self.results[entry.slide_id] = SlideResult.failed(entry, LongslideError(why))
        return result
