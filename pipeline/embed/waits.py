"""What embedding waits for, and what would make it faster."""

import time
from typing import TYPE_CHECKING, Literal, get_args

from ..log_file import event

if TYPE_CHECKING:
    from ..batch.devices import Feed

Wait = Literal["encoder", "tiles", "slides", "writing"]

LIMITED = 1 / 3
"""More than this share of the time must be lost to something else before it is said to be the limit."""

_WAITS: dict[Wait, tuple[str, str]] = {
    "encoder": ("the tile encoder", "a faster GPU, more GPUs, or --precision"),
    "tiles": ("reading tiles", "more cores (--threads), or faster storage"),
    "slides": ("opening slides and finding tissue", "more cores, or faster storage"),
    "writing": ("slide embeddings and files", "a faster disk for --output"),
}


class Waits:
    """Where the time of the thread that feeds the tile encoder goes, from when it is made.

    Attributes:
        seconds: Seconds by what was waited for: the encoder (or feeding it), tiles, slides to open, files to write.
        tiles: Tiles that were fed to it.
    """

    def __init__(self) -> None:
        self.seconds: dict[Wait, float] = dict.fromkeys(get_args(Wait), 0.0)
        self.tiles = 0
        self._last = time.monotonic()

    def lap(self, wait: Wait) -> None:
        """Count the time since the last call as a wait for this."""
        now = time.monotonic()
        self.seconds[wait] += now - self._last
        self._last = now

    @property
    def limit(self) -> str:
        """What limits the speed: the tile encoder, unless more than a little is lost to something else."""
        return _WAITS[self._limit][0]

    @property
    def _limit(self) -> Wait:
        total = sum(self.seconds.values())
        others = {wait: seconds for wait, seconds in self.seconds.items() if wait != "encoder"}
        worst = max(others, key=others.__getitem__)
        return worst if others[worst] > LIMITED * total else "encoder"

    def say(self, device: str, feed: "Feed | None") -> None:
        """Print it, or tell the job whose process this is; nothing where no tiles were fed."""
        if not self.tiles:
            return
        if feed is not None:
            feed.note(f"{device}: {self}")
            return
        print(self)
        seconds = {f"seconds_{wait}": round(seconds, 1) for wait, seconds in self.seconds.items()}
        event("time", str(self), {"tiles": self.tiles, "limit": self.limit} | seconds)

    def __str__(self) -> str:
        total = sum(self.seconds.values()) or 1.0
        shares = [
            f"{_WAITS[wait][0]} {seconds / total:.0%}"
            for wait, seconds in self.seconds.items()
            if seconds > total / 200
        ]
        what, remedy = _WAITS[self._limit]
        return f"time: {', '.join(shares)}; limited by {what} (faster with {remedy})"
