"""What comes before the tiles of a slide are read: open it, find its tissue, lay the grid, draw the picture."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from ...data.slides.base import READERS, SlideReader
from ...data.slides.identity import SlideIdentity
from ...data.slides.slide import Slide, open_slide
from ...data.slides.slide_table import SlideEntry
from ...data.tiles.grid import Grid, make_grid
from ...data.tissue.base import Tissue, TissueSegmenter
from ...data.tissue.mask import Mask
from ...errors import LongslideError
from ..batch.memory import Turn
from ..batch.watched import WatchedProcesses, can_be_sent
from .qc import draw_qc

LOOKED_AT_PX = 2048
"""Edge of the thumbnail by which a slide is tried in a process of its own, before it is opened in this one."""


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


@dataclass(frozen=True)
class Tiling:
    """Which tiles of a slide are taken.

    Attributes:
        tile_mpp: Microns per pixel of the tiles.
        tile_px: Edge of a tile in pixels.
        overlap: Pixels that neighbouring tiles share.
        min_tissue: Smallest share of a tile that must be tissue.
        tissue: The tissue segmenter, for slides without a mask.
        reader: The slide reader, if one is named.
    """

    tile_mpp: float
    tile_px: int
    overlap: int
    min_tissue: float
    tissue: TissueSegmenter
    reader: str | None

    def __str__(self) -> str:
        return f"tiles of {self.tile_px} px at {self.tile_mpp:g} um/px, overlap {self.overlap} px"

    @property
    def reader_class(self) -> type[SlideReader] | None:
        """The slide reader, if one is named."""
        return None if self.reader is None else READERS.get(self.reader)

    def segmenter(self, entry: SlideEntry) -> TissueSegmenter:
        """What finds the tissue of a slide."""
        return self.tissue if entry.tissue_mask is None else Mask(entry.tissue_mask)

    def on(self, slide: Slide, entry: SlideEntry) -> tuple[Tissue, Grid]:
        """Find the tissue of an open slide and lay the grid.

        Raises:
            LongslideError: The slide cannot be read, or tiles of this kind cannot be cut from it.
        """
        tissue = self.segmenter(entry)(slide)
        grid = make_grid(
            slide,
            tissue,
            tile_mpp=self.tile_mpp,
            tile_px=self.tile_px,
            overlap=self.overlap,
            min_tissue=self.min_tissue,
        )
        return tissue, grid

    def lay_out(self, watched: WatchedProcesses, turn: Turn, shown: Path, entry: SlideEntry, picture: Path) -> Layout:
        """`lay_out` in a process of its own, when there is memory for a plain image or a mask.

        What cannot be sent there, as a segmenter whose network is on the device of this process, runs here, after the slide
        was opened and read there.

        Args:
            watched: The processes.
            turn: The slide's turn in getting memory.
            shown: The slide's path as messages give it.
            entry: The slide.
            picture: Where the picture of what will be embedded goes.

        Raises:
            LongslideError: The slide cannot be read, or tiles of this kind cannot be cut from it.
        """
        reader = self.reader_class
        of_slide = replace(self, tissue=self.segmenter(entry))  # with a mask no network need be sent
        work = partial(lay_out, entry, of_slide, reader, picture)
        take_memory(watched, turn, shown, entry, reader)
        if not can_be_sent(work):
            watched.call(shown, look_at, entry.path, reader, LOOKED_AT_PX)
        return watched.call(shown, work)

    def why_none(self, tissue: Tissue) -> str:
        """Why a slide with this tissue has no tiles."""
        if not tissue.mask.any():
            return "no tissue found"
        return f"no tile has {self.min_tissue:.0%} tissue or more (--min-tissue)"


def take_memory(
    watched: WatchedProcesses, turn: Turn, shown: Path, entry: SlideEntry, reader: type[SlideReader] | None
) -> None:
    """Wait for the memory that a plain image and a mask will take.

    Raises:
        LongslideError: Together they take more than there is for all slides.
    """
    size = watched.call(shown, memory_of, entry, reader)
    if size > turn.most:
        raise LongslideError(
            f"{shown}: with its mask {entry.tissue_mask} it takes {size / 1e9:.1f} GB of memory, more than the "
            f"{turn.most / 1e9:.1f} GB that all slides may take; give a smaller mask"
        )
    turn.take(size)


def memory_of(entry: SlideEntry, reader: type[SlideReader] | None) -> int:
    """Bytes that a plain image and a mask take while they are decoded; 0 for a slide that is read piece by piece."""
    from ...data.slides.image import decoding_bytes as bytes_of_slide  # libraries that the command line has no need of
    from ...data.tissue.mask import decoding_bytes as bytes_of_mask

    return bytes_of_slide(entry.path, reader) + (0 if entry.tissue_mask is None else bytes_of_mask(entry.tissue_mask))


def lay_out(entry: SlideEntry, tiling: Tiling, reader: type[SlideReader] | None, picture: Path) -> Layout:
    """Open a slide, find its tissue, lay the grid and draw the picture.

    Args:
        entry: The slide.
        tiling: Which tiles are taken.
        reader: Its reader, if one is named: a name that a plug-in has registered is not known in every process.
        picture: Where the picture of what will be embedded goes.

    Raises:
        LongslideError: The slide cannot be read, or tiles of this kind cannot be cut from it.
    """
    with open_slide(entry.path, slide_mpp=entry.slide_mpp, slide_id=entry.slide_id, reader=reader) as slide:
        tissue, grid = tiling.on(slide, entry)
        draw_qc(slide, tissue, grid).save(picture)
        return Layout(tissue, grid, slide.unreadable_levels, slide.differing_levels)


def look_at(path: Path, reader: type[SlideReader] | None, max_px: int) -> tuple[SlideIdentity, np.ndarray]:
    """Which slide a file is, and its thumbnail with no edge longer than `max_px`: `(h, w, 3)` uint8 RGB."""
    with open_slide(path, reader=reader) as slide:
        return SlideIdentity.of(slide), slide.thumbnail(max_px)
