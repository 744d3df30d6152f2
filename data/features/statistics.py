"""What training features look like: to standardise them, and to measure later how far a new slide is from them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

QUANTILES = (0.5, 0.9, 0.95, 0.99, 1.0)


DIGEST_TILES = 256


def feature_digest(features: np.ndarray) -> str:
    """Tells the embeddings `(N, D)` of a slide from those of any other: SHA-256 of tiles from all over it."""
    chosen = np.ascontiguousarray(features[:: max(1, len(features) // DIGEST_TILES)])
    return hashlib.sha256(f"{features.shape}{features.dtype}".encode() + chosen.tobytes()).hexdigest()[:32]


@dataclass(frozen=True)
class SlideMoments:
    """Of the tiles of one slide.

    Attributes:
        tiles: Number of tiles.
        mean: `(D,)` float32.
        variance: `(D,)` float32, around the slide's own mean.
        slide_mpp: Microns per pixel of level 0, if known.
        digest: Of the embeddings; see `feature_digest`.
        quickhash: Of the image, if the feature file says.
    """

    tiles: int
    mean: np.ndarray
    variance: np.ndarray
    slide_mpp: float | None = None
    digest: str = ""
    quickhash: str | None = None


@dataclass(frozen=True)
class FeatureStatistics:
    """Of the tiles of all training slides.

    Attributes:
        mean: `(D,)` float32 mean over all tiles.
        std: `(D,)` float32 standard deviation over all tiles.
        distance_quantiles: Quantile (`"0.99"`) -> `distance` of the training slides' mean embeddings.
        slide_mpp: Least and greatest microns per pixel of level 0; None if no file says.
    """

    mean: np.ndarray
    std: np.ndarray
    distance_quantiles: dict[str, float]
    slide_mpp: tuple[float, float] | None

    @classmethod
    def of(cls, slides: Sequence[SlideMoments]) -> "FeatureStatistics":
        """Join the moments of slides."""
        share = np.array([slide.tiles for slide in slides], np.float64)
        share /= share.sum()
        mean = np.zeros(len(slides[0].mean))
        for weight, slide in zip(share, slides, strict=True):
            mean += weight * slide.mean
        variance = np.zeros_like(mean)
        for weight, slide in zip(share, slides, strict=True):
            variance += weight * (slide.variance + (slide.mean - mean) ** 2)
        std = np.sqrt(variance)
        distances = [distance(slide.mean, mean, std) for slide in slides]
        mpps = [slide.slide_mpp for slide in slides if slide.slide_mpp is not None]
        return cls(
            mean=mean.astype(np.float32),
            std=std.astype(np.float32),
            distance_quantiles={f"{q:g}": float(np.quantile(distances, q)) for q in QUANTILES},
            slide_mpp=(min(mpps), max(mpps)) if mpps else None,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain types and tensors, for checkpoints."""
        return {
            "mean": torch.from_numpy(self.mean.copy()),
            "std": torch.from_numpy(self.std.copy()),
            "distance_quantiles": dict(self.distance_quantiles),
            "slide_mpp": list(self.slide_mpp) if self.slide_mpp else None,
            "dim": len(self.mean),
        }


def distance(slide_mean: np.ndarray, mean: np.ndarray, std: np.ndarray) -> float:
    """How far a slide is from the training slides: root mean square of its mean embedding's standardised values.

    Args:
        slide_mean: `(D,)` mean over the slide's tiles.
        mean: `(D,)` mean over all training tiles.
        std: `(D,)` standard deviation over all training tiles; dimensions without spread do not count.
    """
    used = std > 1e-6
    if not used.any():
        return 0.0
    standardised = (slide_mean[used].astype(np.float64) - mean[used]) / std[used]
    return float(np.sqrt(np.mean(standardised**2)))
