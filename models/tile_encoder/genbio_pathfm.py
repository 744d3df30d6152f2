"""GenBio-PathFM (https://doi.org/10.1101/2026.03.17.712534): a ViT-g/16 as of DINOv3 that sees each colour for itself."""

import math

import torch
from torch import Tensor, nn


class GenBioPathFM(nn.Module):
    """The network, in the names of the published checkpoint.

    Positions are rotations of queries and keys, in bfloat16 whatever the weights are in: so it was trained.

    Args:
        width: Channels of a token.
        depth: Blocks.
        heads: Heads of the attention.
        img_size: Edge of the image, in pixels; a multiple of 16.
    """

    def __init__(self, width: int = 1536, depth: int = 40, heads: int = 24, img_size: int = 224) -> None:
        super().__init__()
        self.grid = img_size // 16
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(1, width, kernel_size=16, stride=16)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.storage_tokens = nn.Parameter(torch.randn(1, 4, width) * 0.02)
        self.rope_embed = nn.Module()
        frequencies = width // heads // 4
        self.rope_embed.register_buffer("periods", (100 ** (torch.arange(frequencies) / frequencies)).bfloat16())
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        """`(B, 3, img_size, img_size)` normalised images to `(B, 3 * width)`: the class tokens of red, green and blue."""
        channels = images.flatten(0, 1).unsqueeze(1)
        patches = self.patch_embed.proj(channels).flatten(2).transpose(1, 2)  # type: ignore[operator]
        prefix = torch.cat([self.cls_token, self.storage_tokens], dim=1)
        tokens = torch.cat([prefix.expand(len(patches), -1, -1), patches], dim=1)
        sine, cosine = self._rotations()
        for block in self.blocks:
            tokens = block(tokens, sine, cosine)
        out: Tensor = self.norm(tokens[:, 0]).unflatten(0, (len(images), 3)).flatten(1)
        return out

    def _rotations(self) -> tuple[Tensor, Tensor]:
        """Sine and cosine `(patches, width / heads)` of the patches' places, row then column."""
        periods: Tensor = self.rope_embed.periods.bfloat16()  # type: ignore[assignment]
        centres = torch.arange(0.5, self.grid, device=periods.device, dtype=torch.bfloat16) / self.grid
        places = 2.0 * torch.cartesian_prod(centres, centres) - 1.0
        angles = (2 * math.pi * places[:, :, None] / periods).flatten(1).tile(2)
        return angles.sin(), angles.cos()


class Block(nn.Module):
    """Attention and a SwiGLU, each with a layer norm before and a scale after it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.ls1 = Scale(width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = SwiGLU(width, math.ceil(int(4 * width * 2 / 3) / 64) * 64)
        self.ls2 = Scale(width)

    def forward(self, tokens: Tensor, sine: Tensor, cosine: Tensor) -> Tensor:
        """`(B, N, width)` to the same."""
        tokens = tokens + self.ls1(self.attn(self.norm1(tokens), sine, cosine))
        out: Tensor = tokens + self.ls2(self.mlp(self.norm2(tokens)))
        return out


class Attention(nn.Module):
    """Self-attention in which the patches' queries and keys are rotated by their places."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor, sine: Tensor, cosine: Tensor) -> Tensor:
        """`(B, N, width)` to the same."""
        query, key, value = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = (_rotated(one, sine, cosine).to(one.dtype) for one in (query, key))
        seen = nn.functional.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.proj(seen.transpose(1, 2).flatten(2))
        return out


def _rotated(one: Tensor, sine: Tensor, cosine: Tensor) -> Tensor:
    one = one.to(sine.dtype)
    count = one.shape[-2] - len(sine)
    prefix, patches = one[..., :count, :], one[..., count:, :]
    first, second = patches.chunk(2, dim=-1)
    return torch.cat([prefix, patches * cosine + torch.cat([-second, first], dim=-1) * sine], dim=-2)


class SwiGLU(nn.Module):
    """`w3(silu(w1(x)) * w2(x))`."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden)
        self.w2 = nn.Linear(width, hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """`(B, N, width)` to the same."""
        out: Tensor = self.w3(nn.functional.silu(self.w1(tokens)) * self.w2(tokens))
        return out


class Scale(nn.Module):
    """A learned factor for each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 1e-5))

    def forward(self, tokens: Tensor) -> Tensor:
        """`(B, N, width)` to the same."""
        return tokens * self.gamma
