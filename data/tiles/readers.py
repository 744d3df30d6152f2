"""What reads the tiles of a run's slides: processes where they pay and the slide may be opened again there, else threads."""

import os
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Protocol, Self

import numpy as np

from ...errors import LongslideError
from ..slides.slide import Slide
from .grid import Grid
from .pool import TilePool
from .read import read_tiles

READING_BATCH = 128
"""Tiles that are read at a time."""

MOST_READERS = 16
"""They read 20,000 tiles a second, more than any encoder takes, and each process holds a quarter of a gigabyte."""

_THREADS_SCALE_TO = 4  # beyond, they wait for one another
_RUN = 8  # tiles a thread reads before it asks for more: handing them over one by one costs a twentieth


class PendingTiles(Protocol):
    """Some tiles that are being read.

    Attributes:
        rows: `(n,)` int64 rows of the grid's `coords`.
    """

    rows: np.ndarray

    def result(self, timeout: float | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Wait for them.

        Args:
            timeout: Seconds to wait at most.

        Returns:
            `(n, tile_px, tile_px, 3)` uint8 RGB, valid until `release`; and `(n,)` float32, how blurred each is (`blur_of`),
            NaN for one that cannot be read.

        Raises:
            LongslideError: What reads them has died, or the time is over.
        """
        ...

    def release(self) -> None:
        """Let the memory be used again; what has not been read by then is given up."""
        ...


class _Reads:
    def __init__(self, slide: Slide, rows: np.ndarray, tiles: np.ndarray, runs: list[Future[np.ndarray]]) -> None:
        self.rows = rows
        self._slide = slide
        self._tiles = tiles
        self._runs = runs

    def result(self, timeout: float | None = None) -> tuple[np.ndarray, np.ndarray]:
        if wait(self._runs, timeout).not_done:
            raise LongslideError(f"{self._slide.path}: tiles were not read within {timeout:g} s; is its disk there?")
        return self._tiles, np.concatenate([run.result() for run in self._runs])

    def release(self) -> None:
        for run in self._runs:
            run.cancel()


class TileReaders:
    """Reads tiles of any number of slides, several batches at a time. A context manager.

    Args:
        count: How many threads or processes read; None for one on each core that this process may use, but no more than
            `MOST_READERS`.
        processes: Whether there may be processes. They take a second to start, and pay where there are many cores.
    """

    def __init__(self, count: int | None = None, *, processes: bool = True) -> None:
        self.count = min(MOST_READERS, usable_cores()) if count is None else count
        self._processes = processes and self.count > _THREADS_SCALE_TO and TilePool.supported
        self._threads = ThreadPoolExecutor(self.count, thread_name_prefix="tiles")
        self._pool: TilePool | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.close()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def read(self, slide: Slide, grid: Grid, rows: np.ndarray) -> PendingTiles:
        """Begin to read tiles of a slide; waits while as many are under way as there is room for.

        Args:
            slide: The slide; open until the tiles are there.
            grid: Its grid.
            rows: `(n,)` int64 rows of the grid's `coords`, at most `READING_BATCH`.
        """
        if self._processes and slide.reopens:
            if self._pool is None:
                self._pool = TilePool(
                    self.count, batch_size=READING_BATCH, tile_px=grid.tile_px, batches=max(8, self.count)
                )
            if grid.tile_px == self._pool.buffer.shape[2]:
                return self._pool.read(slide, grid, rows)
        corners = grid.coords[rows]
        tiles = np.empty((len(corners), grid.tile_px, grid.tile_px, 3), np.uint8)
        runs = [
            self._threads.submit(read_tiles, slide, grid, corners[i : i + _RUN], tiles[i : i + _RUN])
            for i in range(0, len(corners), _RUN)
        ]
        return _Reads(slide, rows, tiles, runs)


def usable_cores() -> int:
    """Cores that this process may use: of a cluster's job often fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
