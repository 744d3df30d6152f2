"""PRISM's slide encoder: a Perceiver, whose latents read the tiles by cross-attention (https://arxiv.org/abs/2405.10254)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint as recompute

from .published import PublishedSlideEncoder
from .spec import PublishedSpec


class GatedFeedForward(nn.Module):
    """A layer norm and a feed-forward network with a gate of GELU.

    Args:
        width: Width of the tokens.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.into = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, width) -> the same, without the residual."""
        hidden, gate = self.into(self.norm(x)).chunk(2, -1)
        output: Tensor = self.out(hidden * gelu(gate))
        return output


class CrossAttention(nn.Module):
    """Latents read tiles, which are not normalised; then a feed-forward network.

    Args:
        width: Width of the latents.
        tile_dim: Length of a tile embedding.
    """

    def __init__(self, width: int, tile_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(tile_dim, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.ffn = GatedFeedForward(width)

    def keys_and_values(self, tile_features: Tensor) -> tuple[Tensor, Tensor]:
        """(N, tile_dim) -> keys and values (N, width)."""
        k, v = self.key_value(tile_features).chunk(2, -1)
        return k, v

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Latents (L, width), keys and values (N, width) -> latents."""
        attended = scaled_dot_product_attention(self.query(self.norm(x))[None, None], k[None, None], v[None, None])[
            0, 0
        ]
        x = x + self.out(attended)
        output: Tensor = x + self.ffn(x)
        return output


class LatentLayer(nn.Module):
    """Attention among the latents; then a feed-forward network.

    Args:
        width: Width of the latents.
        heads: Attention heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, bias=False)
        self.ffn = GatedFeedForward(width)

    def forward(self, x: Tensor) -> Tensor:
        """Latents (L, width) -> the same."""
        normed = self.norm(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        output: Tensor = x + self.ffn(x)
        return output


class PRISM(PublishedSlideEncoder):
    """PRISM's slide encoder: the first of its latents, after they have read the tiles several times.

    This is `slide_representations(...)["image_embedding"]` of the published code. The first reading has weights of its own,
    all further ones share theirs, and so do all rounds of attention among the latents.

    Args:
        spec: Its facts.
        weights: Source and digest of the weights.
        latents: Latents beside that of the slide embedding.
        width: Width of the latents and of the slide embedding.
        depth: How often the latents read the tiles, at least twice.
        layers: Layers of attention among the latents after each reading.
        heads: Their attention heads.
    """

    ROOT = "image_resampler."
    LEFT_OUT = ("image_resampler.img_norm.*",)
    SHARED: Mapping[str, str] = {
        r"perceiver\.layers\.([2-9]|\d\d+)\.xattn\.": "perceiver.layers.1.xattn.",
        r"perceiver\.layers\.\d+\.tf\.": "perceiver.layers.0.tf.",
    }
    PUBLISHED: Mapping[str, str] = {
        "perceiver.latents": "latents",
        "perceiver.layers.{i}.xattn.xattn.x_norm": "readings.{i}.norm",
        "perceiver.layers.{i}.xattn.xattn.to_q": "readings.{i}.query",
        "perceiver.layers.{i}.xattn.xattn.to_kv": "readings.{i}.key_value",
        "perceiver.layers.{i}.xattn.xattn.to_out": "readings.{i}.out",
        "perceiver.layers.{i}.xattn.ff.norm": "readings.{i}.ffn.norm",
        "perceiver.layers.{i}.xattn.ff.net.0": "readings.{i}.ffn.into",
        "perceiver.layers.{i}.xattn.ff.net.2": "readings.{i}.ffn.out",
        "perceiver.layers.0.tf.{i}.mhsa.norm": "layers.{i}.norm",
        "perceiver.layers.0.tf.{i}.mhsa.mha.in_proj_weight": "layers.{i}.attention.in_proj_weight",
        "perceiver.layers.0.tf.{i}.mhsa.mha.out_proj": "layers.{i}.attention.out_proj",
        "perceiver.layers.0.tf.{i}.ff.norm": "layers.{i}.ffn.norm",
        "perceiver.layers.0.tf.{i}.ff.net.0": "layers.{i}.ffn.into",
        "perceiver.layers.0.tf.{i}.ff.net.2": "layers.{i}.ffn.out",
        "cls_norm": "norm",
    }

    def __init__(
        self,
        spec: PublishedSpec,
        weights: str,
        latents: int = 512,
        width: int = 1280,
        depth: int = 8,
        layers: int = 6,
        heads: int = 8,
    ) -> None:
        super().__init__(spec, weights)
        if depth < 2:
            raise ValueError(f"depth {depth} must be at least 2")
        self.width = width
        self.depth = depth
        self.latents = nn.Parameter(torch.randn(1 + latents, width))
        self.readings = nn.ModuleList(CrossAttention(width, spec.tile_dim) for _ in range(2))
        self.layers = nn.ModuleList(LatentLayer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def embed(self, tile_features: Tensor, grid_cells: Tensor) -> Tensor:
        """See `PublishedSlideEncoder.embed`."""
        x: Tensor = self.latents
        for i in range(self.depth):
            reading = self.readings[min(i, 1)]
            assert isinstance(reading, CrossAttention)
            if i < 2:  # the later ones read the same keys and values
                k, v = reading.keys_and_values(tile_features)
            x = self._run(reading, x, k, v)
            for layer in self.layers:
                x = self._run(layer, x)
        normed: Tensor = self.norm(x[0])
        return normed

    def _run(self, module: nn.Module, *args: Tensor) -> Tensor:
        output: Tensor = recompute(module, *args, use_reentrant=False) if self.recomputes() else module(*args)
        return output
