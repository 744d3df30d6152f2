"""A layer norm and the linear layer behind it as one step: what lies between the matrix products of a transformer layer.

On a GPU the residual's sum, GELU and the norm are one pass over the data in Triton, forward and backward, and only the
input is kept for the backward: the normalised values are computed again there, in the pass that needs them anyway.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu as exact_gelu

from .dilated_attention import has_kernels


def norm_linear(
    x: Tensor, norm: nn.LayerNorm, linear: nn.Linear, *, residual: Tensor | None = None, gelu: bool = False
) -> tuple[Tensor, Tensor]:
    """`linear(norm(x))`, of `residual + x` or of `gelu(x)` where asked for.

    Args:
        x: `(T, width)` of any floating dtype.
        norm: The norm over the width.
        linear: The linear layer behind it.
        residual: `(T, width)` to be added to `x` first.
        gelu: Whether x goes through GELU (the exact one) first.

    Returns:
        `(T, out)` in the autocast dtype, or the dtype of the weights; and what was normalised (before GELU): `residual + x`,
        or `x`.
    """
    if has_kernels(x) and x.shape[0] and x.dtype != torch.float64:
        from .norm_linear_fused import fused_norm_linear  # imports triton, which not every machine has

        return fused_norm_linear(x, norm, linear, residual, gelu)
    total = x if residual is None else residual + x
    output: Tensor = linear(norm(exact_gelu(total) if gelu else total))
    return output, total
