"""Dilated attention in Triton: all branches in one softmax, forward and backward.

Tokens are taken in residue classes of half the largest ratio R: within a segment a branch of a smaller ratio covers either
every token of a class or none, so a block of one class streams exactly the keys of the branches that cover it, and no
branch has an output of its own. In the classes of which R's branch covers every second token, one block takes those tokens
and its neighbour the others. Zero-key slots are added to the denominator by arithmetic. A block that straddles a segment's
border goes through the keys of both segments, each for its own rows.

Sequences are packed end to end; programs find theirs by the cumulative lengths, so that no table is made and lengths never
come to the host. No atomics: results are the same in every run.

Branches share keys: where a segment lies within that of a branch whose ratio is a multiple, the keys of the latter in there
are among those of the former. These are scored once and count as often as branches have them (`MERGE`).

Files: `layout` (what the kernels read), `walk` (which keys a block meets, once for all kernels), `forward`, `backward`,
`schedule` (block sizes, grid, table of branches), `op` (the torch operations).

Names that all kernels share:

| name | what it is |
|---|---|
| T, H, D | tokens of all sequences, heads, head dimension |
| DP | columns of a row of the arrangement: D rounded up to a power of two |
| SPARE | whether DP leaves three columns over, for what `layout` says |
| R, S | the largest ratio; the number of classes, R / 2 |
| NB, LARGEST | number of branches; the one of R |
| BM, BN | rows of a block; keys taken at a time |
| MERGE | whether keys that branches share are scored once |
| ONE | what a one in the keys stands for: 256 in float16, whose range is small |
| PRECISION | of float32 products: `tf32x3`, or `tf32` where torch is set so |
| lse | base-2 log-sum-exp of the logits of a token and head |
| inner | inner product of a token's output and its gradient |
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from ..windows import Windows
from .op import SelfAttention, attend, attention_op


@cache
def eligible(dtype: torch.dtype, head_dim: int, dilated_ratios: tuple[int, ...], scale: float = 1.0) -> bool:
    """Whether the kernels take tensors of this kind: ratios are powers of two, head dimension up to 128."""
    return (
        dtype in (torch.float16, torch.bfloat16, torch.float32)
        and head_dim <= 128
        and max(dilated_ratios) <= 64
        and all(ratio & (ratio - 1) == 0 for ratio in dilated_ratios)
        and scale > 0
    )


def fused_dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    segment_lengths: Sequence[int],
    dilated_ratios: Sequence[int],
    is_causal: bool,
    scale: float,
) -> Tensor:
    """See `dilated_attention`, on packed sequences. Memory: a copy of q, k and v, each head's columns rounded up to a power
    of two (48 to 64), the output and a float32 per token and head."""
    output: Tensor
    output, _ = attention_op(q, k, v, cu_seqlens, list(segment_lengths), list(dilated_ratios), is_causal, scale)
    return output


def fused_dilated_self_attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    segment_lengths: Sequence[int],
    dilated_ratios: Sequence[int],
    is_causal: bool = False,
    windows: Windows | None = None,
) -> Tensor:
    """`fused_dilated_attention` of the projection `(T, 3, H, D)` of packed sequences, `windows` of them on this rank:
    `(T, H, D)`."""
    settings = (tuple(segment_lengths), tuple(dilated_ratios), is_causal, qkv.shape[3] ** -0.5)
    if windows is None and torch.compiler.is_compiling():
        q, k, v = qkv.unbind(1)
        return fused_dilated_attention(q, k, v, cu_seqlens, *settings)
    if not (torch.is_grad_enabled() and qkv.requires_grad):
        return attend(qkv, cu_seqlens, *settings, windows)[1]
    output: Tensor = SelfAttention.apply(qkv, cu_seqlens, *settings, windows)
    return output
