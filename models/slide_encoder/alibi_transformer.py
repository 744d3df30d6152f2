"""Transformers over the tiles of a slide whose attention falls with their distance: TITAN and MOOZY's slide encoder."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint as recompute

from .published import PublishedSlideEncoder
from .spec import PublishedSpec

MOST_BIASES = 2**28
"""Biases (heads x queries x keys) that are in memory at once: 1 GiB in float32. More queries are worked on in blocks."""


def alibi_slopes(heads: int) -> list[float]:
    """How fast each head's attention falls with the distance in tiles (https://arxiv.org/abs/2108.12409)."""
    power = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    between = [2 ** (-4 * (i + 1) / power) for i in range(2 * power)][0::2]
    return slopes + between[: heads - power]


class Positions:
    """Where the tokens of one slide are, for the biases of its attention.

    Args:
        grid_cells: `(N, 2)` integer (column, row) of each tile.
        prefix: Tokens before the tiles, which are at no place: 0 is added to what they see and what sees them.
        slopes: `(heads,)` slopes.
        dtype: A floating dtype of at least 32 bits.
    """

    def __init__(self, grid_cells: Tensor, prefix: int, slopes: Tensor, dtype: torch.dtype) -> None:
        tokens = prefix + len(grid_cells)
        cells = (grid_cells - grid_cells.amin(0)).to(dtype)
        self.tokens = tokens
        self.prefix = prefix
        # Rows of biases begin at multiples of 32 bytes, which the fused kernels ask for.
        self.columns, self.rows = pad(cells.T, (prefix, -tokens % 16))
        self.slopes = slopes.to(dtype)

    def biases(self, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        """`(heads, end - begin, tokens)` of some queries: minus slope times Euclidean distance in tiles."""
        queries = slice(begin, end)
        away = torch.hypot(self.columns[queries, None] - self.columns, self.rows[queries, None] - self.rows)
        away[: max(0, self.prefix - begin)] = 0
        away[:, : self.prefix] = 0
        return (-self.slopes[:, None, None].to(dtype) * away.to(dtype))[..., : self.tokens]


class ALiBiAttention(nn.Module):
    """Softmax attention with a bias for the distance of tiles, exact, in blocks of queries.

    Its time grows with the square of the tiles, its memory with their number.

    Args:
        width: Width of the tokens.
        heads: Attention heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} must be a multiple of heads {heads}")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, positions: Positions) -> Tensor:
        """(tokens, width) -> the same."""
        q, k, v = self.qkv(x).unflatten(1, (3, self.heads, -1)).permute(1, 2, 0, 3)
        rows = max(1, MOST_BIASES // (self.heads * len(x)))
        blocks = []
        for begin in range(0, len(x), rows):
            end = min(begin + rows, len(x))
            block = (q[:, begin:end], k, v, positions, begin, end)
            if torch.is_grad_enabled() and rows < len(x):  # else the biases of all blocks would wait for the backward
                blocks.append(recompute(_attend, *block, use_reentrant=False))
            else:
                blocks.append(_attend(*block))
        attended = torch.cat(blocks, 1).transpose(0, 1).flatten(1)
        output: Tensor = self.out(attended)
        return output


def _attend(q: Tensor, k: Tensor, v: Tensor, positions: Positions, begin: int, end: int) -> Tensor:
    biases = positions.biases(begin, end, q.dtype)
    attended: Tensor = scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=biases[None])
    return attended[0]


class ALiBiLayer(nn.Module):
    """Attention and a feed-forward network, each after a layer norm and beside a residual.

    Args:
        width: Width of the tokens.
        heads: Attention heads.
        ffn_width: Width of the feed-forward network.
        eps: Epsilon of the layer norms.
        dropout: Share of values of the feed-forward network dropped in training.
    """

    def __init__(self, width: int, heads: int, ffn_width: int, eps: float, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=eps)
        self.attention = ALiBiAttention(width, heads)
        self.ffn_norm = nn.LayerNorm(width, eps=eps)
        self.ffn_in = nn.Linear(width, ffn_width)
        self.ffn_out = nn.Linear(ffn_width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, positions: Positions) -> Tensor:
        """(tokens, width) -> the same."""
        x = x + self.attention(self.attention_norm(x), positions)
        hidden = self.dropout(gelu(self.ffn_in(self.ffn_norm(x))))
        output: Tensor = x + self.dropout(self.ffn_out(hidden))
        return output


class ALiBiTransformer(PublishedSlideEncoder):
    """Tiles, projected, after a cls token and registers, through layers of attention with 2-D ALiBi.

    Args:
        spec: Its facts.
        weights: Source and digest of the weights.
        layers: Layers.
        width: Width of the tokens and of the slide embedding.
        heads: Attention heads.
        ffn_width: Width of the feed-forward networks.
        registers: Further tokens without a place.
        eps: Epsilon of the layer norms.
        dropout: Share of values of the feed-forward networks dropped in training.
    """

    READS_CELLS = True

    def __init__(
        self,
        spec: PublishedSpec,
        weights: str,
        *,
        layers: int,
        width: int,
        heads: int,
        ffn_width: int,
        registers: int,
        eps: float,
        dropout: float,
    ) -> None:
        super().__init__(spec, weights)
        self.width = width
        self.heads = heads
        self.tile_projection = nn.Linear(spec.tile_dim, width)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.registers = nn.Parameter(torch.randn(1, registers, width) * 0.02) if registers else None
        self.layers = nn.ModuleList(ALiBiLayer(width, heads, ffn_width, eps, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=eps)

    def tokens(self, tile_features: Tensor, grid_cells: Tensor) -> Tensor:
        """All tokens of one slide after the layers: cls, registers, tiles; `(1 + registers + N, width)`."""
        x = gelu(self.tile_projection(tile_features))
        before = [self.cls_token[0]] if self.registers is None else [self.cls_token[0], self.registers[0]]
        prefix = sum(map(len, before))
        x = torch.cat([*(tokens.to(x.dtype) for tokens in before), x])
        slopes = torch.tensor(alibi_slopes(self.heads), dtype=torch.float64, device=x.device)
        positions = Positions(grid_cells, prefix, slopes, torch.promote_types(torch.float32, tile_features.dtype))
        for layer in self.layers:
            x = recompute(layer, x, positions, use_reentrant=False) if self.recomputes() else layer(x, positions)
        normed: Tensor = self.norm(x)
        return normed


class TITAN(ALiBiTransformer):
    """TITAN's slide encoder (https://doi.org/10.1038/s41591-025-03982-3): all tokens, pooled by the attention of one query.

    This is `encode_slide_from_patch_features` of the published code. Tiles whose embedding is all zeros, which it takes for
    glass, are tiles here. The text halves have no part here.

    Args:
        spec: Its facts.
        weights: Source and digest of the weights.
        layers: Layers.
        width: Width of the tokens and of the slide embedding.
        heads: Attention heads of the layers.
        pool_heads: Attention heads of the pooling.
        ffn_width: Width of the feed-forward networks.
        dropout: Share of values of the feed-forward networks dropped in training.
    """

    ROOT = "vision_encoder."
    LEFT_OUT = ("vision_encoder.attn_pool.*", "vision_encoder.proj")
    PUBLISHED: Mapping[str, str] = {
        "cls_token": "cls_token",
        "patch_embed.0": "tile_projection",
        "blocks.modules_list.{i}.norm1": "layers.{i}.attention_norm",
        "blocks.modules_list.{i}.attn.qkv": "layers.{i}.attention.qkv",
        "blocks.modules_list.{i}.attn.proj": "layers.{i}.attention.out",
        "blocks.modules_list.{i}.norm2": "layers.{i}.ffn_norm",
        "blocks.modules_list.{i}.mlp.fc1": "layers.{i}.ffn_in",
        "blocks.modules_list.{i}.mlp.fc2": "layers.{i}.ffn_out",
        "norm": "norm",
        "attn_pool_contrastive.query": "query",
        "attn_pool_contrastive.ln_q": "query_norm",
        "attn_pool_contrastive.ln_k": "token_norm",
        "attn_pool_contrastive.attn.in_proj_weight": "pooling.in_proj_weight",
        "attn_pool_contrastive.attn.in_proj_bias": "pooling.in_proj_bias",
        "attn_pool_contrastive.attn.out_proj": "pooling.out_proj",
    }

    def __init__(
        self,
        spec: PublishedSpec,
        weights: str,
        layers: int = 6,
        width: int = 768,
        heads: int = 12,
        pool_heads: int = 8,
        ffn_width: int = 3072,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            spec,
            weights,
            layers=layers,
            width=width,
            heads=heads,
            ffn_width=ffn_width,
            registers=0,
            eps=1e-6,
            dropout=dropout,
        )
        self.query = nn.Parameter(torch.randn(1, width))
        self.query_norm = nn.LayerNorm(width)
        self.token_norm = nn.LayerNorm(width)
        self.pooling = nn.MultiheadAttention(width, pool_heads)

    def embed(self, tile_features: Tensor, grid_cells: Tensor) -> Tensor:
        """See `PublishedSlideEncoder.embed`."""
        tokens = self.token_norm(self.tokens(tile_features, grid_cells))
        pooled: Tensor = self.pooling(self.query_norm(self.query), tokens, tokens, need_weights=False)[0]
        return pooled[0]


class MOOZY(ALiBiTransformer):
    """MOOZY's slide encoder (https://arxiv.org/abs/2603.27048): the cls token. Its case transformer is an aggregator.

    Args:
        spec: Its facts.
        weights: Source and digest of the weights.
        layers: Layers.
        width: Width of the tokens and of the slide embedding.
        heads: Attention heads.
        ffn_width: Width of the feed-forward networks.
        registers: Further tokens without a place.
        dropout: Share of values of the feed-forward networks dropped in training.
    """

    LEFT_OUT = ("mask_token", "*pos_bias.slopes")
    PUBLISHED: Mapping[str, str] = {
        "cls_token": "cls_token",
        "register_tokens": "registers",
        "input_proj.0": "tile_projection",
        "blocks.{i}.norm1": "layers.{i}.attention_norm",
        "blocks.{i}.q_proj": "layers.{i}.attention.qkv[0]",
        "blocks.{i}.k_proj": "layers.{i}.attention.qkv[1]",
        "blocks.{i}.v_proj": "layers.{i}.attention.qkv[2]",
        "blocks.{i}.out_proj": "layers.{i}.attention.out",
        "blocks.{i}.norm2": "layers.{i}.ffn_norm",
        "blocks.{i}.fc1": "layers.{i}.ffn_in",
        "blocks.{i}.fc2": "layers.{i}.ffn_out",
        "norm": "norm",
    }

    def __init__(
        self,
        spec: PublishedSpec,
        weights: str,
        layers: int = 6,
        width: int = 768,
        heads: int = 12,
        ffn_width: int = 3072,
        registers: int = 4,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(
            spec,
            weights,
            layers=layers,
            width=width,
            heads=heads,
            ffn_width=ffn_width,
            registers=registers,
            eps=1e-5,
            dropout=dropout,
        )

    def embed(self, tile_features: Tensor, grid_cells: Tensor) -> Tensor:
        """See `PublishedSlideEncoder.embed`."""
        return self.tokens(tile_features, grid_cells)[0]
