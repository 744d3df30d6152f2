"""The tiles of a slide as a torch data set, for a training loop or a loader of one's own."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..slides.slide import Slide, open_slide
from ..tissue.base import TissueSegmenter
from .grid import MIN_TISSUE, Grid, make_grid
from .read import read_tile


class TileDataset(Dataset[dict[str, Any]]):
    """The tiles on the tissue of a slide, row by row. Each worker process of a `DataLoader` opens the slide for itself.

    Args:
        path: The slide file.
        mpp: Microns per pixel of the tiles.
        px: Edge of a tile in pixels.
        overlap: Pixels that neighbouring tiles share.
        min_tissue: Smallest share of a tile that must be tissue, 0 to 1.
        transform: Applied to each tile, a `(3, px, px)` uint8 tensor.
        segmenter: The tissue segmenter: `optical-density` by default.
        slide_mpp: Microns per pixel of level 0; overrides the file's.

    Attributes:
        grid: Where the tiles are.

    Raises:
        LongslideError: The slide cannot be read, has no microns per pixel, is smaller than a tile, or coarser than `mpp`.
    """

    def __init__(
        self,
        path: str | Path,
        mpp: float = 0.5,
        px: int = 256,
        *,
        overlap: int = 0,
        min_tissue: float = MIN_TISSUE,
        transform: Callable[[Tensor], Any] | None = None,
        segmenter: TissueSegmenter | None = None,
        slide_mpp: float | None = None,
    ) -> None:
        self.path = Path(path)
        self.transform = transform
        self._slide_mpp = slide_mpp
        with open_slide(self.path, slide_mpp=slide_mpp) as slide:
            tissue = slide.tissue(segmenter)
            self.grid: Grid = make_grid(slide, tissue, tile_mpp=mpp, tile_px=px, overlap=overlap, min_tissue=min_tissue)

    @cached_property
    def _slide(self) -> Slide:
        return open_slide(self.path, slide_mpp=self._slide_mpp)

    def __getstate__(self) -> dict[str, Any]:
        """Without the open slide: another process opens its own."""
        return {name: value for name, value in vars(self).items() if name != "_slide"}

    def __repr__(self) -> str:
        return f"TileDataset({self.path.name!r}, {len(self):,} tiles of {self.grid.tile_px} px)"

    def __len__(self) -> int:
        """Tiles."""
        return len(self.grid.coords)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Read a tile.

        Returns:
            `tile` `(3, px, px)` uint8 RGB, or what `transform` makes of it, and `coords` `(2,)` int64 (x, y) in level-0
            pixels.

        Raises:
            LongslideError: The tile cannot be read.
        """
        x, y = self.grid.coords[number].tolist()
        pixels = np.empty((self.grid.tile_px, self.grid.tile_px, 3), np.uint8)
        read_tile(self._slide, self.grid, x, y, pixels)
        tile = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
        return {
            "tile": tile if self.transform is None else self.transform(tile),
            "coords": torch.from_numpy(self.grid.coords[number]),
        }
