"""Attention-based multiple-instance learning with gated attention (https://arxiv.org/abs/1802.04712)."""

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from ..slide_encoder.gated_attention import gated_scores
from .base import Aggregator, split_bags


class ABMIL(Aggregator):
    """The mean of the tiles, weighted by a gated attention: `softmax(w (tanh(V h) * sigmoid(U h)))` over the tiles of a bag.

    Args:
        feature_dim: Length of a tile embedding.
        width: Width of the tile embeddings after the first linear layer, and of the bag's vector.
        attention_width: Width of the two branches of the attention.
        dropout: Share of values dropped after the first layer and in the attention. With 0.25 it learns small cohorts by
            heart (`benchmarks/recipes.py`, ordinal).
    """

    learning_rate = 3e-3

    def __init__(self, feature_dim: int, width: int = 512, attention_width: int = 256, dropout: float = 0.5) -> None:
        super().__init__()
        self.width = width
        self.projection = nn.Linear(feature_dim, width)
        self.value = nn.Linear(width, attention_width)
        self.gate = nn.Linear(width, attention_width)
        self.score = nn.Linear(attention_width, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tile_features: Tensor, grid_cells: Tensor, cu_seqlens: Tensor) -> Tensor:
        """See `Aggregator.forward`."""
        hidden, scores = self._score(tile_features)
        bags = zip(split_bags(hidden, cu_seqlens), split_bags(scores, cu_seqlens), strict=True)
        return torch.stack([score.softmax(0) @ bag.to(score.dtype) for bag, score in bags])

    def attention_weights(self, tile_features: Tensor, grid_cells: Tensor, cu_seqlens: Tensor) -> Tensor:
        """The weight of each tile in its bag's vector.

        Args:
            tile_features: `(T, D)` tile embeddings of all bags.
            grid_cells: `(T, 2)` int64 (column, row) of each tile.
            cu_seqlens: `(B + 1,)` int32 cumulative lengths of the bags.

        Returns:
            `(T,)` float32; the weights of a bag add up to 1.
        """
        scores = self._score(tile_features)[1]
        return torch.cat([score.softmax(0) for score in split_bags(scores, cu_seqlens)])

    def _score(self, tile_features: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.dropout(relu(self.projection(tile_features.to(self.projection.weight.dtype))))
        return hidden, gated_scores(hidden, self.value, self.gate, self.score, self.dropout)
