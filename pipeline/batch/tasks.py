"""Tasks of which each takes a worker for long, such as the training of a fold: a task to a process at a time."""

import pickle
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

from ...errors import LongslideError
from .dispatch import MOST_DEATHS
from .workers import Work, Worker, WorkerRun

ASK_AGAIN = 1.0
"""Seconds after which a process that there is no task for asks again: that of one that dies may come back."""


class TaskFeed:
    """What a worker's process gets: the numbers of tasks, one after the other.

    Args:
        pipe: To the `TaskRun`.
    """

    def __init__(self, pipe: "Connection[Any, Any]") -> None:
        self._pipe = pipe

    def __iter__(self) -> Iterator[int]:
        while True:
            self._pipe.send(("next",))
            answer = self._pipe.recv()
            if answer == "over":
                return
            if answer is None:
                time.sleep(ASK_AGAIN)
            else:
                yield answer

    def ended(self, number: int, result: object) -> None:
        """A task has ended; tensors travel as plain bytes, not as shared memory."""
        self._pipe.send(("ended", number, pickle.dumps(result)))


class TaskRun(WorkerRun):
    """Runs tasks on several workers. One whose process dies is begun again by another process, once.

    Args:
        workers: The workers.
        work: Called in each process; takes the numbers of tasks from a `TaskFeed`, and gives it the results.
        names: What each task is called, for messages.
        on_ended: Is called with the number of a task and its result, as it ends.
    """

    GIVEN_ON = "what it was at work on is begun again"

    def __init__(
        self, workers: Sequence[Worker], work: Work, names: Sequence[str], on_ended: Callable[[int, Any], None]
    ) -> None:
        super().__init__(workers, work)
        self._names = names
        self._on_ended = on_ended
        self._left = deque(range(len(names)))
        self._in_hand: dict[int, int] = {}
        self._deaths: dict[int, list[str]] = {}
        self._ended = 0
        self._given_up: list[int] = []

    def run(self) -> None:
        """Run all tasks.

        Raises:
            LongslideError: Wrong usage, as a process found it; or, after all others have ended, a task with which two
                processes died.
        """
        self.serve()
        if self._given_up:
            number = self._given_up[0]
            deaths = ", ".join(self._deaths[number])
            raise LongslideError(
                f"{self._names[number]}: {MOST_DEATHS} processes died with it ({deaths}): too little memory, or a fault of "
                "the machine; what else has ended is kept, and the same command goes on from there"
            )
        if not self.done():
            raise LongslideError(
                f"{self._names[self._left[0]]}: no device is left, their processes have died; what has ended is kept, and "
                "the same command goes on from there"
            )

    def done(self) -> bool:
        """Whether all tasks have ended, or were given up."""
        return self._ended + len(self._given_up) == len(self._names)

    def next(self, worker: int) -> object:
        """The next task; None where there is none now, but that of another worker may come back."""
        if not self._left:
            return None if self._in_hand else "over"
        self._in_hand[worker] = self._left.popleft()
        return self._in_hand[worker]

    def ended(self, worker: int, *result: Any) -> None:
        """A task has ended."""
        number, content = result
        del self._in_hand[worker]
        self._on_ended(number, pickle.loads(content))
        self._ended += 1

    def died(self, worker: int, how: str) -> None:
        """Its task is begun again, or given up."""
        number = self._in_hand.pop(worker, None)
        if number is None:
            return
        deaths = self._deaths.setdefault(number, [])
        deaths.append(how)
        if len(deaths) < MOST_DEATHS:
            self._left.append(number)
        else:
            self._given_up.append(number)

    def note(self, text: str) -> None:
        """Write a line on standard error."""
        print(text, file=sys.stderr, flush=True)
