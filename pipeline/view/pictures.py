"""Pictures of slides as JPEG: what a process of the viewer does, which keeps a few slides open."""

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from ...data.slides.base import MOST_BYTES, SlideReader
from ...data.slides.slide import Slide, open_slide
from ...errors import LongslideError

TILE_PX = 256
"""Edge of a tile of the deep zoom."""

MOST_OPEN = 2
"""Slides that a process keeps open."""

CACHE_BYTES = 128 * 2**20
"""Decoded native tiles that an open slide keeps."""

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
        reader: The slide reader, if a feature file names it: its name there, or its class.
        version: Differs when the file is written anew.
    """

    path: Path
    slide_mpp: float | None = None
    reader: str | type[SlideReader] | None = None
    version: int = 0


@dataclass(frozen=True)
class SlideFacts:
    """What the page says of a slide's file.

    Attributes:
        dimensions: (width, height) of level 0 in pixels.
        bounds: (x, y, width, height) of what was scanned, in level-0 pixels.
        vendor: Name of the format.
        mpp: Microns per pixel at level 0; None if they are not known.
        mpp_source: Where they come from, or why they are not known.
        memory_bytes: Memory that it takes while it is open.
    """

    dimensions: tuple[int, int]
    bounds: tuple[int, int, int, int]
    vendor: str
    mpp: float | None
    mpp_source: str
    memory_bytes: int


@dataclass
class _Open:
    slide: Slide
    overview: Image.Image | None = None


_open_slides: OrderedDict[SlideFile, _Open] = OrderedDict()
"""Those of this process, which is asked for one thing at a time; the last one used is the last."""


def look(file: SlideFile) -> SlideFacts:
    """Open a slide and say what it is.

    Raises:
        LongslideError: It cannot be opened.
    """
    slide = _opened(file).slide
    try:
        mpp, source = slide.mpp.value, slide.mpp.source
    except LongslideError as error:
        return SlideFacts(slide.dimensions, slide.bounds, slide.vendor, None, str(error), slide.memory_bytes)
    return SlideFacts(slide.dimensions, slide.bounds, slide.vendor, mpp, source, slide.memory_bytes)


def tile(file: SlideFile, level: int, column: int, row: int) -> bytes | None:
    """A tile of the deep zoom as JPEG, of `TILE_PX` or, at the right and lower edge, less.

    Args:
        file: The slide.
        level: Level of the deep zoom: `finest_level` is the finest, at each lower one both edges are half as long.
        column: Column of the tile.
        row: Row of the tile.

    Returns:
        The JPEG; None if there is no such tile.

    Raises:
        LongslideError: The slide cannot be opened.
    """
    return _tile(_opened(file), level, column, row)


def region(file: SlideFile, x: int, y: int, size: int, px: int) -> bytes:
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
    return _jpeg(_pixels(_opened(file), x, y, size / px, px, px))


def thumbnail(file: SlideFile, px: int) -> bytes:
    """A slide's thumbnail as JPEG, with no edge longer than `px`.

    Raises:
        LongslideError: The slide cannot be opened, or nothing of it can be read.
    """
    return _jpeg(_opened(file).slide.thumbnail(px))


def tissue(file: SlideFile) -> str:
    """The contours of a slide's tissue by the default segmenter, as GeoJSON in level-0 pixels.

    Raises:
        LongslideError: The slide cannot be opened, or its tissue not be found.
    """
    return _opened(file).slide.tissue().to_geojson()


def close_all() -> None:
    """Close the slides of this process."""
    while _open_slides:
        _open_slides.popitem()[1].slide.close()


def finest_level(dimensions: tuple[int, int]) -> int:
    """The level of the deep zoom that has the pixels of level 0: at level 0 the slide is one pixel."""
    return max(1, max(dimensions) - 1).bit_length()


def is_of_overview(facts: SlideFacts, level: int) -> bool:
    """Whether tiles of a level of the deep zoom are cut from the overview."""
    return level <= finest_level(facts.dimensions) and _is_coarse(
        facts.bounds, 2 ** (finest_level(facts.dimensions) - level)
    )


def _is_coarse(bounds: tuple[int, int, int, int], downsample: float) -> bool:
    return downsample > max(bounds[2:]) / OVERVIEW_PX


def _opened(file: SlideFile) -> _Open:
    if file not in _open_slides:
        for other in [other for other in _open_slides if other.path == file.path]:  # written anew since
            _open_slides.pop(other).slide.close()
        SlideReader.cache_bytes = CACHE_BYTES
        slide = open_slide(file.path, slide_mpp=file.slide_mpp, reader=file.reader)
        _open_slides[file] = _Open(slide)
        while len(_open_slides) > 1 and (
            len(_open_slides) > MOST_OPEN or sum(one.slide.memory_bytes for one in _open_slides.values()) > MOST_BYTES
        ):
            _open_slides.popitem(last=False)[1].slide.close()
    _open_slides.move_to_end(file)
    return _open_slides[file]


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


def _pixels(one: _Open, x: int, y: int, downsample: float, width: int, height: int) -> np.ndarray:
    """`(height, width, 3)` pixels from (x, y) of level 0 on, each of `downsample` level-0 pixels."""
    slide = one.slide
    if _is_coarse(slide.bounds, downsample):
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
