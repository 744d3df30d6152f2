"""Linear layers in float8, and how far embeddings are from those in float32."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

FLOAT8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FLOAT8).max


@dataclass(frozen=True)
class Fidelity:
    """How well embeddings of some tiles stand for those of the same tiles in float32.

    Attributes:
        mean_cosine: Mean over the tiles of the cosine of the two.
        least_cosine: The smallest of them.
        neighbours_kept: Share of the tiles whose nearest other tile, by cosine, is the same.
        tiles: How many tiles.
    """

    mean_cosine: float
    least_cosine: float
    neighbours_kept: float
    tiles: int

    def __str__(self) -> str:
        return (
            f"cosine to float32 {self.mean_cosine:.6f} on average and {self.least_cosine:.6f} at least, nearest neighbours "
            f"kept {self.neighbours_kept:.1%}, of {self.tiles} tiles"
        )


def fidelity(found: Tensor, exact: Tensor) -> Fidelity:
    """Compare embeddings with those in float32.

    Args:
        found: `(N, D)` embeddings of at least 2 tiles.
        exact: `(N, D)` embeddings of the same tiles in float32.
    """
    found, exact = (nn.functional.normalize(x.double(), dim=1) for x in (found, exact))
    cosine = (found * exact).sum(1)
    nearest = [(x @ x.T).fill_diagonal_(-2.0).argmax(1) for x in (found, exact)]
    kept = (nearest[0] == nearest[1]).double().mean()
    return Fidelity(cosine.mean().item(), cosine.min().item(), kept.item(), len(found))


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in float8 with a scale each.

    Args:
        x: `(M, K)` of any floating dtype.

    Returns:
        `(M, K)` float8 (e4m3) and `(M, 1)` float32, whose product is `x`, nearly.
    """
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=1e-12) / _LARGEST
    return (wide / scale).clamp(-_LARGEST, _LARGEST).to(FLOAT8), scale


class Float8Linear(nn.Module):
    """A linear layer whose inputs and weights are rounded to float8, each row by a scale of its own found as it comes.

    Args:
        linear: The layer, in float32 or as given; its sizes are multiples of 16.
        dtype: What the products are rounded to, before they take the dtype of what comes in: see `product_dtype`.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        weight, scale = quantise(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.T.contiguous())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """`(..., out)` of `(..., in)`."""
        rows, scale = quantise(x.flatten(0, -2))
        product = torch._scaled_mm(
            rows, self.weight.T, scale, self.scale, bias=self.bias, out_dtype=self.dtype, use_fast_accum=True
        )
        return product.to(x.dtype).view(*x.shape[:-1], product.shape[-1])


def fits_float8(module: nn.Module) -> bool:
    """Whether a module is a linear layer that can be one in float8."""
    return type(module) is nn.Linear and module.in_features % 16 == 0 and module.out_features % 16 == 0


def product_dtype(device: torch.device) -> torch.dtype:
    """What float8 products with a scale for each row come in: before Hopper only bfloat16."""
    return torch.float16 if torch.cuda.get_device_capability(device) >= (9, 0) else torch.bfloat16


def has_float8(device: torch.device) -> bool:
    """Whether a device multiplies float8: NVIDIA GPUs since Ada and Hopper."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
