"""Tiles of a slide as uint8 batches, read ahead by threads or processes."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ...errors import LongslideError
from ..slides.slide import Slide
from .grid import Grid
from .read import read_tiles

if TYPE_CHECKING:
    from .pool import PendingTiles, TilePool

_RUN = 8  # tiles a thread reads before it asks for more: handing them over one by one costs a twentieth


def _nothing() -> None:
    pass


@dataclass(frozen=True, repr=False)
class TileBatch:
    """Some tiles of a slide.

    Attributes:
        tiles: `(B, tile_px, tile_px, 3)` uint8 RGB.
        index: `(B,)` int64 rows of the grid's `coords`.
        coords: `(B, 2)` int64 top-left corners (x, y) in level-0 pixels.
        release: To be called when the tiles are not needed any more, if a `TilePool` read them: they lie in its memory.
    """

    tiles: np.ndarray
    index: np.ndarray
    coords: np.ndarray
    release: Callable[[], None] = _nothing

    def __repr__(self) -> str:
        return f"TileBatch({len(self.tiles)} tiles of {self.tiles.shape[1]} px)"


class TileStream:
    """The tiles of a grid, in its order, as batches that threads read ahead.

    At most `read_ahead` batches are in memory besides the one in use. Nothing is written to disk.

    Args:
        slide: The slide; open as long as the stream is read.
        grid: Its grid.
        batch_size: Tiles a batch; the last one may be smaller, and so is one with unreadable tiles.
        threads: Threads that read.
        read_ahead: Batches read ahead.
        max_bad_tiles: Unreadable tiles to put up with; they are left out of the batches.
        max_blur: Tiles more blurred than this are left out too; see `blur_of`.
        pool: Processes that read in place of the threads, as far ahead as they have room, if the slide may be opened again
            there. Each batch is then to be released.

    Attributes:
        bad_tiles: (x, y) in level-0 pixels of the unreadable tiles met so far.
        blur: `(N,)` float32, how blurred each tile of the grid is; NaN where it is unreadable or not read yet.
    """

    def __init__(
        self,
        slide: Slide,
        grid: Grid,
        *,
        batch_size: int = 64,
        threads: int = 4,
        read_ahead: int = 4,
        max_bad_tiles: int = 0,
        max_blur: float = 1.0,
        pool: "TilePool | None" = None,
    ) -> None:
        self.slide = slide
        self.grid = grid
        self.batch_size = batch_size
        self.threads = threads
        self.read_ahead = read_ahead
        self.max_bad_tiles = max_bad_tiles
        self.max_blur = max_blur
        self.pool = pool if slide.reopens else None
        self.bad_tiles: list[tuple[int, int]] = []
        self.blur = np.full(len(self), np.nan, np.float32)

    def __repr__(self) -> str:
        return f"TileStream({self.slide.slide_id!r}, {len(self):,} tiles of {self.grid.tile_px} px)"

    def __len__(self) -> int:
        """Tiles of the grid."""
        return len(self.grid.coords)

    def __iter__(self) -> Iterator[TileBatch]:
        """Read the tiles.

        Raises:
            LongslideError: More than `max_bad_tiles` tiles cannot be read.
        """
        self.bad_tiles.clear()
        self.blur[:] = np.nan
        yield from self._by_threads() if self.pool is None else self._by_pool(self.pool)

    def _by_threads(self) -> Iterator[TileBatch]:
        starts = iter(range(0, len(self), self.batch_size))
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="tiles")
        pending: deque[tuple[int, np.ndarray, list[Future[np.ndarray]]]] = deque()
        try:
            while True:
                while len(pending) <= self.read_ahead and (start := next(starts, None)) is not None:
                    pending.append((start, *self._submit(pool, start)))
                if not pending:
                    return
                start, tiles, reads = pending.popleft()
                batch = self._batch(start, tiles, np.concatenate([read.result() for read in reads]), _nothing)
                if len(batch.tiles):
                    yield batch
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _by_pool(self, pool: "TilePool") -> Iterator[TileBatch]:
        starts = iter(range(0, len(self), self.batch_size))
        pending: deque[PendingTiles] = deque()
        try:
            while True:
                while (pool.room or not pending) and (start := next(starts, None)) is not None:
                    rows = np.arange(start, min(start + self.batch_size, len(self)))
                    pending.append(pool.read(self.slide, self.grid, rows))
                if not pending:
                    return
                first = pending[0]
                batch = self._batch(int(first.rows[0]), *first.result(), first.release)
                pending.popleft()
                if len(batch.tiles):
                    yield batch
                else:
                    batch.release()
        finally:
            for one in pending:
                one.release()

    def _batch(self, start: int, tiles: np.ndarray, blur: np.ndarray, release: Callable[[], None]) -> TileBatch:
        self.blur[start : start + len(blur)] = blur
        if np.isnan(blur).any():
            self._count_bad(start + np.flatnonzero(np.isnan(blur)))
        good = blur <= self.max_blur
        index = start + np.flatnonzero(good)
        return TileBatch(tiles if good.all() else tiles[good], index, self.grid.coords[index], release)

    def _submit(self, pool: ThreadPoolExecutor, start: int) -> tuple[np.ndarray, list[Future[np.ndarray]]]:
        coords = self.grid.coords[start : start + self.batch_size]
        read = partial(read_tiles, self.slide, self.grid)
        tiles = np.empty((len(coords), self.grid.tile_px, self.grid.tile_px, 3), np.uint8)
        runs = range(0, len(coords), _RUN)
        return tiles, [pool.submit(read, coords[i : i + _RUN], tiles[i : i + _RUN]) for i in runs]

    def _count_bad(self, rows: np.ndarray) -> None:
        self.bad_tiles += [(x, y) for x, y in self.grid.coords[rows].tolist()]
        if len(self.bad_tiles) > self.max_bad_tiles:
            first = ", ".join(map(str, self.bad_tiles[:3]))
            raise LongslideError(
                f"{self.slide.path}: {len(self.bad_tiles)} unreadable tiles (first at {first}, level-0 pixels), more "
                f"than --max-bad-tiles {self.max_bad_tiles}; copy the slide again, or allow more"
            )
