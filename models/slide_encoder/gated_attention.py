"""Slide encoders that weigh tiles by a gated attention: CHIEF, Feather and MADELEINE."""

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from .published import PublishedSlideEncoder
from .spec import PublishedSpec


class GatedAttention(nn.Module):
    """The scores of tiles, `w (tanh(V h) * sigmoid(U h))` (https://arxiv.org/abs/1802.04712).

    Args:
        width: Width of the tiles.
        attention_width: Width of the two branches.
        dropout: Share of values of each branch dropped in training.
    """

    def __init__(self, width: int, attention_width: int, dropout: float) -> None:
        super().__init__()
        self.value = nn.Linear(width, attention_width)
        self.gate = nn.Linear(width, attention_width)
        self.score = nn.Linear(attention_width, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        """`(N, width)` -> `(N,)`; see `gated_scores`."""
        return gated_scores(hidden, self.value, self.gate, self.score, self.dropout)


def gated_scores(hidden: Tensor, value: nn.Module, gate: nn.Module, score: nn.Module, dropout: nn.Module) -> Tensor:
    """The scores of tiles `(N, width)` by linear layers: `(N,)`.

    At least float32: a softmax over tens of thousands of tiles in half precision would lose most of them.
    """
    gated = dropout(value(hidden).tanh()) * dropout(gate(hidden).sigmoid())
    scores: Tensor = score(gated).squeeze(-1)
    return scores.float() if scores.element_size() < 4 else scores


def gated_names(attention: str, theirs: str) -> dict[str, str]:
    """The published names of a `GatedAttention`: theirs -> ours."""
    return {
        f"{theirs}.attention_a.0": f"{attention}.value",
        f"{theirs}.attention_b.0": f"{attention}.gate",
        f"{theirs}.attention_c": f"{attention}.score",
    }


class GatedSlideEncoder(PublishedSlideEncoder):
    """Base of those whose slide embedding is made of tiles by weights that add up to 1."""

    def tile_weights(self, tile_features: Tensor) -> Tensor:
        """`(N,)` weight of each tile of one slide, the mean over heads; they add up to 1."""
        raise NotImplementedError

    def attention_weights(self, tile_features: Tensor, grid_cells: Tensor, cu_seqlens: Tensor) -> Tensor:
        """The weight of each tile of packed slides.

        Args:
            tile_features: `(T, tile_dim)` tile embeddings of all slides.
            grid_cells: `(T, 2)` integer (column, row) of each tile.
            cu_seqlens: `(B + 1,)` cumulative lengths of the slides.

        Returns:
            `(T,)`; the weights of a slide add up to 1.
        """
        slides = self.slides(tile_features, grid_cells, cu_seqlens)
        return torch.cat([self.tile_weights(features) for features, _ in slides])


class CHIEF(GatedSlideEncoder):
    """CHIEF (https://doi.org/10.1038/s41586-024-07894-z): the mean of the tile embeddings themselves, by weight.

    This is `WSI_feature` of the published code. Its other output adds an embedding of the organ's name to the pooled tiles
    for a classifier, and has no part here.

    Args:
        spec: Its facts.
        weights: Source and digest of the weights.
        hidden: Width of the tiles that the attention reads.
        attention_width: Width of the attention.
        dropout: Share of values dropped in training.
    """

    PUBLISHED: Mapping[str, str] = {"attention_net.0": "projection"} | gated_names("attention", "attention_net.3")
    LEFT_OUT = ("classifiers.*", "instance_classifiers.*", "att_head.*", "text_to_vision.*", "organ_embedding")

    def __init__(
        self, spec: PublishedSpec, weights: str, hidden: int = 512, attention_width: int = 256, dropout: float = 0.25
    ) -> None:
        super().__init__(spec, weights)
        self.width = spec.tile_dim
        self.projection = nn.Linear(spec.tile_dim, hidden)
        self.dropout = nn.Dropout(dropout)
        self.attention = GatedAttention(hidden, attention_width, dropout)

    def tile_weights(self, tile_features: Tensor) -> Tensor:
        """See `GatedSlideEncoder.tile_weights`."""
        scores: Tensor = self.attention(self.dropout(relu(self.projection(tile_features))))
        return scores.softmax(0)

    def embed(self, tile_features: Tensor, grid_cells: Tensor) -> Tensor:
        """See `PublishedSlideEncoder.embed`."""
        return self.tile_weights(tile_features) @ tile_features


class Feather(GatedSlideEncoder):
    """FEATHER (https://arxiv.org/abs/2506.09022): an ABMIL that was trained to tell 108 kinds of tumour.

    Args:
        spec: Its facts.
        weights: Source and digest of the weights.
        width: Width of the projected tiles, and of the slide embedding.
        attention_width: Width of the attention.
        dropout: Share of values of the attention dropped in training.
    """

    PUBLISHED: Mapping[str, str] = {"patch_embed.0": "projection"} | gated_names("attention", "global_attn")
    LEFT_OUT = ("classifier.*",)

    def __init__(
        self, spec: PublishedSpec, weights: str, width: int = 512, attention_width: int = 384, dropout: float = 0.25
    ) -> None:
        super().__init__(spec, weights)
        self.width = width
        self.projection = nn.Linear(spec.tile_dim, width)
        self.attention = GatedAttention(width, attention_width, dropout)

    def _pooled(self, tile_features: Tensor) -> tuple[Tensor, Tensor]:
        """The projected tiles `(N, width)`, and their weights `(N,)`."""
        hidden = relu(self.projection(tile_features))
        scores: Tensor = self.attention(hidden)
        return hidden, scores.softmax(0)

    def tile_weights(self, tile_features: Tensor) -> Tensor:
        """See `GatedSlideEncoder.tile_weights`."""
        return self._pooled(tile_features)[1]

    def embed(self, tile_features: Tensor, grid_cells: Tensor) -> Tensor:
        """See `PublishedSlideEncoder.embed`."""
        hidden, weights = self._pooled(tile_features)
        return weights @ hidden.to(weights.dtype)


class MADELEINE(GatedSlideEncoder):
    """MADELEINE (https://arxiv.org/abs/2408.02859): several gated attentions, each over its own part of projected tiles.

    This is `encode_he` of the published code, for slides stained with haematoxylin and eosin.

    Args:
        spec: Its facts.
        weights: Source and digest of the weights.
        width: Width of a head, and of the slide embedding.
        heads: Attentions.
        dropout: Share of values of the projection dropped in training.
        attention_dropout: Share of values of the attentions dropped in training.
    """

    PUBLISHED: Mapping[str, str] = {
        **{f"wsi_embedders.pre_attn.{i}": f"projection.{i}" for i in (0, 1, 4, 5, 8, 9)},
        **gated_names("attentions.{i}", "wsi_embedders.attn.{i}"),
        "projector": "head",
    }
    LEFT_OUT = ("token_projector.*",)

    def __init__(
        self,
        spec: PublishedSpec,
        weights: str,
        width: int = 512,
        heads: int = 4,
        dropout: float = 0.1,
        attention_dropout: float = 0.25,
    ) -> None:
        super().__init__(spec, weights)
        self.width = width
        widths = [spec.tile_dim, width, width, width * heads]
        self.projection = nn.Sequential()
        for before, after in pairwise(widths):
            self.projection.extend([nn.Linear(before, after), nn.LayerNorm(after), nn.GELU(), nn.Dropout(dropout)])
        self.attentions = nn.ModuleList(GatedAttention(width, width, attention_dropout) for _ in range(heads))
        self.head = nn.Linear(width * heads, width)

    def _pooled(self, tile_features: Tensor) -> tuple[Tensor, Tensor]:
        """The tiles of each head `(heads, N, width)`, and their weights `(heads, N)`."""
        heads = self.projection(tile_features).unflatten(-1, (self.width, len(self.attentions))).permute(2, 0, 1)
        scores = torch.stack([attention(tiles) for attention, tiles in zip(self.attentions, heads, strict=True)])
        return heads, scores.softmax(1)

    def tile_weights(self, tile_features: Tensor) -> Tensor:
        """See `GatedSlideEncoder.tile_weights`."""
        return self._pooled(tile_features)[1].mean(0)

    def embed(self, tile_features: Tensor, grid_cells: Tensor) -> Tensor:
        """See `PublishedSlideEncoder.embed`."""
        heads, weights = self._pooled(tile_features)
        pooled = (weights[:, None] @ heads.to(weights.dtype)).squeeze(1)  # (heads, width)
        embedding: Tensor = self.head(pooled.T.flatten())
        return embedding
