"""Native tiles of a TIFF file that have no bytes although there was something: lost, not empty.

A tile with neither bytes nor a place in the file is empty: scanners leave out what they did not scan. One with a place and
no bytes, or with bytes and no place, is not what a writer wrote; nor is an empty one where another level shows something.
"""

from collections.abc import Callable

import cv2
import numpy as np

from .native_tiles import DamagedTileError, NativeTiles

_LARGEST = 4096  # edge of the square that has as many pixels as are read of another level at most
_DARKER = 40  # grey levels below the light of the slide from which on a pixel shows something
_BLACK = 16  # below it nothing was scanned
_SHARE = 0.15  # of a tile's area that shows something: more than what bleeds over its border
_FLAT = 3  # standard deviation of grey levels below which an area was filled, not scanned

Tile = Callable[[int, int, int], np.ndarray | None]


def lost_tiles(tiles: tuple[NativeTiles, ...], tile: Tile, *, aperio: bool) -> list[np.ndarray | None]:
    """Which native tiles are lost.

    Args:
        tiles: The native tiles of each level, finest first.
        tile: Gives the pixels of a tile of a level, column and row; None of an empty one. Raises `DamagedTileError`.
        aperio: Whether the file is Aperio's, whose scanners write some empty tiles with a place.

    Returns:
        For each level `(rows, columns)` bool; None for one of which no tile is lost.
    """
    found: list[np.ndarray | None] = []
    for level, native in enumerate(tiles):
        grids = (native.planes, native.rows, native.columns)
        bytes_, placed = native.counts.reshape(grids) > 0, native.offsets.reshape(grids) > 0
        lost = np.asarray((bytes_ & ~placed).any(0) | (bytes_.any(0) & ~bytes_.all(0)))
        empty = np.asarray(~bytes_.any(0))
        if empty.any():
            shown = _shown_elsewhere(tiles, level, empty, tile)
            placed_without_bytes = empty & placed.any(0)
            lost |= shown == 1
            lost |= placed_without_bytes & (shown != 0) if aperio else placed_without_bytes
        found.append(lost if lost.any() else None)
    return found


def placed_and_empty(native: NativeTiles, lost: np.ndarray | None) -> int:
    """How many tiles of a level have a place and no bytes, and are not lost."""
    grids = (native.planes, native.rows, native.columns)
    found = (native.counts.reshape(grids) == 0).all(0) & (native.offsets.reshape(grids) > 0).any(0)
    return int((found if lost is None else found & ~lost).sum())


def _shown_elsewhere(tiles: tuple[NativeTiles, ...], level: int, empty: np.ndarray, tile: Tile) -> np.ndarray:
    """`(rows, columns)` int8: 1 where another level shows something at the place of an empty tile, 0 where not, else -1."""
    native = tiles[level]
    shown = np.full(empty.shape, -1, np.int8)
    others = [i for i, one in enumerate(tiles) if i != level and one.width * one.height <= _LARGEST**2]
    if not others:
        return shown
    other = next(
        (i for i in others if i > level), others[-1]
    )  # the finest of the coarser ones, else the next finer one
    grey, known = _picture(tiles[other], lambda column, row: tile(other, column, row))
    if not known.any():
        return shown
    white = float(np.percentile(grey[known][:: max(1, int(known.sum()) // 1_000_000)], 95))
    something = known & (grey < white - _DARKER) & (grey >= _BLACK)
    scale = np.array([grey.shape[1] / native.width, grey.shape[0] / native.height])
    size = np.array([native.tile_width, native.tile_height])
    rows, columns = np.nonzero(empty)
    corners = np.stack([columns, rows], 1) * size
    low = np.ceil(corners * scale).astype(int) + 1  # without what bleeds over the border
    high = np.floor(np.minimum(corners + size, [native.width, native.height]) * scale).astype(int) - 1
    large = (high - low >= 2).all(1)
    rows, columns, low, high = rows[large], columns[large], low[large], high[large]

    def mean(values: np.ndarray) -> np.ndarray:
        total = cv2.integral(values.astype(np.float64))
        (x0, y0), (x1, y1) = low.T, high.T
        return np.asarray((total[y1, x1] - total[y0, x1] - total[y1, x0] + total[y0, x0]) / ((x1 - x0) * (y1 - y0)))

    spread = np.sqrt(np.maximum(0, mean(grey.astype(np.float64) ** 2) - mean(grey) ** 2))
    answer = ((mean(something) > _SHARE) & (spread > _FLAT)).astype(np.int8)
    shown[rows, columns] = np.where(mean(known) > 0.5, answer, np.int8(-1))
    return shown


def _picture(native: NativeTiles, tile: Callable[[int, int], np.ndarray | None]) -> tuple[np.ndarray, np.ndarray]:
    """`(h, w)` uint8, the darkest colour of each pixel of a level; and bool, whether the file has it."""
    height, width = native.rows * native.tile_height, native.columns * native.tile_width
    grey, known = np.full((height, width), 255, np.uint8), np.zeros((height, width), bool)
    for row in range(native.rows):
        for column in range(native.columns):
            try:
                pixels = tile(column, row)
            except (DamagedTileError, OSError):
                continue
            if pixels is not None:
                y, x = row * native.tile_height, column * native.tile_width
                place = slice(y, y + len(pixels)), slice(x, x + native.tile_width)
                grey[place] = pixels.min(-1)
                known[place] = True
    return grey[: native.height, : native.width], known[: native.height, : native.width]
