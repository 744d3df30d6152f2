"""What comes before the tiles of a slide are read: open it, find its tissue, lay the grid, draw the picture."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...data.slides.base import SlideReader
from ...data.slides.identity import SlideIdentity
from ...data.slides.slide import Slide, open_slide
from ...data.slides.slide_table import SlideEntry
from ...data.tiles.grid import Grid, make_grid
from ...data.tissue.base import Tissue, TissueSegmenter
from .qc import draw_qc, save_qc


@dataclass(frozen=True)
class Layout:
    """Where the tiles of a slide are.

    Attributes:
        tissue: The tissue.
        grid: The tiles.
        unreadable_levels: Reduced levels of the slide that were found damaged.
        differing_levels: Reduced levels that show something else than level 0.
    """

    tissue: Tissue
    grid: Grid
    unreadable_levels: set[int]
    differing_levels: set[int]

    def open(self, entry: SlideEntry, reader: type[SlideReader] | None) -> Slide:
        """Open the slide to read its tiles, with what is known of its reduced levels."""
        slide = open_slide(entry.path, slide_mpp=entry.slide_mpp, slide_id=entry.slide_id, reader=reader)
        slide.unreadable_levels |= self.unreadable_levels
        slide.differing_levels = self.differing_levels
        return slide


def lay_out(
    entry: SlideEntry,
    reader: type[SlideReader] | None,
    segmenter: TissueSegmenter,
    picture: Path,
    *,
    tile_mpp: float,
    tile_px: int,
    overlap: int,
    min_tissue: float,
) -> Layout:
    """Find the tissue of a slide and lay the grid.

    Args:
        entry: The slide.
        reader: The slide reader, if one is named.
        segmenter: The tissue segmenter.
        picture: Where the picture of what will be embedded goes.
        tile_mpp: Microns per pixel of the tiles.
        tile_px: Edge of a tile in pixels.
        overlap: Pixels that neighbouring tiles share.
        min_tissue: Smallest share of a tile that must be tissue.

    Raises:
        LongslideError: The slide cannot be read, or tiles of this kind cannot be cut from it.
    """
    with open_slide(entry.path, slide_mpp=entry.slide_mpp, slide_id=entry.slide_id, reader=reader) as slide:
        tissue = segmenter(slide)
        grid = make_grid(slide, tissue, tile_mpp=tile_mpp, tile_px=tile_px, overlap=overlap, min_tissue=min_tissue)
        save_qc(picture, draw_qc(slide, tissue, grid))
        return Layout(tissue, grid, slide.unreadable_levels, slide.differing_levels)


def look_at(path: Path, reader: type[SlideReader] | None, max_px: int) -> tuple[SlideIdentity, np.ndarray]:
    """Which slide a file is, and its thumbnail with no edge longer than `max_px`: `(h, w, 3)` uint8 RGB."""
    with open_slide(path, reader=reader) as slide:
        return SlideIdentity.of(slide), slide.thumbnail(max_px)
