"""Tiles of a grid read from a slide: the one place where they are resampled."""

import cv2
import numpy as np

from ...errors import LongslideError
from ..slides.slide import Slide
from .blur import blur_of
from .grid import Grid


def read_tile(slide: Slide, grid: Grid, x: int, y: int, out: np.ndarray, region: np.ndarray | None = None) -> None:
    """Read one tile of a grid.

    Args:
        slide: The slide.
        grid: The grid: it says from which level.
        x: Left edge in level-0 pixels.
        y: Top edge in level-0 pixels.
        out: `(tile_px, tile_px, 3)` uint8, where the pixels go.
        region: `(read_px, read_px, 3)` uint8, memory for the pixels before they are resampled.

    Raises:
        LongslideError: It cannot be read.
    """
    if grid.read_px == grid.tile_px:
        slide.read_into(x, y, grid.level, out)
        return
    if region is None:
        region = np.empty((grid.read_px, grid.read_px, 3), np.uint8)
    slide.read_into(x, y, grid.level, region)
    # The mean over each pixel's area: no aliasing, no shift of half a pixel.
    cv2.resize(region, (grid.tile_px, grid.tile_px), dst=out, interpolation=cv2.INTER_AREA)


def read_tiles(slide: Slide, grid: Grid, corners: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Read tiles of a grid.

    Args:
        slide: The slide.
        grid: The grid: it says from which level.
        corners: `(n, 2)` int64 top-left corners (x, y) in level-0 pixels.
        out: `(n, tile_px, tile_px, 3)` uint8, where the pixels go.

    Returns:
        `(n,)` float32, how blurred each is (`blur_of`); NaN for one that cannot be read.
    """
    blur = np.full(len(corners), np.nan, np.float32)
    region = np.empty((grid.read_px, grid.read_px, 3), np.uint8)
    for number, (x, y) in enumerate(corners.tolist()):
        try:
            read_tile(slide, grid, x, y, out[number], region)
        except LongslideError:
            continue
        blur[number] = blur_of(out[number])
    return blur
