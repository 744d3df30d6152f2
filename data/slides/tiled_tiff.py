"""Tiled TIFF files (SVS, generic, Philips, OME, QPTIFF): native tiles read by offset, decoded and put together."""

import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from ...errors import LongslideError
from .base import TIFF_SUFFIXES, VENDOR_SUFFIXES, DeclinedError, SlideReader
from .blend import blend, is_whole, split
from .lost_tiles import lost_tiles, placed_and_empty
from .native_tiles import DamagedTileError
from .openslide import OpenSlideReader
from .tiff import TiffFacts, is_tiff, tiff_facts
from .tiff_levels import Levels, levels_like_openslide, own_levels, with_sub_directories

_PIECE = 4096  # OpenSlide reads larger regions in pieces, and cuts the corner of each to whole level-0 pixels
_CACHED_ROWS = (
    8  # of native tiles, at most: tiles in row-major order find those of the row above, up to a downsample of 6
)
_LEAST_CACHE = 32 * 2**20
_COMPARED_PX = 200  # edge of the regions that are compared with OpenSlide's


class TiledTiffReader(SlideReader):
    """A tiled RGB TIFF file, read several times as fast as by OpenSlide, or in codecs that OpenSlide lacks.

    What OpenSlide reads too has OpenSlide's levels, properties and pixels: regions of every level are compared at opening,
    and a file with another pixel is left to OpenSlide with a remark. A damaged native tile is an error, as for OpenSlide.
    """

    SUFFIXES = TIFF_SUFFIXES | {".svs", ".qptiff"}
    reopens = True

    def __init__(self, path: Path) -> None:
        if not is_tiff(path):
            raise DeclinedError
        self.path = path
        self._lost: list[np.ndarray | None] = []
        self._openslide: OpenSlideReader | None = None
        openslide = _by_openslide(path)
        try:
            levels = self._levels = _find_levels(path, openslide)
            self.dimensions = levels.dimensions[0]
            self.level_dimensions = levels.dimensions
            self.level_downsamples = levels.downsamples
            self.properties = levels.properties
            self.vendor = levels.vendor
            self.background = levels.background
            self.whole_rows = levels.tiles[0].strips
            self._start()
            self._lost = lost_tiles(levels.tiles, self._tile, aperio=self.vendor == "aperio")
            if self.vendor == "aperio" and (blank := placed_and_empty(levels.tiles[0], self._lost[0])):
                self.remark = (
                    f"native tiles without bytes shown as glass, as another level shows nothing there: {blank}"
                )
            if openslide is not None and not self._agrees_with(openslide):
                raise DeclinedError(remark="its native tiles give other pixels than OpenSlide, which reads it")
        except BaseException:
            self.close()
            raise
        finally:
            if openslide is not None:
                openslide.close()

    def _start(self) -> None:
        self._file = self.path.open("rb", buffering=0)
        self._size = os.fstat(self._file.fileno()).st_size
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[int, int, int], np.ndarray | None] = OrderedDict()
        self._cached = 0
        # What is never asked for again would only be memory that the system has to clear: a fifth of the time of a tile.
        rows = max(tiles.columns * tiles.tile_width * tiles.tile_height * 3 for tiles in self._levels.tiles)
        strips = any(tiles.strips for tiles in self._levels.tiles)  # a row of tiles needs many of them
        self._most_cached = self.cache_bytes if strips else max(_LEAST_CACHE, _CACHED_ROWS * rows)

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to this process: another one opens the file again, with the levels found here."""
        own = ("_file", "_size", "_lock", "_cache", "_cached", "_most_cached", "_openslide")
        return {name: value for name, value in vars(self).items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._openslide = None
        self._start()

    def close(self) -> None:
        """Close the file."""
        if hasattr(self, "_file"):  # else it was not opened
            with self._lock:
                self._file.close()
                self._cache.clear()
                self._cached = 0
        if self._openslide is not None:
            self._openslide.close()

    def _by_openslide(self) -> OpenSlideReader:
        with self._lock:
            if self._openslide is None:
                self._openslide = OpenSlideReader(self.path)
            return self._openslide

    def _agrees_with(self, openslide: OpenSlideReader) -> bool:
        """Whether both readers give the same pixels of some regions of each level that both have.

        A region that is damaged for one of them tells nothing: OpenSlide shows some damaged tiles as if they were whole.
        """
        equal = damaged = 0
        for level in range(len(openslide.level_dimensions)):
            if level in self._levels.drawn_by_openslide:
                continue
            for column, row in self._levels.tiles[level].telling():
                tiles = self._levels.tiles[level]
                x = round((column * tiles.tile_width + tiles.tile_width / 2) * self.level_downsamples[level])
                y = round((row * tiles.tile_height + tiles.tile_height / 2) * self.level_downsamples[level])
                try:
                    expected = openslide.read_region(x, y, level, _COMPARED_PX, _COMPARED_PX)
                except LongslideError:
                    continue
                try:
                    pixels = self.read_region(x, y, level, _COMPARED_PX, _COMPARED_PX)
                except LongslideError:
                    damaged += 1
                    continue
                if not np.array_equal(pixels, expected):
                    return False
                equal += 1
        return equal > 0 or not damaged  # with nothing but damage it may be a kind that is not known here

    def read_region(self, x: int, y: int, level: int, width: int, height: int) -> np.ndarray:
        """See `SlideReader.read_region`."""
        out = np.empty((height, width, 3), np.uint8)
        self.read_into(x, y, level, out)
        return out

    def read_into(self, x: int, y: int, level: int, out: np.ndarray) -> None:
        """See `SlideReader.read_into`."""
        height, width = out.shape[:2]
        if level in self._levels.drawn_by_openslide:
            self._by_openslide().read_into(x, y, level, out)
            return
        downsample = self.level_downsamples[level]
        try:
            for top in range(0, height, _PIECE):
                for left in range(0, width, _PIECE):
                    piece = out[top : top + _PIECE, left : left + _PIECE]
                    self._read_piece(int(x + left * downsample), int(y + top * downsample), level, piece)
        except (DamagedTileError, OSError) as error:
            raise LongslideError(
                f"{self.path}: cannot read {width} x {height} px at ({x}, {y}), level {level}: {error}"
            ) from error

    def _read_piece(self, x: int, y: int, level: int, out: np.ndarray) -> None:
        """Read at a place in level-0 pixels, as OpenSlide does: what lies left of or above the slide takes whole pixels."""
        downsample = self.level_downsamples[level]
        blank_x, blank_y = (int(max(0, -corner) / downsample) for corner in (x, y))
        if blank_x or blank_y:
            out[:blank_y] = out[:, :blank_x] = self.background
            out = out[blank_y:, blank_x:]
        if not out.size:
            return
        level_x, level_y = max(0, x) / downsample, max(0, y) / downsample
        if self._levels.rounded or (is_whole(level_x) and is_whole(level_y)):
            self._put_together(level, round(level_x), round(level_y), out, self.background)
            return
        (left, weight_x), (top, weight_y) = split(level_x), split(level_y)
        height, width = out.shape[0] + 1, out.shape[1] + 1
        rgb, alpha = np.empty((height, width, 3), np.uint8), np.zeros((height, width), np.uint8)
        opaque = self._put_together(level, left, top, rgb, (0, 0, 0), alpha)
        pixels = rgb if opaque else np.dstack([rgb, alpha])
        tiles = self._levels.tiles[level]
        tile = tiles.tile_width, tiles.tile_height
        out[...] = blend(pixels, (left, top), (weight_x, weight_y), tile, self.background)

    def _put_together(
        self,
        level: int,
        left: int,
        top: int,
        out: np.ndarray,
        hole: tuple[int, int, int],
        alpha: np.ndarray | None = None,
    ) -> bool:
        """Fill `out` with the pixels of a level, and with `hole` where it has none; whether it has some everywhere.

        `alpha` becomes 255 where there are pixels.
        """
        tiles = self._levels.tiles[level]
        width, height = self.level_dimensions[level]
        right, bottom = min(left + out.shape[1], width), min(top + out.shape[0], height)
        opaque = (right - left, bottom - top) == out.shape[1::-1]
        if not opaque:
            out[max(0, bottom - top) :] = hole
            out[:, max(0, right - left) :] = hole
            if right <= left or bottom <= top:
                return False
        aligned = (left % tiles.tile_width, top % tiles.tile_height) == (0, 0)
        alone = aligned and opaque and out.shape[1::-1] == (tiles.tile_width, tiles.tile_height)
        alone = alone and out.flags.c_contiguous
        for row in range(top // tiles.tile_height, -(-bottom // tiles.tile_height)):
            y = row * tiles.tile_height
            y0, y1 = max(y, top), min(y + tiles.tile_height, bottom)
            for column in range(left // tiles.tile_width, -(-right // tiles.tile_width)):
                x = column * tiles.tile_width
                x0, x1 = max(x, left), min(x + tiles.tile_width, right)
                place = slice(y0 - top, y1 - top), slice(x0 - left, x1 - left)
                tile = self._tile(level, column, row, out if alone else None)
                if tile is None:
                    out[place] = hole
                    opaque = False
                    continue
                if tile is not out:
                    out[place] = tile[y0 - y : y1 - y, x0 - x : x1 - x]
                if alpha is not None:
                    alpha[place] = 255
        return opaque

    def _tile(self, level: int, column: int, row: int, out: np.ndarray | None = None) -> np.ndarray | None:
        """`(tile_height, tile_width, 3)` uint8 pixels of a native tile, None where the file has none.

        With `out` they may go there; they are not kept then, for who reads native tiles as they lie reads each once.
        """
        lost = self._lost[level] if self._lost else None  # not known yet while it is found out
        if lost is not None and lost[row, column]:
            raise DamagedTileError(f"native tile ({column}, {row}): the file has no bytes of it")
        key = (level, column, row)
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        tiles = self._levels.tiles[level]
        try:
            parts = [self._bytes(*part) for part in tiles.parts(column, row)]
            pixels = tiles.decode(parts, out, height=tiles.height_of(row)) if all(parts) else None
        except DamagedTileError as error:
            raise DamagedTileError(f"native tile ({column}, {row}): {error}") from error
        if pixels is not None and pixels is out:
            return out
        with self._lock:
            if key not in self._cache:
                self._cache[key] = pixels
                self._cached += 0 if pixels is None else pixels.nbytes
            while self._cached > min(self.cache_bytes, self._most_cached):
                _, oldest = self._cache.popitem(last=False)
                self._cached -= 0 if oldest is None else oldest.nbytes
        return pixels

    def _bytes(self, offset: int, count: int) -> bytes:
        if count and offset + count > self._size:
            raise DamagedTileError("the file ends before it")
        if self._file.closed:
            raise DamagedTileError("the file is closed")
        if hasattr(os, "pread"):
            read = os.pread(self._file.fileno(), count, offset)
        else:
            with self._lock:
                self._file.seek(offset)
                read = self._file.read(count)
        if len(read) != count:
            raise DamagedTileError("the file ends before it")
        return read


def _by_openslide(path: Path) -> OpenSlideReader | None:
    try:
        return OpenSlideReader(path)
    except (DeclinedError, LongslideError):
        return None


def _find_levels(path: Path, openslide: OpenSlideReader | None) -> Levels:
    try:
        with tifffile.TiffFile(path) as tiff:
            if openslide is None:
                levels = own_levels(tiff, tiff_facts(path) or TiffFacts())
            else:
                levels = levels_like_openslide(tiff, openslide)
                if len(levels.tiles) == 1:
                    levels = with_sub_directories(levels, tiff, tiff_facts(path) or TiffFacts())
    except (DeclinedError, LongslideError):
        raise
    except Exception as error:  # whatever a broken directory makes of the parser
        raise DeclinedError((tiff_facts(path) or TiffFacts()).refusal) from error
    if levels.tiles[0].strips and path.suffix.lower() in VENDOR_SUFFIXES:  # a thumbnail, of a file that is broken
        raise DeclinedError
    end, size = levels.tiles[0].end, path.stat().st_size
    if end > size:
        raise LongslideError(f"{path}: truncated: its pixels end at byte {end:,}, the file at {size:,}; copy it again")
    return levels
