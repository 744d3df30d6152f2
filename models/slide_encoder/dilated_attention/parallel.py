"""Dilated attention of sequences spread over the ranks of a process group (https://arxiv.org/abs/2307.02486, section 3).

Each rank holds a part of every sequence, any number of tokens in a row, and computes what concerns its own tokens, by the
same kernels as one GPU alone: outputs and gradients of queries by a walk over keys, gradients of keys and values by a walk
over queries. What these walks meet of other ranks' tokens is fetched before: in the forward keys and values, in the backward
queries and the gradients of the outputs, with log-sum-exps and inner products in their spare columns. Nothing is summed
over ranks, and a token's softmax is one, so that results are those of one GPU and the same in every run. What needs own
tokens only is computed while the others' are on their way: in the forward the blocks of classes that no long branch covers,
in the backward the gradients of the queries.

With H heads of D dimensions, rounded up to DP, in numbers of s bytes, a layer and a sequence take on rank p of its n tokens
    held      3 n H DP s      queries, keys and values, and what was fetched of each
    received  2 H DP s x      in the forward, and as much in the backward
    x         <= sum over branches of (E - n) / r + 2: E counts the tokens of all segments that meet the part, so that
              E <= min(L, n + 2 (w - 1)), and E = n where the part's borders are borders of segments. (For the largest
              ratio twice that, for classes go by half of it.)
What travels depends on segment lengths w and ratios r, not on L: less than 2 w / r tokens a branch, on any number of ranks.
A branch over everything (w = L) costs L / r, which does not grow either where r grows with w, as the paper has it.
`benchmarks/sequence_parallel.py` measures it.

Where there are no kernels (see `dilated_attention`) every rank computes the attention of whole sequences: no faster.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ....errors import LongslideError
from . import dilated_attention, takes_kernels
from .windows import make_windows


@dataclass(frozen=True)
class SequenceShards:
    """How sequences are spread over the ranks of a process group: in a row, in the order of the ranks.

    Attributes:
        group: The process group.
        rank: This process's rank in it.
        lengths: Tokens of each sequence on each rank, `lengths[rank][sequence]`; some may be 0.
    """

    group: dist.ProcessGroup
    rank: int
    lengths: tuple[tuple[int, ...], ...]

    @classmethod
    def agree(cls, lengths: Sequence[int], group: dist.ProcessGroup, device: torch.device) -> "SequenceShards":
        """Tell the other ranks how many tokens of each sequence this one holds, and hear it of them.

        All ranks call it together, for the same sequences.

        Raises:
            LongslideError: They have different numbers of sequences; on every rank, for none would hear of the others'.
        """

        def gathered(own: Tensor) -> list[list[int]]:
            everyone = [torch.zeros_like(own) for _ in range(group.size())]
            dist.all_gather(everyone, own, group=group)
            counts: list[list[int]] = torch.stack(everyone).tolist()
            return counts

        numbers = [number for [number] in gathered(torch.tensor([len(lengths)], device=device))]
        if len(set(numbers)) > 1:
            raise LongslideError(
                f"the ranks that share slides have {', '.join(map(str, numbers))} slides in one batch: each needs a part of "
                "every slide, an empty one where it has no tiles of it; see own_parts"
            )
        lengths_of_all = gathered(torch.tensor(lengths, device=device))
        return cls(group, group.rank(), tuple(map(tuple, lengths_of_all)))

    @property
    def totals(self) -> list[int]:
        """Tokens of each whole sequence."""
        return [sum(counts) for counts in zip(*self.lengths, strict=True)]

    def sum(self, x: Tensor) -> Tensor:
        """The sum of the ranks' tensors, on every rank. Its gradient is the sum of the gradients on all ranks."""
        summed: Tensor = _Sum.apply(x, self.group)
        return summed

    def first(self, x: Tensor) -> Tensor:
        """The tensor of the first rank, on every rank; it has no gradient."""
        x = x.contiguous()
        dist.broadcast(x, group=self.group, group_src=0)
        return x

    def rows(self) -> Tensor:
        """Where this rank's tokens are among those of whole sequences end to end."""
        counts = torch.tensor(self.lengths)
        total, own = counts.sum(0), counts[self.rank]
        first = total.cumsum(0) - total + counts[: self.rank].sum(0)
        return torch.cat([torch.arange(at, at + count) for at, count in zip(first.tolist(), own.tolist(), strict=True)])


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def parallel_dilated_self_attention(
    qkv: Tensor,
    segment_lengths: Sequence[int],
    dilated_ratios: Sequence[int],
    cu_seqlens: Tensor,
    shards: SequenceShards,
    is_causal: bool = False,
    *,
    backend: Literal["auto", "gather", "fused"] = "auto",
) -> Tensor:
    """`dilated_attention` of sequences of which this rank holds a part each. All ranks of the group call it together.

    The gradients are those of the sum of what all ranks differentiate.

    Args:
        qkv: `(T, 3, H, D)` queries, keys and values of this rank's tokens, its parts of the sequences end to end; T may be
            0. H, D and the dtype are the same on all ranks.
        segment_lengths: As in `dilated_attention`.
        dilated_ratios: As in `dilated_attention`.
        cu_seqlens: `(B + 1,)` int32 on the device of `qkv`: where each part begins, and T. A part may be empty.
        shards: How the sequences are spread over the ranks.
        is_causal: As in `dilated_attention`.
        backend: As in `dilated_attention`.

    Returns:
        `(T, H, D)`, of the dtype of `qkv`.

    Raises:
        ValueError: Shapes or branches do not fit.
    """
    own = shards.lengths[shards.rank]
    if qkv.ndim != 4 or qkv.shape[1] != 3 or len(qkv) != sum(own) or len(cu_seqlens) != len(own) + 1:
        raise ValueError(
            f"qkv must be ({sum(own)}, 3, H, D) of {len(own)} sequences on rank {shards.rank}, not {tuple(qkv.shape)} of "
            f"{len(cu_seqlens) - 1}"
        )
    if len(segment_lengths) != len(dilated_ratios) or min([*segment_lengths, *dilated_ratios], default=0) < 1:
        raise ValueError(
            f"segment_lengths {segment_lengths} and dilated_ratios {dilated_ratios} must be positive, one of each a branch"
        )
    if takes_kernels(qkv, dilated_ratios, qkv.shape[-1] ** -0.5, backend):
        from .fused import fused_dilated_self_attention

        widths, ratios = tuple(map(int, segment_lengths)), tuple(map(int, dilated_ratios))
        windows = make_windows(shards.lengths, shards.group, qkv.shape[2], widths, ratios, qkv.device)
        return fused_dilated_self_attention(qkv, cu_seqlens, widths, ratios, is_causal, windows)
    rows = shards.rows().to(qkv.device)
    whole = shards.sum(qkv.new_zeros(sum(shards.totals), *qkv.shape[1:]).index_copy(0, rows, qkv))
    ends = torch.tensor([0, *itertools.accumulate(shards.totals)], dtype=torch.int32, device=qkv.device)
    q, k, v = whole.unbind(1)
    attended = dilated_attention(q, k, v, segment_lengths, dilated_ratios, is_causal, cu_seqlens=ends, backend="gather")
    return attended[rows]
