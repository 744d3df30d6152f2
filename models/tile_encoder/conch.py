"""The vision towers of CONCH: a ViT whose tokens are pooled by attention (CoCa, https://arxiv.org/abs/2205.01917).

CONCH (https://doi.org/10.1038/s41591-024-02856-4) is a ViT-B/16 with an embedding of 512, before its projection into the
space of texts; CONCH v1.5, which TITAN reads, a ViT-L/16 with one of 768. Both see 448 pixels.
"""

import math
from typing import Any

import timm
import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn


class AttentionalPooler(nn.Module):
    """One learned query that attends to all tokens of an image.

    Args:
        width: Channels of the tokens.
        dim: Length of the embedding.
        heads: Heads of the attention.
        bias: Whether its linear layers have biases.
    """

    def __init__(self, width: int, dim: int, heads: int = 8, *, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.randn(1, dim))
        self.ln_q = nn.LayerNorm(dim)
        self.ln_k = nn.LayerNorm(width)
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_kv = nn.Linear(width, 2 * dim, bias=bias)
        self.to_out = nn.Linear(dim, dim, bias=bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Pool `(B, N, width)` tokens to `(B, dim)`."""
        query = self.to_q(self.ln_q(self.query)).expand(len(tokens), 1, -1)
        key, value = self.to_kv(self.ln_k(tokens)).chunk(2, dim=-1)
        query, key, value = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (query, key, value))
        pooled = nn.functional.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.to_out(pooled.transpose(1, 2).flatten(1))
        return out


class ConchTower(nn.Module):
    """A timm ViT with an attentional pooler, in the names of the published checkpoints."""

    def __init__(self, trunk: nn.Module, width: int, dim: int, *, bias: bool) -> None:
        super().__init__()
        self.trunk = trunk
        self.attn_pool_contrast = AttentionalPooler(width, dim, bias=bias)
        self.ln_contrast = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:
        """`(B, 3, H, W)` normalised images to `(B, dim)` embeddings."""
        trunk: timm.models.VisionTransformer = self.trunk  # type: ignore[assignment]
        out: Tensor = self.ln_contrast(self.attn_pool_contrast(trunk.forward_features(images)))
        return out

    def _grid(self) -> int:
        return int(self.trunk.patch_embed.grid_size[0])  # type: ignore[union-attr, index]


def _side(positions: Tensor) -> int:
    """Edge of the grid of patches that `(1, 1 + N, D)` position embeddings are for; 0 if they are for none."""
    side = math.isqrt(positions.shape[1] - 1) if positions.ndim == 3 and positions.shape[1] > 1 else 0
    return side if positions.ndim == 3 and side * side == positions.shape[1] - 1 else 0


class ConchV1(ConchTower):
    """CONCH's ViT-B/16."""

    def from_published(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of this tower out of `pytorch_model.bin`, which holds texts, captions and projections too.

        Position embeddings of another grid are resampled as the published code does.
        """
        left_out = ("attn_pool_caption.", "ln_caption.", "proj_contrast")
        ours = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
        ours = {key: value for key, value in ours.items() if not key.startswith(left_out)} or dict(state)
        pool = "attn_pool_contrast."
        attention = f"{pool}attn."
        parts = ("q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
        if all(attention + part in ours for part in parts):  # of nn.MultiheadAttention
            query, key, value, biases, weight, bias = (ours.pop(attention + part) for part in parts)
            width = len(query)
            ours |= {f"{pool}to_q.weight": query, f"{pool}to_kv.weight": torch.cat([key, value])}
            ours |= {f"{pool}to_q.bias": biases[:width], f"{pool}to_kv.bias": biases[width:]}
            ours |= {f"{pool}to_out.weight": weight, f"{pool}to_out.bias": bias}
        positions = ours.get("trunk.pos_embed")
        if positions is not None and _side(positions):
            grid = [self._grid()] * 2
            ours["trunk.pos_embed"] = resample_abs_pos_embed(
                positions, new_size=grid, num_prefix_tokens=1, interpolation="bilinear", antialias=False
            )
        return ours


class ConchV15(ConchTower):
    """CONCH v1.5's ViT-L/16."""

    def from_published(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The published tensors, with position embeddings of 14 x 14 patches resampled as the published forward does.

        It stretches them by 0.1 patches more than the image has, as DINO did against rounding errors.
        """
        positions = state.get("trunk.pos_embed")
        grid = self._grid()
        side = 0 if positions is None else _side(positions)
        if positions is None or side in (0, grid):
            return state
        patches = positions[:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
        stretch = (grid + 0.1) / side
        patches = nn.functional.interpolate(patches, scale_factor=(stretch, stretch), mode="bicubic")
        patches = patches.flatten(2).transpose(1, 2).to(positions)
        return state | {"trunk.pos_embed": torch.cat([positions[:, :1], patches], dim=1)}


def conch_v1(img_size: int = 448, **trunk_args: Any) -> ConchV1:
    """CONCH for images of `img_size` pixels; `trunk_args` are further arguments of timm's ViT."""
    trunk = timm.create_model("vit_base_patch16_224", img_size=img_size, num_classes=0, **trunk_args)
    return ConchV1(trunk, width=768, dim=512, bias=True)


def conch_v15(img_size: int = 448, **trunk_args: Any) -> ConchV15:
    """CONCH v1.5 for images of `img_size` pixels; `trunk_args` are further arguments of timm's ViT."""
    trunk = timm.create_model("vit_large_patch16_224", img_size=img_size, init_values=1.0, num_classes=0, **trunk_args)
    return ConchV15(trunk, width=1024, dim=768, bias=False)
