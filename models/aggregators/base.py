"""Aggregators: the tile embeddings of a bag in, one vector out; one interface, so that a baseline is one option away."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from .options import PoolOptions


class Aggregator(nn.Module):
    """What every aggregator is.

    Bags are packed end to end, without padding: bag b has the tiles `cu_seqlens[b]` to `cu_seqlens[b + 1]`.

    Attributes:
        width: Length of the vector of a bag.
        reads_slide_embedding: Whether each bag's only tile is the slide embedding of the feature file.
    """

    width: int
    reads_slide_embedding: bool = False

    def forward(self, tile_features: Tensor, grid_cells: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Aggregate bags.

        Args:
            tile_features: `(T, D)` tile embeddings of all bags, any floating dtype.
            grid_cells: `(T, 2)` int64 (column, row) of each tile.
            cu_seqlens: `(B + 1,)` int32 cumulative lengths of the bags, from 0 to T.

        Returns:
            `(B, width)`.
        """
        raise NotImplementedError

    def architecture(self) -> dict[str, Any]:
        """What is needed beside the options to build the module again without its weights, in plain types."""
        return {}


def split_bags(packed: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, ...]:
    """The bags of a packed tensor `(T, ...)`, as views `(N_b, ...)`.

    Reductions run bag by bag over these views: a handful of bags fills a batch, each reduction is one kernel, its order of
    summation does not depend on the neighbours, and no atomic addition makes two runs differ.
    """
    return torch.split(packed, cu_seqlens.diff().tolist())


class Pool(Aggregator):
    """The mean or the maximum over the tiles.

    Args:
        feature_dim: Length of a tile embedding.
        options: Its options.
        pool: Which of the two.
    """

    def __init__(self, feature_dim: int, options: PoolOptions, pool: Literal["mean", "max"]) -> None:
        super().__init__()
        self.pool = pool
        self.width = options.width or feature_dim
        self.projection = nn.Linear(feature_dim, options.width) if options.width else None
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, tile_features: Tensor, grid_cells: Tensor, cu_seqlens: Tensor) -> Tensor:
        """See `Aggregator.forward`."""
        x = tile_features.float() if tile_features.element_size() < 4 else tile_features
        if self.projection is not None:
            x = self.dropout(relu(self.projection(x)))
        bags = split_bags(x, cu_seqlens)
        return torch.stack([bag.mean(0) if self.pool == "mean" else bag.amax(0) for bag in bags])


class LinearProbe(Aggregator):
    """The slide embedding itself, standardised by the training slides' mean and standard deviation: a linear head follows.

    Args:
        feature_dim: Length of a slide embedding.
    """

    reads_slide_embedding = True
    mean: Tensor
    std: Tensor

    def __init__(self, feature_dim: int) -> None:
        super().__init__()
        self.width = feature_dim
        self.register_buffer("mean", torch.zeros(feature_dim))
        self.register_buffer("std", torch.ones(feature_dim))

    def forward(self, tile_features: Tensor, grid_cells: Tensor, cu_seqlens: Tensor) -> Tensor:
        """See `Aggregator.forward`; several slide embeddings in a bag are averaged."""
        x = (tile_features.to(self.mean.dtype) - self.mean) / self.std
        return torch.stack([bag.mean(0) for bag in split_bags(x, cu_seqlens)])
