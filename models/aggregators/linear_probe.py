"""A linear probe of slide embeddings."""

from typing import Any

import torch
from torch import Tensor

from .base import Aggregator, split_bags


class LinearProbe(Aggregator):
    """The slide embedding itself, standardised by the training slides' mean and standard deviation: a linear head follows.

    Args:
        feature_dim: Length of a slide embedding.
    """

    reads_slide_embedding = True
    learning_rate = 1e-2
    mean: Tensor
    std: Tensor

    def __init__(self, feature_dim: int) -> None:
        super().__init__()
        self.width = feature_dim
        self.register_buffer("mean", torch.zeros(feature_dim))
        self.register_buffer("std", torch.ones(feature_dim))

    def use_training_features(self, statistics: dict[str, Any]) -> None:
        """Standardise by these from now on."""
        self.mean.copy_(statistics["mean"])
        self.std.copy_(statistics["std"].clamp(min=1e-6))

    def forward(self, tile_features: Tensor, grid_cells: Tensor, cu_seqlens: Tensor) -> Tensor:
        """See `Aggregator.forward`; several slide embeddings in a bag are averaged."""
        x = (tile_features.to(self.mean.dtype) - self.mean) / self.std
        return torch.stack([bag.mean(0) for bag in split_bags(x, cu_seqlens)])
