"""Processes that read tiles into shared memory: threads around a decoder stop at about four cores."""

import logging
import mmap
import os
import pickle
import signal
import subprocess
import tempfile
import threading
from collections import OrderedDict, deque
from dataclasses import dataclass, field, replace
from itertools import count
from multiprocessing.connection import Connection, Pipe, wait
from types import TracebackType
from typing import Any, Self

import numpy as np

from ...errors import LongslideError
from ...registry import registered
from ..child_process import start_child
from ..slides.slide import Slide
from .grid import Grid

CACHE_BYTES = 2**30
"""Decoded native tiles that all processes together keep for the slides they have open."""

_BAND = 16  # columns of the grid that one process reads: it has the native tiles of the row above still decoded
_TASK = 32  # tiles that a process is sent at once
_AHEAD = 2  # tasks that a process has at a time, so that it never waits for the next one
_OPEN = 2  # slides that a process keeps open

logger = logging.getLogger(__name__)


class TilePool:
    """Processes that read tiles of any slides, batch by batch, into one block of shared memory.

    They are no forks of this process, whose threads and GPU that would break, and do not run the user's script again, as
    those of `multiprocessing` do. Only on Linux and macOS: elsewhere `supported` is False.

    Args:
        processes: How many.
        batch_size: Tiles of a batch at most.
        tile_px: Edge of a tile in pixels.
        batches: Batches that there is room for: those being read, and those not yet released.

    Attributes:
        buffer: `(batches, batch_size, tile_px, tile_px, 3)` uint8, the shared memory.
    """

    supported = os.name == "posix"

    def __init__(self, processes: int, *, batch_size: int = 256, tile_px: int = 256, batches: int = 6) -> None:
        if not self.supported:
            raise LongslideError("tiles are read by several processes only on Linux and macOS")
        shape = (batches, batch_size, tile_px, tile_px, 3)
        self._memory_file = _memory_file(int(np.prod(shape)))
        self._memory = mmap.mmap(self._memory_file, int(np.prod(shape)))
        self.buffer = np.frombuffer(self._memory, np.uint8).reshape(shape)
        self._changed = threading.Condition()
        self._free = deque(range(batches))
        self._queue: deque[_Task] = deque()
        self._sources: OrderedDict[tuple[int, ...], _Source] = OrderedDict()
        self._numbers = count()
        self._broken = ""
        self._readers: OrderedDict[tuple[int, int], _Worker] = OrderedDict()
        self._closed = False
        self._cache_bytes = CACHE_BYTES // (processes * _OPEN)
        self._wake, self._woken = Pipe()
        self._workers = [self._start() for _ in range(processes)]
        self._thread = threading.Thread(target=self._collect, name="tile-pool", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return (
            f"TilePool({len(self._workers)} processes, {self.buffer.shape[0]} batches of {self.buffer.shape[1]} tiles)"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def room(self) -> bool:
        """Whether `read` would return at once."""
        return bool(self._free)

    def read(self, slide: Slide, grid: Grid, rows: np.ndarray) -> "PendingTiles":
        """Have a batch of tiles read. Returns at once while there is room, else when a batch has been released.

        Args:
            slide: The slide; batches of several slides may be under way.
            grid: Its grid.
            rows: `(n,)` int64 rows of the grid's `coords`, at most `batch_size`.
        """
        if len(rows) > self.buffer.shape[1] or grid.tile_px != self.buffer.shape[2]:
            raise ValueError(f"{self} cannot hold {len(rows)} tiles of {grid.tile_px} px")
        with self._changed:
            self._changed.wait_for(lambda: self._free or self._closed)
            if self._closed or self._broken:
                raise LongslideError(f"{slide.path}: {self._broken or 'the job was stopped'}")
            source = self._source(slide, grid)
            pending = PendingTiles(self, slide, self._free.popleft(), rows)
            corners = grid.coords[rows]
            bands = corners[:, 0] // (grid.step_level0 * _BAND)
            for band in dict.fromkeys(bands.tolist()):
                places = np.flatnonzero(bands == band)
                for first in range(0, len(places), _TASK):
                    part = places[first : first + _TASK]
                    self._queue.append(_Task(pending, source, band, part, corners[part]))
                    pending.open_tasks += 1
            self._hand_out()
        return pending

    def close(self) -> None:
        """End the processes. What is under way is given up."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._queue.clear()
            self._changed.notify_all()
            self._wake.send(None)
        self._thread.join()
        for worker in self._workers:
            worker.pipe.close()  # it ends when it reads the end of the pipe
        for worker in self._workers:
            try:
                worker.process.wait(2)
            except subprocess.TimeoutExpired:  # in the midst of a slow read
                worker.process.kill()
                worker.process.wait()
        for end in (self._wake, self._woken):
            end.close()
        os.close(self._memory_file)

    # What follows runs with the lock held.

    def _source(self, slide: Slide, grid: Grid) -> "_Source":
        how = (id(slide), grid.level, grid.read_px, grid.tile_px)
        if how not in self._sources:
            empty = replace(grid, coords=grid.coords[:0], tissue_fraction=grid.tissue_fraction[:0])
            self._sources[how] = _Source(next(self._numbers), slide, pickle.dumps((registered(), slide, empty)))
        self._sources.move_to_end(how)
        while len(self._sources) > _OPEN:  # a task that needs one has it
            self._sources.popitem(last=False)
        return self._sources[how]

    def _hand_out(self) -> None:
        while self._queue:
            idle = [worker for worker in self._workers if len(worker.tasks) < _AHEAD]
            if not idle:
                return
            for worker in sorted(idle, key=lambda one: len(one.tasks)):
                if self._queue:
                    self._send(worker, self._next_for(worker))

    def _next_for(self, worker: "_Worker") -> "_Task":
        """The first task of a band that it has read before, else the first that no other one has, else the first."""
        best, rank = 0, 2
        for number, task in enumerate(self._queue):
            reader = self._readers.get((task.source.number, task.band))
            if reader is worker:
                best = number
                break
            if reader is None and rank > 1:
                best, rank = number, 1
        task = self._queue[best]
        del self._queue[best]
        return task

    def _send(self, worker: "_Worker", task: "_Task") -> None:
        self._readers[task.source.number, task.band] = worker
        self._readers.move_to_end((task.source.number, task.band))
        while len(self._readers) > 4096:
            self._readers.popitem(last=False)
        worker.tasks.append(task)
        try:
            if task.source not in worker.sources:
                while len(worker.sources) >= _OPEN and (old := worker.unused_source()) is not None:
                    worker.sources.remove(old)
                    worker.pipe.send(("close", old.number))
                worker.pipe.send(("open", task.source.number, task.source.pickled))
                worker.sources.append(task.source)
            first = task.pending.slot * self.buffer.shape[1]
            worker.pipe.send(("read", task.source.number, first + task.places, task.corners))
        except OSError:  # it died: `_collect` finds out
            pass

    def _finish(self, task: "_Task", answer: np.ndarray | str) -> None:
        pending = task.pending
        if isinstance(answer, str):
            pending.error = pending.error or answer
        else:
            pending.blur[task.places] = answer
        pending.open_tasks -= 1
        self._free_if_done(pending)
        self._changed.notify_all()

    def _free_if_done(self, pending: "PendingTiles") -> None:
        if pending.released and pending.open_tasks == 0:
            self._free.append(pending.slot)
            self._changed.notify_all()

    def _give_up(self, pending: "PendingTiles") -> None:
        """Forget what is not being read yet of a batch that nobody wants."""
        kept = [task for task in self._queue if task.pending is not pending]
        pending.open_tasks -= len(self._queue) - len(kept)
        self._queue = deque(kept)

    def _end_workers_at(self, pending: "PendingTiles") -> None:
        """Kill the processes that hang in tiles of a batch; `_replace` starts others."""
        for worker in self._workers:
            if worker.ready and worker.tasks and worker.tasks[0].pending is pending:
                worker.process.kill()

    # The thread that collects answers.

    def _collect(self) -> None:
        while not self._closed:
            by_pipe: dict[Any, _Worker] = {worker.pipe: worker for worker in self._workers}
            for end in wait([self._woken, *by_pipe]):
                if end is self._woken:
                    continue
                worker = by_pipe[end]
                try:
                    answer = worker.pipe.recv()
                except (EOFError, OSError):
                    with self._changed:
                        self._replace(worker)
                    continue
                with self._changed:
                    worker.ready = True
                    if answer is not None:  # else it has just started
                        self._finish(worker.tasks.popleft(), answer)
                    self._hand_out()

    def _replace(self, worker: "_Worker") -> None:
        if self._closed:
            return
        worker.pipe.close()
        status = worker.process.wait()
        name = signal.Signals(-status).name if status < 0 else f"status {status}"
        self._workers.remove(worker)
        self._readers = OrderedDict((key, one) for key, one in self._readers.items() if one is not worker)
        if worker.ready and worker.tasks:
            self._finish(
                worker.tasks.popleft(), f"the library that reads it crashed ({name}): it is damaged, copy it again"
            )
        self._queue.extendleft(reversed(worker.tasks))
        if worker.ready:
            self._workers.append(self._start())
        elif not self._workers:
            self._broken = f"no process that reads tiles can be started ({name})"
            for task in self._queue:
                self._finish(task, self._broken)
            self._queue.clear()
        self._hand_out()

    def _start(self) -> "_Worker":
        ours, theirs = Pipe()
        numbers = (theirs.fileno(), self._memory_file, *self.buffer.shape[:3], self._cache_bytes)
        process = start_child(
            f"{__name__}_process",
            *numbers,
            pass_fds=[theirs.fileno(), self._memory_file],
            process_group=0,  # Ctrl-C in a terminal goes to the job alone, which ends them
        )
        theirs.close()
        return _Worker(process, ours)


class PendingTiles:
    """A batch of tiles that is being read.

    Attributes:
        slot: Its place in the pool's `buffer`.
        rows: `(n,)` int64 rows of the grid's `coords`.
    """

    def __init__(self, pool: TilePool, slide: Slide, slot: int, rows: np.ndarray) -> None:
        self.slot = slot
        self.rows = rows
        self.blur = np.full(len(rows), np.nan, np.float32)
        self.open_tasks = 0
        self.released = False
        self.error = ""
        self._pool = pool
        self._slide = slide

    def result(self, timeout: float | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Wait for the tiles.

        Args:
            timeout: Seconds to wait at most.

        Returns:
            `(n, tile_px, tile_px, 3)` uint8 RGB, a view of the pool's `buffer` that is valid until `release`; and `(n,)`
            float32, how blurred each is (`blur_of`), NaN for one that cannot be read.

        Raises:
            LongslideError: A process died over them, the time is over, or the pool is closed.
        """
        changed = self._pool._changed
        with changed:
            if not changed.wait_for(lambda: not self.open_tasks or self._pool._closed, timeout):
                self._pool._end_workers_at(self)
                raise LongslideError(
                    f"{self._slide.path}: tiles were not read within {timeout:g} s; is its disk there?"
                )
            if self.open_tasks:
                raise LongslideError(f"{self._slide.path}: the job was stopped")
            if self.error:
                raise LongslideError(f"{self._slide.path}: {self.error}")
        return self._pool.buffer[self.slot, : len(self.rows)], self.blur

    def release(self) -> None:
        """Let the memory be used again. What has not been read by then is given up."""
        with self._pool._changed:
            if not self.released:
                self.released = True
                self._pool._give_up(self)
                self._pool._free_if_done(self)


@dataclass(eq=False)
class _Source:
    """A slide and how its tiles are read, under the number that the processes know."""

    number: int
    slide: Slide  # held, so that no other one gets its id
    pickled: bytes


@dataclass(eq=False)
class _Task:
    pending: PendingTiles
    source: _Source
    band: int
    places: np.ndarray
    corners: np.ndarray


@dataclass(eq=False)
class _Worker:
    process: "subprocess.Popen[bytes]"
    pipe: "Connection[Any, Any]"
    tasks: deque[_Task] = field(default_factory=deque)
    sources: list[_Source] = field(default_factory=list)
    ready: bool = False

    def unused_source(self) -> _Source | None:
        used = {task.source for task in self.tasks}
        return next((one for one in self.sources if one not in used), None)


def _memory_file(size: int) -> int:
    """A file without a name, in memory where the system has such: `/dev/shm` may be small in a container."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("longslide-tiles")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor
