"""The published PIL transform of a tile encoder, on whole uint8 batches and on any device.

A batch is resampled in the integer arithmetic of Pillow (a horizontal pass, rounded and clamped to uint8, then a
vertical one), so the result equals `Resize -> CenterCrop -> ToTensor -> Normalize` of torchvision on PIL images bit for
bit. `torch.nn.functional.interpolate` does not do: without a uint8 kernel (CUDA has none) it keeps the overshoot of the
first bicubic pass, and differs from Pillow by up to 25 grey levels at sharp edges. Encoders whose authors resize
tensors instead of PIL images (kaiko, midnight) differ by one grey level at most.
"""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_FRACTION_BITS = 22
"""Pillow keeps its weights as integers with this many fractional bits (`PRECISION_BITS` of its Resample.c)."""


@dataclass(frozen=True)
class TileTransform:
    """Resize, centre crop and normalise a batch of tiles.

    Attributes:
        resize: The short side after resizing, in pixels; tiles of this size are not resampled.
        interpolation: `bilinear` or `bicubic`, antialiased as Pillow does.
        crop: Edge of the centre crop, in pixels: what the encoder sees.
        mean: Mean of the red, green and blue channel, in 0 to 1.
        std: Standard deviation of the three channels, in 0 to 1.
    """

    resize: int
    interpolation: str
    crop: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, tiles: Tensor) -> Tensor:
        """Transform a batch.

        Args:
            tiles: (B, H, W, 3) uint8 on any device.

        Returns:
            (B, 3, crop, crop) float32 on the same device.
        """
        return apply_transform(tiles, *self.constants(tiles))

    def constants(self, tiles: Tensor) -> "TransformConstants":
        """What the arithmetic for tiles of a size needs on their device, found once for each.

        Args:
            tiles: (B, H, W, 3) uint8.
        """
        if tiles.dtype != torch.uint8 or tiles.ndim != 4 or tiles.shape[-1] != 3:
            raise ValueError(f"tiles must be (B, H, W, 3) uint8, not {tuple(tiles.shape)} {tiles.dtype}")
        size, device = tuple(tiles.shape[1:3]), tiles.device
        short = min(size)
        height, width = (int(self.resize * edge / short) for edge in size)
        taps = [
            None if short == self.resize or edge == target else _taps(edge, target, self.interpolation, device)
            for edge, target in ((size[1], width), (size[0], height))
        ]
        if short == self.resize:
            height, width = size
        corner = (round((height - self.crop) / 2), round((width - self.crop) / 2))
        # Dividing by tensors: CUDA divides by a Python number as a product with its reciprocal, which is less exact.
        white, mean, std = (_per_channel(values, device) for values in ((255.0, 255.0, 255.0), self.mean, self.std))
        return TransformConstants(taps[0], taps[1], corner, self.crop, white, mean, std)


class TransformConstants(NamedTuple):
    """Taps of the horizontal and the vertical pass, or None; the crop's corner (row, column) and edge; colours."""

    horizontal: tuple[Tensor, Tensor] | None
    vertical: tuple[Tensor, Tensor] | None
    corner: tuple[int, int]
    crop: int
    white: Tensor
    mean: Tensor
    std: Tensor


def apply_transform(
    tiles: Tensor,
    horizontal: tuple[Tensor, Tensor] | None,
    vertical: tuple[Tensor, Tensor] | None,
    corner: tuple[int, int],
    crop: int,
    white: Tensor,
    mean: Tensor,
    std: Tensor,
) -> Tensor:
    """The arithmetic of a transform, on tensors alone; see `TransformConstants`.

    Returns:
        (B, 3, crop, crop) float32.
    """
    images = tiles.permute(0, 3, 1, 2)
    if horizontal is not None:
        images = _resample(images, *horizontal, -1)
    if vertical is not None:
        images = _resample(images, *vertical, -2)
    row, column = corner
    images = images[..., row : row + crop, column : column + crop]
    return images.float().div(white).sub(mean).div(std).contiguous()


@cache
def _per_channel(values: tuple[float, float, float], device: torch.device) -> Tensor:
    """Three constants as (3, 1, 1) float32 on a device: no module buffers, which `.half()` would round."""
    return torch.tensor(values, device=device).view(3, 1, 1)


def _resample(images: Tensor, indices: Tensor, weights: Tensor, axis: int) -> Tensor:
    """One pass of Pillow's `resize` along an axis of (B, 3, H, W) uint8 images."""
    total = None
    for index, weight in zip(indices, weights, strict=True):
        term = images.index_select(axis, index).to(torch.int32).mul_(weight if axis == -1 else weight[:, None])
        total = term.add_(1 << (_FRACTION_BITS - 1)) if total is None else total.add_(term)
    assert total is not None
    return total.bitwise_right_shift_(_FRACTION_BITS).clamp_(0, 255).to(torch.uint8)


@cache
def _taps(source: int, target: int, interpolation: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Source positions and integer weights of every output position, both (taps, target), as Pillow computes them."""
    scale = source / target
    stretch = max(scale, 1.0)
    support = {"bilinear": 1.0, "bicubic": 2.0}[interpolation] * stretch
    centre = (np.arange(target) + 0.5) * scale
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + support + 0.5).astype(np.int64), source)
    position = first + np.arange((last - first).max())[:, None]
    distance = np.abs((position - centre + 0.5) / stretch)
    kernel = np.maximum(1 - distance, 0.0) if interpolation == "bilinear" else _bicubic(distance)
    kernel = np.where(position < last, kernel, 0.0)
    kernel /= kernel.sum(axis=0)
    weights = np.trunc(kernel * (1 << _FRACTION_BITS) + np.copysign(0.5, kernel)).astype(np.int32)
    indices = np.minimum(position, source - 1)
    return torch.from_numpy(indices).to(device), torch.from_numpy(weights).to(device)


def _bicubic(distance: np.ndarray) -> np.ndarray:
    """Pillow's cubic kernel (a = -0.5) at non-negative distances."""
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = -0.5 * (((distance - 5) * distance + 8) * distance - 4)
    return np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
