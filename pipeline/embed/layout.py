"""What comes before the tiles of a slide are read: open it, find its tissue, lay the grid, draw the picture."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...data.slides.base import SlideReader
from ...data.slides.identity import SlideIdentity
from ...data.slides.slide import Slide, open_slide
from ...data.slides.slide_table import SlideEntry
from ...data.tiles.grid import Grid, make_grid
from ...data.tissue.base import Tissue, TissueSegmenter
from ...errors import LongslideError
from ..batch.memory import Turn
from ..batch.watched import WatchedProcesses, can_be_sent
from .qc import draw_qc, save_qc

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


def watch_lay_out(
    watched: WatchedProcesses,
    turn: Turn,
    shown: Path,
    entry: SlideEntry,
    reader: type[SlideReader] | None,
    work: Callable[[], Layout],
) -> Layout:
    """`lay_out` in a process of its own, when there is memory for a plain image or a mask.

    What cannot be sent there, as a segmenter whose network is on the device of this process, runs here, after the slide was
    opened and read there.

    Args:
        watched: The processes.
        turn: The slide's turn in getting memory.
        shown: The slide's path as messages give it.
        entry: The slide.
        reader: The slide reader, if one is named.
        work: `lay_out` with its arguments.

    Raises:
        LongslideError: The slide cannot be read, or tiles of this kind cannot be cut from it.
    """
    take_memory(watched, turn, shown, entry, reader)
    if not can_be_sent(work):
        watched.call(shown, look_at, entry.path, reader, LOOKED_AT_PX)
    return watched.call(shown, work)


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
