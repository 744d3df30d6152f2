"""The gallery of a slide: its strongest tiles for and against the prediction, at full resolution."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ...data.slides.slide import Slide
from ...data.whole_file import write_picture

TILES = 8
"""Tiles on either side."""


@dataclass(frozen=True)
class GalleryTile:
    """One tile of a gallery.

    Attributes:
        picture: Name of its picture in the gallery's folder.
        x: Left edge in level-0 pixels.
        y: Top edge in level-0 pixels.
        score: Its score.
    """

    picture: str
    x: int
    y: int
    score: float


def strongest_tiles(coords: np.ndarray, tile_size_level0: int, scores: np.ndarray, count: int = TILES) -> np.ndarray:
    """Rows of the tiles with the highest scores above 0, strongest first, none overlapping another.

    Args:
        coords: `(N, 2)` top-left corner (x, y) of each tile in level-0 pixels.
        tile_size_level0: Edge of a tile in level-0 pixels.
        scores: `(N,)` scores; pass them negated for the tiles against.
        count: At most so many.

    Returns:
        `(n,)` int64 rows, n from 0 to `count`.
    """
    chosen: list[int] = []
    for row in np.argsort(-scores, kind="stable").tolist():
        if len(chosen) == count or scores[row] <= 0:
            break
        # Neighbours on an overlapping grid show the same cells: the strongest stands for them.
        if not chosen or (np.abs(coords[chosen] - coords[row]).max(1) >= tile_size_level0).all():
            chosen.append(row)
    return np.array(chosen, np.int64)


def write_gallery(
    folder: Path, slide: Slide, coords: np.ndarray, tile_size_level0: int, scores: np.ndarray, count: int = TILES
) -> list[GalleryTile]:
    """Save the strongest tiles as `for-1.jpg`, ... and, where scores are negative, `against-1.jpg`, ...

    Args:
        folder: Where to; made if it is not there. Pictures of an earlier gallery go.
        slide: The open slide.
        coords: `(N, 2)` top-left corner (x, y) of each tile in level-0 pixels.
        tile_size_level0: Edge of a tile in level-0 pixels.
        scores: `(N,)` signed scores.
        count: Tiles on either side.

    Returns:
        What was saved, those for first, the strongest first.

    Raises:
        LongslideError: A tile cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for side in ("for", "against"):
        for old in folder.glob(f"{side}-*.jpg"):
            old.unlink()
    return list(_write(folder, slide, coords, tile_size_level0, scores, count))


def _write(
    folder: Path, slide: Slide, coords: np.ndarray, tile_size_level0: int, scores: np.ndarray, count: int
) -> Iterator[GalleryTile]:
    for side, signed in (("for", scores), ("against", -scores)):
        for number, row in enumerate(strongest_tiles(coords, tile_size_level0, signed, count), start=1):
            x, y = coords[row].tolist()
            pixels = slide.read_region(x, y, 0, tile_size_level0, tile_size_level0)
            name = f"{side}-{number}.jpg"
            write_picture(folder / name, Image.fromarray(pixels), quality=92, subsampling=0)
            yield GalleryTile(name, x, y, float(scores[row]))
