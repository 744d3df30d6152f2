"""Tiles of a slide as uint8 batches, read ahead by threads."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np

from ...errors import LongslideError
from ..slides.slide import Slide
from .blur import blur_of
from .grid import Grid

_RUN = 8  # tiles a thread reads before it asks for more: handing them over one by one costs a twentieth


@dataclass(frozen=True, repr=False)
class TileBatch:
    """Some tiles of a slide.

    Attributes:
        tiles: `(B, tile_px, tile_px, 3)` uint8 RGB.
        index: `(B,)` int64 rows of the grid's `coords`.
        coords: `(B, 2)` int64 top-left corners (x, y) in level-0 pixels.
    """

    tiles: np.ndarray
    index: np.ndarray
    coords: np.ndarray

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
    ) -> None:
        self.slide = slide
        self.grid = grid
        self.batch_size = batch_size
        self.threads = threads
        self.read_ahead = read_ahead
        self.max_bad_tiles = max_bad_tiles
        self.max_blur = max_blur
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
        starts = iter(range(0, len(self), self.batch_size))
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="tiles")
        pending: deque[tuple[int, np.ndarray, list[Future[list[float]]]]] = deque()
        self.bad_tiles.clear()
        self.blur[:] = np.nan
        try:
            while True:
                while len(pending) <= self.read_ahead and (start := next(starts, None)) is not None:
                    pending.append((start, *self._submit(pool, start)))
                if not pending:
                    return
                start, tiles, reads = pending.popleft()
                blur = np.array([one for read in reads for one in read.result()], np.float32)
                self.blur[start : start + len(blur)] = blur
                if np.isnan(blur).any():
                    self._count_bad(start + np.flatnonzero(np.isnan(blur)))
                good = blur <= self.max_blur
                if not good.all():
                    tiles = tiles[good]
                if len(tiles):
                    index = start + np.flatnonzero(good)
                    yield TileBatch(tiles, index, self.grid.coords[index])
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self, pool: ThreadPoolExecutor, start: int) -> tuple[np.ndarray, list[Future[list[float]]]]:
        coords = self.grid.coords[start : start + self.batch_size]
        tiles = np.empty((len(coords), self.grid.tile_px, self.grid.tile_px, 3), np.uint8)
        runs = range(0, len(coords), _RUN)
        return tiles, [pool.submit(self._read_run, coords[i : i + _RUN], tiles[i : i + _RUN]) for i in runs]

    def _read_run(self, coords: np.ndarray, out: np.ndarray) -> list[float]:
        return [self._read(x, y, tile) for (x, y), tile in zip(coords.tolist(), out, strict=True)]

    def _read(self, x: int, y: int, out: np.ndarray) -> float:
        try:
            read_tile(self.slide, self.grid, x, y, out)
        except LongslideError:
            return float("nan")
        return blur_of(out)

    def _count_bad(self, rows: np.ndarray) -> None:
        self.bad_tiles += [(x, y) for x, y in self.grid.coords[rows].tolist()]
        if len(self.bad_tiles) > self.max_bad_tiles:
            first = ", ".join(map(str, self.bad_tiles[:3]))
            raise LongslideError(
                f"{self.slide.path}: {len(self.bad_tiles)} unreadable tiles (first at {first}, level-0 pixels), more "
                f"than --max-bad-tiles {self.max_bad_tiles}; copy the slide again, or allow more"
            )


def read_tile(slide: Slide, grid: Grid, x: int, y: int, out: np.ndarray) -> None:
    """Read one tile of a grid.

    Args:
        slide: The slide.
        grid: The grid: it says from which level.
        x: Left edge in level-0 pixels.
        y: Top edge in level-0 pixels.
        out: `(tile_px, tile_px, 3)` uint8, where the pixels go.

    Raises:
        LongslideError: It cannot be read.
    """
    region = slide.read_region(x, y, grid.level, grid.read_px, grid.read_px)
    if grid.read_px == grid.tile_px:
        out[...] = region
    else:  # the mean over each pixel's area: no aliasing, no shift of half a pixel
        cv2.resize(region, (grid.tile_px, grid.tile_px), dst=out, interpolation=cv2.INTER_AREA)
