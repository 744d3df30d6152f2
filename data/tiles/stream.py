"""Tiles of slides as uint8 batches, read ahead: across the borders of slides, too."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np

from ...errors import LongslideError
from ...plurals import count
from ..slides.slide import Slide
from .grid import Grid
from .pool import TilePool
from .readers import READING_BATCH, PendingTiles, TileReaders

T = TypeVar("T")


def _nothing() -> None:
    pass


@dataclass(frozen=True, repr=False)
class TileBatch:
    """Some tiles of a slide.

    Attributes:
        tiles: `(B, tile_px, tile_px, 3)` uint8 RGB.
        index: `(B,)` int64 rows of the grid's `coords`.
        coords: `(B, 2)` int64 top-left corners (x, y) in level-0 pixels.
        release: To be called when the tiles are not needed any more, by who reads slides by `read_slides`.
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
        threads: Threads that read; None for one on each core, at most 16.
        read_ahead: Batches read ahead.
        max_bad_tiles: Unreadable tiles that are tolerated; they are left out of the batches.
        max_blur: Tiles more blurred than this are left out too; see `blur_of`.
        timeout: Seconds that a batch may take; None for any number.

    Attributes:
        bad_tiles: (x, y) in level-0 pixels of the unreadable tiles met so far.
        blur: `(N,)` float32, how blurred each tile of the grid is; NaN where it is unreadable or not read yet.
    """

    def __init__(
        self,
        slide: Slide,
        grid: Grid,
        *,
        batch_size: int = READING_BATCH,
        threads: int | None = None,
        read_ahead: int = 4,
        max_bad_tiles: int = 0,
        max_blur: float = 1.0,
        timeout: float | None = None,
    ) -> None:
        self.slide = slide
        self.grid = grid
        self.batch_size = batch_size
        self.threads = threads
        self.read_ahead = read_ahead
        self.max_bad_tiles = max_bad_tiles
        self.max_blur = max_blur
        self.timeout = timeout
        self.bad_tiles: list[tuple[int, int]] = []
        self.blur = np.full(len(self), np.nan, np.float32)
        self._given_up = False

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
        with TileReaders(self.threads, processes=False) as readers:
            yield from self.read_by(readers)

    def read_by(self, readers: TileReaders | TilePool) -> Iterator[TileBatch]:
        """Read the tiles by what reads for others too; each batch is to be released. Several streams: `read_slides`.

        Raises:
            LongslideError: More than `max_bad_tiles` tiles cannot be read, or a batch takes longer than `timeout`.
        """
        pending: deque[PendingTiles] = deque()
        begun = self.begin(readers)
        try:
            while True:
                pending.extend(islice(begun, self.read_ahead + 1 - len(pending)))
                if not pending:
                    return
                yield from self.take(pending.popleft())
        finally:
            for one in pending:
                one.release()

    def begin(self, readers: TileReaders | TilePool) -> Iterator[PendingTiles]:
        """Begin to read the tiles: a batch whenever the next is asked for, until too many are found unreadable.

        Yields:
            Batches for `take`, in this order.
        """
        self.bad_tiles.clear()
        self.blur[:] = np.nan
        self._given_up = False
        for first in range(0, len(self), self.batch_size):
            if self._given_up:
                return
            yield readers.read(self.slide, self.grid, np.arange(first, min(first + self.batch_size, len(self))))

    def take(self, pending: PendingTiles) -> Iterator[TileBatch]:
        """Wait for tiles, and leave out those that cannot be read or are too blurred.

        Yields:
            One batch; none if nothing is left, or the stream has failed before.

        Raises:
            LongslideError: More than `max_bad_tiles` tiles cannot be read, or a batch takes longer than `timeout`.
        """
        if self._given_up:
            pending.release()
            return
        try:
            tiles, blur = pending.result(self.timeout)
            self.blur[pending.rows] = blur
            if np.isnan(blur).any():
                self._count_bad(pending.rows[np.isnan(blur)])
        except Exception:
            self._given_up = True
            pending.release()
            raise
        good = blur <= self.max_blur
        if good.any():
            index = pending.rows[good]
            yield TileBatch(tiles if good.all() else tiles[good], index, self.grid.coords[index], pending.release)
        else:
            pending.release()

    def _count_bad(self, rows: np.ndarray) -> None:
        self.bad_tiles += [(x, y) for x, y in self.grid.coords[rows].tolist()]
        if len(self.bad_tiles) > self.max_bad_tiles:
            first = ", ".join(map(str, self.bad_tiles[:3]))
            raise LongslideError(
                f"{self.slide.path}: {count(len(self.bad_tiles), 'unreadable tile')} (first at {first}, "
                "level-0 pixels), more "
                f"than --max-bad-tiles {self.max_bad_tiles}; copy the slide again, or allow more"
            )


def read_slides(
    slides: Iterable[tuple[T, TileStream | None]],
    readers: TileReaders,
    patience: float = 0.2,
    stop: Callable[[], None] = lambda: None,
) -> Iterator[tuple[T, TileBatch | Exception | None] | None]:
    """The tiles of slides, one slide after another, of which the next is begun while the last batches of one are awaited.

    Args:
        slides: Each slide with its stream, or None where nothing is to be read. It is asked for in a thread of its own,
            and may wait.
        readers: What reads.
        patience: Seconds to wait for a batch or slide before that is said.
        stop: Called where this is given up, as by Ctrl-C, so that asking for the next slide does not wait any longer.

    Yields:
        A slide with a batch of its tiles, in order, to be released; or with the error that ended it; then with None. None
        alone: nothing is there yet, and that may take a while.

    Raises:
        Exception: What asking for slides raised.
    """
    begun: queue.Queue[tuple[T, TileStream | None, PendingTiles | None] | BaseException | None]
    begun = queue.Queue(max(4, readers.count))
    given_up = threading.Event()

    def put(item: tuple[T, TileStream | None, PendingTiles | None] | BaseException | None) -> bool:
        while not given_up.is_set():
            try:
                begun.put(item, timeout=patience)
            except queue.Full:
                continue
            return True
        return False

    def begin() -> None:
        try:
            for key, stream in slides:
                for pending in () if stream is None else stream.begin(readers):
                    if not put((key, stream, pending)):
                        pending.release()
                        return
                if not put((key, stream, None)):
                    return
            put(None)
        except BaseException as error:  # raised again where the tiles are awaited
            put(error)

    thread = threading.Thread(target=begin, name="read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            try:
                item = begun.get(timeout=patience)
            except queue.Empty:
                yield None
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            key, stream, pending = item
            if stream is None or pending is None:
                yield key, None
            else:
                taken: list[TileBatch | Exception]
                try:
                    taken = [*stream.take(pending)]
                except Exception as error:
                    taken = [error]
                for one in taken:
                    yield key, one
    except BaseException:
        stop()
        raise
    finally:
        given_up.set()
        while thread.is_alive() or not begun.empty():  # it may wait for room, which what is released makes
            try:
                item = begun.get(timeout=0.05)
            except queue.Empty:
                continue
            if isinstance(item, tuple) and item[2] is not None:
                item[2].release()
