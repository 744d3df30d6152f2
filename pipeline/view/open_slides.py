"""Open slides of a viewer: a few at a time, opened when they are looked at; and their pictures as JPEG."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from ...data.slides.base import MOST_BYTES, recorded_reader
from ...data.slides.slide import Slide, open_slide
from ...errors import LongslideError

TILE_PX = 256
"""Edge of a tile of the deep zoom."""

MOST_OPEN = 4
"""Slides that stay open: each keeps up to 256 MB of decoded tiles."""

PICTURE_BYTES = 256 * 2**20
"""JPEG that are kept."""

OVERVIEW_PX = 2048
"""Edge of the thumbnail from which coarser tiles are cut, so that none needs to read half a slide."""

QUALITY = 85
UNREADABLE_COLOUR = (205, 205, 205)


@dataclass(frozen=True)
class SlideFile:
    """How a slide is opened.

    Attributes:
        path: Its file.
        slide_mpp: Microns per pixel at level 0, if they are given.
        reader: The slide reader by name, if a feature file names it.
    """

    path: Path
    slide_mpp: float | None = None
    reader: str | None = None


@dataclass
class _Open:
    slide: Slide
    version: int
    users: int = 0
    closing: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)
    overview: Image.Image | None = None


class OpenSlides:
    """Slides that are opened when they are asked for and closed when others are; used by several threads at once."""

    def __init__(self) -> None:
        self._open: OrderedDict[SlideFile, _Open] = OrderedDict()
        self._opening: dict[SlideFile, threading.Lock] = {}
        self._lock = threading.Lock()
        self._pictures: OrderedDict[tuple[object, ...], bytes] = OrderedDict()
        self._picture_bytes = 0

    def close(self) -> None:
        """Close all slides."""
        with self._lock:
            while self._open:
                self._retire(self._open.popitem()[1])

    @contextmanager
    def slide(self, file: SlideFile) -> Iterator[Slide]:
        """An open slide, while the context lasts.

        Raises:
            LongslideError: It cannot be opened, or is not there any more.
        """
        with self._used(file) as one:
            yield one.slide

    def version(self, file: SlideFile) -> int:
        """Changes when the file is written anew.

        Raises:
            LongslideError: It is not there.
        """
        return _version(file.path)

    def tile(self, file: SlideFile, level: int, column: int, row: int) -> bytes | None:
        """A tile of the deep zoom as JPEG, of `TILE_PX` or, at the right and lower edge, less.

        Args:
            file: The slide.
            level: Level of the deep zoom: `levels` of a slide is the finest, at each lower one both edges are half as long.
            column: Column of the tile.
            row: Row of the tile.

        Returns:
            The JPEG; None if there is no such tile.

        Raises:
            LongslideError: The slide cannot be opened.
        """
        with self._used(file) as one:
            return self._picture((file, one.version, level, column, row), lambda: _tile(one, level, column, row))

    def region(self, file: SlideFile, x: int, y: int, size: int, px: int) -> bytes:
        """A square of a slide as JPEG.

        Args:
            file: The slide.
            x: Left edge in level-0 pixels.
            y: Top edge in level-0 pixels.
            size: Edge in level-0 pixels.
            px: Edge of the picture.

        Raises:
            LongslideError: The slide cannot be opened.
        """
        with self._used(file) as one:
            picture = self._picture((file, one.version, x, y, size, px), lambda: _square(one, x, y, size, px))
            assert picture is not None
            return picture

    def thumbnail(self, file: SlideFile, px: int) -> bytes:
        """A slide's thumbnail as JPEG, with no edge longer than `px`.

        Raises:
            LongslideError: The slide cannot be opened, or nothing of it can be read.
        """
        with self._used(file) as one:
            picture = self._picture((file, one.version, px), lambda: _jpeg(one.slide.thumbnail(px)))
            assert picture is not None
            return picture

    @contextmanager
    def _used(self, file: SlideFile) -> Iterator[_Open]:
        version = _version(file.path)
        with self._lock:
            opening = self._opening.setdefault(file, threading.Lock())
        with opening:
            one = self._kept(file, version)
            if one is None:
                slide = open_slide(file.path, slide_mpp=file.slide_mpp, reader=recorded_reader(file.reader))
                one = _Open(slide, version, users=1)
                with self._lock:
                    self._open[file] = one
                    self._make_room(file)
        try:
            yield one
        finally:
            with self._lock:
                one.users -= 1
                if one.closing and not one.users:
                    one.slide.close()

    def _kept(self, file: SlideFile, version: int) -> _Open | None:
        """The open slide, in use from now on, so that no other closes it; None if it is not open as it is now."""
        with self._lock:
            one = self._open.get(file)
            if one is not None and one.version != version:  # written anew since
                self._retire(self._open.pop(file))
                one = None
            if one is not None:
                self._open.move_to_end(file)
                one.users += 1
            return one

    def _make_room(self, kept: SlideFile) -> None:
        def too_much() -> bool:
            return (
                len(self._open) > MOST_OPEN or sum(one.slide.memory_bytes for one in self._open.values()) > MOST_BYTES
            )

        for file in [file for file in self._open if file != kept]:
            if too_much():
                self._retire(self._open.pop(file))

    @staticmethod
    def _retire(one: _Open) -> None:
        one.closing = True
        if not one.users:
            one.slide.close()

    def _picture(self, key: tuple[object, ...], draw: Callable[[], bytes | None]) -> bytes | None:
        with self._lock:
            if (known := self._pictures.get(key)) is not None:
                self._pictures.move_to_end(key)
                return known
        drawn = draw()
        if drawn is not None:
            with self._lock:
                self._picture_bytes += len(drawn) - len(self._pictures.get(key, b""))
                self._pictures[key] = drawn
                while self._picture_bytes > PICTURE_BYTES:
                    self._picture_bytes -= len(self._pictures.popitem(last=False)[1])
        return drawn


def finest_level(dimensions: tuple[int, int]) -> int:
    """The level of the deep zoom that has the pixels of level 0: at level 0 the slide is one pixel."""
    return max(1, max(dimensions) - 1).bit_length()


def _version(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError as error:
        raise LongslideError(f"{path}: the slide cannot be opened ({error.strerror}); was it moved?") from error


def _tile(one: _Open, level: int, column: int, row: int) -> bytes | None:
    width, height = one.slide.dimensions
    finest = finest_level(one.slide.dimensions)
    if not 0 <= level <= finest:
        return None
    downsample = 2 ** (finest - level)
    level_width, level_height = -(-width // downsample), -(-height // downsample)
    left, top = column * TILE_PX, row * TILE_PX
    px_wide, px_high = min(TILE_PX, level_width - left), min(TILE_PX, level_height - top)
    if min(left, top) < 0 or min(px_wide, px_high) <= 0:
        return None
    return _jpeg(_pixels(one, left * downsample, top * downsample, downsample, px_wide, px_high))


def _square(one: _Open, x: int, y: int, size: int, px: int) -> bytes:
    return _jpeg(_pixels(one, x, y, size / px, px, px))


def _pixels(one: _Open, x: int, y: int, downsample: float, width: int, height: int) -> np.ndarray:
    """`(height, width, 3)` pixels from (x, y) of level 0 on, each of `downsample` level-0 pixels."""
    slide = one.slide
    if downsample > max(slide.bounds[2:]) / OVERVIEW_PX:
        return _of_overview(one, x, y, downsample, width, height)
    level = max(
        (level for level in slide.trusted_levels if slide.level_downsamples[level] <= downsample * 1.01), default=0
    )
    scale = downsample / slide.level_downsamples[level]
    read = max(1, round(width * scale)), max(1, round(height * scale))
    try:
        region = slide.read_region(x, y, level, *read)
    except LongslideError:
        return _unreadable(width, height)
    if read == (width, height):
        return region
    shrinking = cv2.INTER_AREA if scale > 1 else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(region, (width, height), interpolation=shrinking))


def _of_overview(one: _Open, x: int, y: int, downsample: float, width: int, height: int) -> np.ndarray:
    slide = one.slide
    with one.lock:
        if one.overview is None:
            one.overview = Image.fromarray(slide.thumbnail(OVERVIEW_PX))
    left, top, *size = slide.bounds
    scale = np.array(one.overview.size) / size  # pixels of the overview per level-0 pixel
    picture = np.full((height, width, 3), slide.background, np.uint8)
    # Whole pixels of the tile that the overview covers, and what of the overview they show.
    first = np.clip(np.ceil((np.array([left, top]) - (x, y)) / downsample), 0, (width, height)).astype(int)
    end = np.array([left, top]) + size - (x, y)
    last = np.clip(np.ceil(end / downsample), 0, (width, height)).astype(int)
    if (last <= first).any():
        return picture
    box_from = np.maximum((first * downsample + (x, y) - (left, top)) * scale, 0)
    box_to = np.minimum((last * downsample + (x, y) - (left, top)) * scale, one.overview.size)
    columns, rows = (last - first).tolist()
    box = (*box_from.tolist(), *np.maximum(box_to, box_from + 1e-3).tolist())
    part = one.overview.resize((columns, rows), Image.Resampling.BOX, box=box)
    picture[first[1] : last[1], first[0] : last[0]] = np.asarray(part)
    return picture


def _unreadable(width: int, height: int) -> np.ndarray:
    """Hatched, so that nobody takes damage for glass."""
    picture = np.full((height, width, 3), 255, np.uint8)
    rows, columns = np.indices((height, width))
    picture[(rows + columns) % 16 < 4] = UNREADABLE_COLOUR
    return picture


def _jpeg(pixels: np.ndarray) -> bytes:
    encoded: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=QUALITY, colorsubsampling="420")
    return encoded
