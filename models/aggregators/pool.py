"""The mean or the maximum over the tiles: the simplest baselines."""

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from .base import Aggregator, split_bags


class MeanPool(Aggregator):
    """The mean over the tiles.

    Args:
        feature_dim: Length of a tile embedding.
        width: Width that a linear layer with ReLU brings the tile embeddings to before they are pooled; 0 pools them as
            they are.
        dropout: Share of values dropped after that layer.
    """

    learning_rate = 2e-3

    def __init__(self, feature_dim: int, width: int = 512, dropout: float = 0.25) -> None:
        super().__init__()
        self.width = width or feature_dim
        self.projection = nn.Linear(feature_dim, width) if width else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, tile_features: Tensor, grid_cells: Tensor, cu_seqlens: Tensor) -> Tensor:
        """See `Aggregator.forward`."""
        x = tile_features.float() if tile_features.element_size() < 4 else tile_features
        if self.projection is not None:
            x = self.dropout(relu(self.projection(x)))
        return torch.stack([self._pool(bag) for bag in split_bags(x, cu_seqlens)])

    def _pool(self, bag: Tensor) -> Tensor:
        return bag.mean(0)


class MaxPool(MeanPool):
    """The maximum over the tiles; options as of `MeanPool`."""

    def _pool(self, bag: Tensor) -> Tensor:
        return bag.amax(0)
