"""Memory for what is whole in memory while it is worked on, given out in the order of the slides."""

import threading

from ...data.slides.base import MOST_BYTES
from ...errors import LongslideError


class MemoryBudget:
    """Gives memory to slides, one turn each; who comes later waits, so that none waits for one that waits for it.

    Args:
        most: Bytes that all together may take; `MOST_BYTES` by default.
    """

    def __init__(self, most: int | None = None) -> None:
        self.most = MOST_BYTES if most is None else most
        self._turns: list[Turn] = []  # of slides that are under way, in their order
        self._changed = threading.Condition()
        self._stopped = False

    def turn(self) -> "Turn":
        """The turn of the next slide."""
        with self._changed:
            turn = Turn(self)
            self._turns.append(turn)
            return turn

    def stop(self) -> None:
        """End all waiting: it raises."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _take(self, turn: "Turn", size: int) -> None:
        with self._changed:
            while not self._stopped and size and turn.size is None:
                before = self._turns[: self._turns.index(turn)]
                others = sum(one.size or 0 for one in self._turns if one is not turn)
                if all(one.size is not None for one in before) and (others + size <= self.most or not others):
                    break
                self._changed.wait()
            if self._stopped:
                raise LongslideError("the job was stopped")
            turn.size = size
            self._changed.notify_all()

    def _end(self, turn: "Turn") -> None:
        with self._changed:
            if turn in self._turns:
                self._turns.remove(turn)
                self._changed.notify_all()


class Turn:
    """A slide's turn in getting memory; to be closed when the slide has ended.

    Attributes:
        most: Bytes that all slides may have together.
        size: Bytes that it has; None while it may still ask for some, and later slides wait for that.
    """

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget = budget
        self.most = budget.most
        self.size: int | None = None

    def take(self, size: int) -> None:
        """Take so much; waits until there is room, or nobody else has any.

        Called again, it only corrects the size: the memory is in use by then, and later slides, which may have the rest,
        are encoded after this one.

        Raises:
            LongslideError: The job was stopped meanwhile.
        """
        self._budget._take(self, size)

    def close(self) -> None:
        """Give all back."""
        self._budget._end(self)
