"""Augmentation of bags: tile dropout, crops, flips and rotations of the grid, feature noise."""

from dataclasses import dataclass

import numpy as np

from ...ranges import check_options


@dataclass(frozen=True)
class Augmentation:
    """How training bags are changed, differently in each epoch. Nothing by default.

    Attributes:
        tile_dropout: Share of a slide's tiles that is left out.
        flip: Mirror the grid of a slide, left to right and top to bottom, each half of the time.
        rotate: Turn the grid of a slide by 0, 90, 180 or 270 degrees.
        crop: Edge of the window of the grid that is kept, as a share of the slide's own extent (0.875 when GigaPath was
            pretrained).
        noise: Standard deviation of normal noise on the features, in units of each feature's own over the training tiles.
    """

    tile_dropout: float = 0.0
    flip: bool = False
    rotate: bool = False
    crop: float = 1.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        check_options(vars(self), "data.augment.")

    def keep(self, cells: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Tiles of a slide that stay, one at least.

        Args:
            cells: `(N, 2)` int64 grid cells, row by row.
            rng: Draws.

        Returns:
            Ascending row numbers.
        """
        kept = np.arange(len(cells))
        if self.crop < 1:
            low, extent = cells.min(0), np.ptp(cells, axis=0) + 1
            edge = np.ceil(extent * self.crop)
            start = low + np.floor(rng.random(2) * (extent - edge + 1))
            inside = np.flatnonzero(((cells >= start) & (cells < start + edge)).all(1))
            kept = inside if len(inside) else kept
        if self.tile_dropout > 0:
            size = max(1, round(len(kept) * (1 - self.tile_dropout)))
            kept = np.sort(rng.choice(kept, size, replace=False))
        return kept

    def move(self, cells: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Flip and turn a grid within its own bounding box, whose top-left corner stays.

        Args:
            cells: `(N, 2)` int64 grid cells (column, row).
            rng: Draws.

        Returns:
            `(N, 2)` int64 new cells of the same tiles, which are not row by row any more.
        """
        low = cells.min(0)
        moved = cells - low
        if self.flip:
            mirrored = rng.random(2) < 0.5
            moved = np.where(mirrored, moved.max(0) - moved, moved)
        if self.rotate:
            for _ in range(rng.integers(4)):
                moved = np.stack([moved[:, 1].max() - moved[:, 1], moved[:, 0]], axis=1)  # clockwise
        return np.asarray(moved + low)

    def add_noise(self, features: np.ndarray, std: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Noise on `(N, D)` features, in their dtype; `std` is `(D,)`."""
        if self.noise == 0:
            return features
        noisy = rng.standard_normal(features.shape, np.float32)
        noisy *= np.float32(self.noise) * std
        noisy += features
        return noisy.astype(features.dtype, copy=False)
