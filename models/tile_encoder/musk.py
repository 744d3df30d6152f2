"""The image tower of MUSK (https://doi.org/10.1038/s41586-024-08378-w), seen at two scales: its authors' way for slides."""

from typing import Any

import timm
import torch
from torch import Tensor, nn

from .published_names import to_timm


class MultiScale(nn.Module):
    """The class token of an image, beside the mean of those of its quarters, each enlarged to the image's size.

    Args:
        network: What maps `(B, 3, H, W)` images to `(B, dim)`.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """`(B, 3, H, H)` normalised images to `(B, 2 * dim)`."""
        size = images.shape[-1]
        # float32: bicubic in half precision is another rounding than the published one
        large = nn.functional.interpolate(images.float(), size=2 * size, mode="bicubic").to(images.dtype)
        quarters = [large[..., i : i + size, j : j + size] for i in (0, size) for j in (0, size)]
        whole: Tensor = self.network(images)
        parts = torch.stack([self.network(quarter) for quarter in quarters])
        return torch.cat([whole, parts.mean(0)], dim=-1)

    def from_published(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the network by the names of this module."""
        return {f"network.{key}": value for key, value in to_timm(state, self.network).items()}


def musk_multiscale(**network_args: Any) -> MultiScale:
    """MUSK for images of 384 pixels, at two scales: an embedding of 2,048.

    Args:
        **network_args: Further arguments of timm's ViT.
    """
    facts: dict[str, Any] = {"img_size": 384, "global_pool": "token", "num_classes": 0}
    return MultiScale(timm.create_model("beit3_large_patch16_224", **facts | network_args))
