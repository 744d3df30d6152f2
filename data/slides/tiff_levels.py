"""The pyramid of a tiled TIFF file: which pages are its levels, and what it says of itself."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import tifffile

from .base import DeclinedError
from .native_tiles import NativeTiles
from .openslide import OpenSlideReader
from .tiff import TiffFacts, white_of

CHECKED_VENDORS = ("aperio", "generic-tiff", "philips")
"""Kinds, by OpenSlide's names, in which the native tiles of a level lie edge to edge from its corner."""

_REDUCED = 1  # bit of NewSubfileType


@dataclass(frozen=True)
class Levels:
    """A pyramid, finest level first.

    Attributes:
        tiles: The native tiles of each level.
        dimensions: (width, height) of each level in pixels: not more than its native tiles have.
        downsamples: Level-0 pixels per pixel of each level.
        properties: What the file says of itself, under OpenSlide's names.
        vendor: Name of the format.
        background: RGB shown where the slide has no pixels.
        rounded: Whether places between the pixels of a level are rounded, for OpenSlide does not blend here.
        drawn_by_openslide: Levels with missing tiles that OpenSlide draws from finer levels.
    """

    tiles: tuple[NativeTiles, ...]
    dimensions: tuple[tuple[int, int], ...]
    downsamples: tuple[float, ...]
    properties: Mapping[str, str]
    vendor: str
    background: tuple[int, int, int] = (255, 255, 255)
    rounded: bool = False
    drawn_by_openslide: frozenset[int] = frozenset()


def levels_like_openslide(tiff: tifffile.TiffFile, openslide: OpenSlideReader) -> Levels:
    """The levels that OpenSlide finds in a file.

    Raises:
        DeclinedError: It is of a kind that is not known here, or its pages are not OpenSlide's levels.
    """
    if openslide.vendor not in CHECKED_VENDORS:
        raise DeclinedError
    pages = [page for page in tiff.pages if isinstance(page, tifffile.TiffPage) and page.is_tiled]
    if openslide.vendor == "generic-tiff":
        pages = [page for page in pages if page.index == 0 or page.subfiletype & _REDUCED]
        pages.sort(key=lambda page: -page.imagewidth)
    dimensions = openslide.level_dimensions
    if len(pages) != len(dimensions):
        raise DeclinedError
    levels = tuple(NativeTiles.of(page) for page in pages)
    for level, (width, height) in zip(levels, dimensions, strict=True):
        padded = openslide.vendor == "philips" and level.width >= width and level.height >= height
        if not padded and (level.width, level.height) != (width, height):
            raise DeclinedError
    missing = [i for i, level in enumerate(levels) if (level.counts == 0).any()] if openslide.vendor == "aperio" else []
    return Levels(
        tiles=levels,
        dimensions=dimensions,
        downsamples=openslide.level_downsamples,
        properties=openslide.properties,
        vendor=openslide.vendor,
        background=openslide.background,
        drawn_by_openslide=frozenset(range(max(1, missing[0]), len(levels))) if missing else frozenset(),
    )


def own_levels(tiff: tifffile.TiffFile, facts: TiffFacts) -> Levels:
    """The levels of the largest picture of a file, which may stand in sub-directories (OME-TIFF).

    Raises:
        DeclinedError: It is not an RGB picture of a kind that is read here.
    """
    series = max(tiff.series, key=lambda one: one.keyframe.imagewidth * one.keyframe.imagelength)
    pages = [level.keyframe for level in series.levels if len(level.pages) == 1]
    first = tiff.is_ome or (pages and pages[0].index == 0)  # else the page of level 0 is broken, and this a reduced one
    if not pages or pages[0] is not series.keyframe or pages[0].subfiletype & _REDUCED or not first:
        raise DeclinedError(facts.refusal)
    levels = tuple(NativeTiles.of(page, white_of(tiff)) for page in pages)
    properties = {}
    for axis, code, mpp in zip("XY", (282, 283), facts.mpp or ("", ""), strict=True):
        if mpp:
            properties[f"openslide.mpp-{axis.lower()}"] = mpp
        numerator, denominator = pages[0].tags.valueof(code, (0, 1))
        if numerator and denominator:
            properties[f"tiff.{axis}Resolution"] = repr(numerator / denominator)
    unit = int(pages[0].tags.valueof(296, 2))
    properties["tiff.ResolutionUnit"] = {2: "inch", 3: "centimeter"}.get(unit, "none")
    width, height = levels[0].width, levels[0].height
    return Levels(
        tiles=levels,
        dimensions=tuple((level.width, level.height) for level in levels),
        downsamples=tuple((width / level.width + height / level.height) / 2 for level in levels),
        properties=properties,
        vendor="ome-tiff" if tiff.is_ome else "qptiff" if tiff.is_qpi else "tiff",
        rounded=True,
    )


def with_sub_directories(levels: Levels, tiff: tifffile.TiffFile, facts: TiffFacts) -> Levels:
    """A single level of OpenSlide's, with the reduced ones in sub-directories of the file, which OpenSlide passes over."""
    try:
        own = own_levels(tiff, facts)
    except DeclinedError:
        return levels
    if own.dimensions[0] != levels.dimensions[0]:
        return levels
    return replace(levels, tiles=own.tiles, dimensions=own.dimensions, downsamples=own.downsamples, rounded=True)
