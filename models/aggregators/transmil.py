"""TransMIL: a transformer over the tiles with Nyström attention and convolutions for positions (https://arxiv.org/abs/2106.00908)."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, relu

from ...errors import LongslideError
from .base import Aggregator, split_bags


class NystromAttention(nn.Module):
    """Softmax attention approximated through landmarks, with a convolution of the values as residual
    (https://arxiv.org/abs/2102.03902).

    Args:
        width: Width of the tokens; a multiple of `heads`.
        heads: Attention heads.
        landmarks: Landmarks.
        pinv_iterations: Iterations that approximate the pseudo-inverse.
        dropout: Share of values dropped after the attention.
    """

    def __init__(
        self, width: int, heads: int = 8, landmarks: int = 256, pinv_iterations: int = 6, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.heads = heads
        self.landmarks = landmarks
        self.iterations = pinv_iterations
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Sequential(nn.Linear(width, width), nn.Dropout(dropout))
        self.values = nn.Conv1d(heads, heads, 33, padding=16, groups=heads, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, width) -> (N, width): the tokens of one bag."""
        n = len(x)
        x = pad(x, (0, 0, -n % self.landmarks, 0))  # zero tokens in front, as published
        q, k, v = self.qkv(x).unflatten(1, (3, self.heads, -1)).permute(1, 2, 0, 3)  # each (heads, N, D)
        q = q * q.shape[-1] ** -0.5
        q_landmarks, k_landmarks = (t.unflatten(1, (self.landmarks, -1)).mean(2) for t in (q, k))
        to_landmarks = (q @ k_landmarks.mT).softmax(-1)
        among_landmarks = (q_landmarks @ k_landmarks.mT).softmax(-1)
        from_landmarks = (q_landmarks @ k.mT).softmax(-1)
        with torch.autocast(x.device.type, enabled=False):  # the iteration does not converge in half precision
            inverse = _pseudo_inverse(among_landmarks.to(self.qkv.weight.dtype), self.iterations)
        attended = (to_landmarks @ inverse.to(to_landmarks.dtype)) @ (from_landmarks @ v)
        # One kernel a head along the sequence, alike for all dimensions of the head.
        attended = attended + self.values(v.permute(2, 0, 1)).permute(1, 2, 0)
        output: Tensor = self.out(attended.transpose(0, 1).flatten(1))
        return output[-n:]


def _pseudo_inverse(x: Tensor, iterations: int) -> Tensor:
    """The Moore-Penrose inverse of `(..., M, M)` by the iteration of the Nyströmformer."""
    z = x.mT / (x.abs().sum(-1).max() * x.abs().sum(-2).max())
    identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    for _ in range(iterations):
        xz = x @ z
        z = 0.25 * z @ (13 * identity - xz @ (15 * identity - xz @ (7 * identity - xz)))
    return z


class PositionEncoding(nn.Module):
    """PPEG: the tiles laid out as a square, plus depthwise convolutions of it with kernels of 7, 5 and 3.

    Args:
        width: Width of the tokens.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width) for kernel in (7, 5, 3)
        )

    def forward(self, x: Tensor, side: int) -> Tensor:
        """(1 + side ** 2, width) -> the same: the class token, then the tiles."""
        image = x[1:].T.reshape(1, -1, side, side)
        encoded = image + torch.stack([convolution(image) for convolution in self.convolutions]).sum(0)
        return torch.cat([x[:1], encoded[0].flatten(1).T])


class TransMIL(Aggregator):
    """Two layers of Nyström attention around a convolutional position encoding; the class token is the bag's vector.

    As published, the tiles are laid out as a square in their order, with the first ones repeated to fill it: the positions
    are those of the sequence, not of the slide.

    Args:
        feature_dim: Length of a tile embedding.
        width: Width of the tokens; a multiple of `heads`.
        heads: Attention heads.
        landmarks: Landmarks of the Nyström attention.
        pinv_iterations: Iterations that approximate its pseudo-inverse.
        dropout: Share of values dropped after each attention.
    """

    def __init__(
        self,
        feature_dim: int,
        width: int = 512,
        heads: int = 8,
        landmarks: int = 256,
        pinv_iterations: int = 6,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if width % heads:
            raise LongslideError(f"width {width} must be a multiple of heads {heads}")
        self.width = width
        self.projection = nn.Linear(feature_dim, width)
        self.cls_token = nn.Parameter(torch.randn(1, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attentions = nn.ModuleList(
            NystromAttention(width, heads, landmarks, pinv_iterations, dropout) for _ in range(2)
        )
        self.positions = PositionEncoding(width)
        self.norm = nn.LayerNorm(width)

    def forward(self, tile_features: Tensor, grid_cells: Tensor, cu_seqlens: Tensor) -> Tensor:
        """See `Aggregator.forward`."""
        tokens = relu(self.projection(tile_features.to(self.projection.weight.dtype)))
        return torch.stack([self._one(bag) for bag in split_bags(tokens, cu_seqlens)])

    def _one(self, tiles: Tensor) -> Tensor:
        side = math.isqrt(len(tiles) - 1) + 1
        x = torch.cat([self.cls_token.to(tiles.dtype), tiles, tiles[: side**2 - len(tiles)]])
        x = x + self.attentions[0](self.norms[0](x))
        x = self.positions(x, side)
        x = x + self.attentions[1](self.norms[1](x))
        pooled: Tensor = self.norm(x[:1])[0]
        return pooled
