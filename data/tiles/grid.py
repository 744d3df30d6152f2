"""The tile grid of a slide: level choice, tile size in level-0 pixels, coordinates of the tiles on tissue."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import LongslideError
from ..slides.slide import Slide
from ..tissue.base import Tissue

LEVEL_TOLERANCE = 0.01
"""A level this close to the wanted resolution is read as it is: real pyramids have downsamples of 3.9999 and 4.0161,
and a scanner's 0.499 um/px is meant to be 0.5. At 256 px the far edge of a tile is then at most 2.6 px off; the grid
never drifts, because its step is that of the tiles actually read."""


MIN_TISSUE = 0.1
"""Smallest share of a tile that must be tissue, by default."""


@dataclass(frozen=True)
class Grid:
    """Where the tiles of a slide are, and how they are read.

    Attributes:
        tile_px: Edge of a tile in pixels, at the target resolution.
        overlap: Pixels that neighbouring tiles share, at the target resolution.
        tile_mpp: Microns per pixel of the tiles.
        slide_mpp: Microns per pixel of level 0.
        level: Pyramid level the tiles are read from.
        read_px: Edge of the region read at that level; `tile_px` when it is not resampled.
        tile_size_level0: Edge of a tile in level-0 pixels.
        step_level0: Distance between tiles in level-0 pixels.
        coords: `(N, 2)` int64 top-left corners (x, y) in level-0 pixels, row by row.
        tissue_fraction: `(N,)` float32, the share of each tile that is tissue.
    """

    tile_px: int
    overlap: int
    tile_mpp: float
    slide_mpp: float
    level: int
    read_px: int
    tile_size_level0: int
    step_level0: int
    coords: np.ndarray
    tissue_fraction: np.ndarray

    @property
    def cells(self) -> np.ndarray:
        """`(N, 2)` int64 (column, row) of each tile."""
        return self.coords // self.step_level0

    def custom_downsample(self, level_downsamples: Sequence[float]) -> float:
        """How much coarser the tiles are than the level they are read from: 1 where they are not resampled."""
        return self.tile_size_level0 / (self.tile_px * level_downsamples[self.level])


def grid_of_tiles(
    slide: Slide,
    coords: np.ndarray,
    *,
    tile_px: int,
    tile_size_level0: int,
    step_level0: int,
    overlap: int = 0,
    level: int | None = None,
) -> Grid:
    """The grid of tiles that are known, such as those of a feature file: it reads the pixels that its encoder saw.

    Args:
        slide: The slide.
        coords: `(N, 2)` top-left corners (x, y) in level-0 pixels.
        tile_px: Edge of a tile in pixels.
        tile_size_level0: Edge of a tile in level-0 pixels.
        step_level0: Distance between tiles in level-0 pixels.
        overlap: Pixels that neighbouring tiles share.
        level: Pyramid level they are read from. Default: as `make_grid` chooses it.

    Raises:
        LongslideError: The slide has no microns per pixel, or no such level, or tiles lie outside it.
    """
    slide_mpp = slide.mpp.value
    downsample = tile_size_level0 / tile_px
    if level is None:
        level = _choose_level(slide, downsample, tile_px, downsample * slide_mpp)[0]
    if not 0 <= level < len(slide.level_downsamples):
        raise LongslideError(
            f"{slide.path}: no level {level}, from which its tiles were read: is it another slide of this name?"
        )
    if len(coords) and ((coords < 0).any() or (coords >= slide.dimensions).any()):
        raise LongslideError(f"{slide.path}: tiles lie outside its {slide.dimensions[0]} x {slide.dimensions[1]} px")
    level_downsample = slide.level_downsamples[level]
    read_px = (
        tile_px if round(tile_px * level_downsample) == tile_size_level0 else round(tile_size_level0 / level_downsample)
    )
    return Grid(
        tile_px=tile_px,
        overlap=overlap,
        tile_mpp=downsample * slide_mpp,
        slide_mpp=slide_mpp,
        level=level,
        read_px=read_px,
        tile_size_level0=tile_size_level0,
        step_level0=step_level0,
        coords=np.asarray(coords, np.int64),
        tissue_fraction=np.ones(len(coords), np.float32),
    )


def make_grid(
    slide: Slide,
    tissue: Tissue,
    *,
    tile_mpp: float = 0.5,
    tile_px: int = 256,
    overlap: int = 0,
    min_tissue: float = MIN_TISSUE,
) -> Grid:
    """Lay a grid over a slide from its top-left corner and keep the tiles that show tissue.

    A tile that crosses the right or bottom border is kept when enough of its whole area is tissue; its outside is
    background. Tiles that touch an area of which a thumbnail could read nothing are kept too.

    Args:
        slide: The slide.
        tissue: Its tissue.
        tile_mpp: Microns per pixel of the tiles.
        tile_px: Edge of a tile in pixels.
        overlap: Pixels that neighbouring tiles share.
        min_tissue: Smallest share of a tile that must be tissue, 0 to 1; at 0 every tile that touches tissue is kept.

    Returns:
        The grid; with no coordinates when there is no tissue.

    Raises:
        LongslideError: The slide is smaller than one tile or coarser than `tile_mpp`, or has no microns per pixel; the
            overlap is not smaller than a tile.
    """
    if not 0 <= overlap < tile_px:
        raise LongslideError(f"the overlap of {overlap} px must be at least 0 and less than --tile-px {tile_px}")
    slide_mpp = slide.mpp.value
    wanted = tile_mpp / slide_mpp
    level, read_px, tile_size = _choose_level(slide, wanted, tile_px, tile_mpp)
    step = max(1, round(tile_size * (tile_px - overlap) / tile_px))
    width, height = slide.dimensions
    if min(width, height) < tile_size:
        raise LongslideError(
            f"{slide.path}: {width} x {height} px is smaller than one tile of {tile_px} px at {tile_mpp:g} um/px "
            f"({tile_size} px here); use a smaller --tile-px or --tile-mpp"
        )
    columns, rows = -(-width // step), -(-height // step)
    fraction = _tissue_fraction(tissue, step, tile_size, columns, rows)
    # Nobody knows what is in an area that could not be read: its tiles are tried, and counted where they cannot be read.
    unknown = _touching(slide.unreadable_areas, step, tile_size, columns, rows)
    row, column = np.nonzero(((fraction >= min_tissue) & (fraction > 0)) | unknown)
    coords = np.stack([column, row], axis=1).astype(np.int64) * step
    return Grid(
        tile_px=tile_px,
        overlap=overlap,
        tile_mpp=tile_mpp,
        slide_mpp=slide_mpp,
        level=level,
        read_px=read_px,
        tile_size_level0=tile_size,
        step_level0=step,
        coords=coords,
        tissue_fraction=fraction[row, column].astype(np.float32),
    )


def _choose_level(slide: Slide, wanted: float, tile_px: int, tile_mpp: float) -> tuple[int, int, int]:
    """Level, edge to read there, edge in level-0 pixels."""
    levels = slide.trusted_levels
    closest = min(levels, key=lambda i: abs(slide.level_downsamples[i] / wanted - 1))
    if abs(slide.level_downsamples[closest] / wanted - 1) <= LEVEL_TOLERANCE:
        return closest, tile_px, round(tile_px * slide.level_downsamples[closest])
    finer = [i for i in levels if slide.level_downsamples[i] < wanted]
    if not finer:
        raise LongslideError(
            f"{slide.path}: level 0 has {slide.mpp.value:g} um/px, coarser than the {tile_mpp:g} asked for; "
            "use a larger --tile-mpp, or give the right one with --slide-mpp"
        )
    level = max(finer, key=lambda i: slide.level_downsamples[i])
    tile_size = round(tile_px * wanted)
    return level, round(tile_size / slide.level_downsamples[level]), tile_size


def _touching(areas: set[tuple[int, int, int, int]], step: int, tile_size: int, columns: int, rows: int) -> np.ndarray:
    """`(rows, columns)` bool: the tiles that have a pixel in one of the areas."""
    touching = np.zeros((rows, columns), bool)
    for x, y, width, height in areas:
        first_column, first_row = (max(0, (start - tile_size) // step + 1) for start in (x, y))
        touching[first_row : -(-(y + height) // step), first_column : -(-(x + width) // step)] = True
    return touching


def _tissue_fraction(tissue: Tissue, step: int, tile_size: int, columns: int, rows: int) -> np.ndarray:
    """`(rows, columns)` share of each tile that is tissue, exactly: the mask's pixels count by their area inside."""
    height, width = tissue.mask.shape
    integral = np.zeros((height + 1, width + 1))
    integral[1:, 1:] = tissue.mask.cumsum(0, dtype=np.float64).cumsum(1)
    x = _interpolation(step, tile_size, columns, tissue.origin[0], tissue.downsample[0], width)
    y = _interpolation(step, tile_size, rows, tissue.origin[1], tissue.downsample[1], height)
    return np.asarray(y @ integral @ x.T) * tissue.downsample[0] * tissue.downsample[1] / tile_size**2


def _interpolation(step: int, tile_size: int, count: int, origin: int, downsample: float, size: int) -> np.ndarray:
    """`(count, size + 1)` matrix that takes the integral over each tile; it is linear between mask pixels."""
    matrix = np.zeros((count, size + 1))
    starts = np.arange(count) * step
    for edge, sign in ((starts + tile_size, 1.0), (starts, -1.0)):
        position = np.clip((edge - origin) / downsample, 0, size)
        low = np.minimum(position.astype(int), size - 1)
        np.add.at(matrix, (np.arange(count), low), sign * (1 - (position - low)))
        np.add.at(matrix, (np.arange(count), low + 1), sign * (position - low))
    return matrix
