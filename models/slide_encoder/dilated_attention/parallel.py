"""Dilated attention of one sequence spread over the ranks of a process group (https://arxiv.org/abs/2307.02486, section 3).

Rank p holds n_p tokens in a row, any number of them, of L in all. Queries never travel. Of the segments that cross a
border of its shard (at most two a branch) a rank is sent the keys and values that its queries see and others hold: per head
only the slots offset + r * j, and a token and head that several branches ask for only once. All of a layer's go in one
all-to-all whose sizes every rank knows by arithmetic; what needs own tokens only is computed while it runs. The backward
sends the gradients of these keys and values back the same way, and adds them in the order of the ranks: results are the same
in every run.

With H heads of D dimensions in numbers of s bytes, a layer and a sequence take on rank p
    held      3 n_p H D s     queries, keys and values; as much again for their gradients, and n_p H D s for the output
    received  2 H D s x       keys and values, kept for the backward, which sends as many bytes back
    x         <= sum over branches of (E - n_p) / r + 2: E counts the tokens of all segments that meet the shard, so that
              E <= min(L, n_p + 2 (w - 1)), and E = n_p where the shard's borders are borders of segments. Causal: only
              the tokens before the shard count.
What travels depends on segment lengths w and ratios r, not on L: less than 2 w / r tokens a branch, on any number of ranks.
A branch over everything (w = L) costs L / r, which does not grow either where r grows with w, as the paper has it.

One billion tokens with GigaPath's branches (H D = 768, bfloat16; segments of 1,024 to 1,048,576, ratios 1 to 16), as
`make_plan` counts them: on 1,024 ranks n = 976,563, x = 97,000: a rank holds 1.5 GB for each of its tensors and receives
0.30 GB a layer (3.4 GB if all keys of those segments travelled); on 256 ranks it holds 6.0 GB and receives up to 0.36 GB;
on 64 ranks 24 GB and 0.30 GB. `benchmarks/sequence_parallel.py` measures it.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .attend import attend, attend_backward
from .gather import flat, merge, take
from .parallel_plan import Plan, make_plan


@dataclass(frozen=True)
class SequenceShards:
    """How a sequence is spread over the ranks of a process group: in a row, in the order of the ranks.

    Attributes:
        group: The process group.
        rank: This process's rank in it.
        lengths: Tokens on each rank; some may be 0.
    """

    group: dist.ProcessGroup
    rank: int
    lengths: tuple[int, ...]

    @classmethod
    def agree(cls, length: int, group: dist.ProcessGroup, device: torch.device) -> "SequenceShards":
        """Tell the other ranks how many tokens this one holds, and hear it of them. All ranks call it together."""
        lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(group.size())]
        dist.all_gather(lengths, torch.tensor([length], device=device), group=group)
        return cls(group, group.rank(), tuple(torch.cat(lengths).tolist()))

    @property
    def total(self) -> int:
        """Tokens of the whole sequence."""
        return sum(self.lengths)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of the ranks' tensors, on every rank. Its gradient is the sum of the gradients on all ranks."""
        summed: Tensor = _Sum.apply(x, self.group)
        return summed

    def first(self, x: Tensor) -> Tensor:
        """The tensor of the first rank, on every rank; it has no gradient."""
        x = x.contiguous()
        dist.broadcast(x, group=self.group, group_src=0)
        return x


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


def parallel_dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: Sequence[int],
    dilated_ratios: Sequence[int],
    is_causal: bool = False,
    *,
    shards: SequenceShards,
    scale: float | None = None,
) -> Tensor:
    """`dilated_attention` of a sequence of which this rank holds a part. All ranks of the group call it together.

    The gradients are those of the sum of what all ranks differentiate.

    Args:
        q: `(B, n, H, D)` queries of this rank's tokens; n may be 0. B, H, D and the dtype are the same on all ranks.
        k: `(B, n, H, D)` keys.
        v: `(B, n, H, D)` values.
        segment_lengths: As in `dilated_attention`.
        dilated_ratios: As in `dilated_attention`.
        is_causal: As in `dilated_attention`.
        shards: How the sequence is spread over the ranks.
        scale: As in `dilated_attention`.

    Returns:
        `(B, n, H, D)`, of the dtype of `q`.

    Raises:
        ValueError: Shapes or branches do not fit.
    """
    if q.ndim != 4 or q.shape != k.shape or q.shape != v.shape or q.shape[1] != shards.lengths[shards.rank]:
        raise ValueError(
            f"q, k and v must be (B, {shards.lengths[shards.rank]}, H, D) on rank {shards.rank}, not "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if len(segment_lengths) != len(dilated_ratios) or min([*segment_lengths, *dilated_ratios], default=0) < 1:
        raise ValueError(
            f"segment_lengths {segment_lengths} and dilated_ratios {dilated_ratios} must be positive, one of each a branch"
        )
    branches = tuple((min(int(w), shards.total), int(r)) for w, r in zip(segment_lengths, dilated_ratios, strict=True))
    plan = make_plan(shards.lengths, shards.rank, q.shape[2], branches, is_causal, q.device)
    output: Tensor = _ParallelAttention.apply(
        q, k, v, plan, shards.group, is_causal, q.shape[-1] ** -0.5 if scale is None else scale
    )
    return output


class _ParallelAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: Plan,
        group: dist.ProcessGroup,
        is_causal: bool,
        scale: float,
    ) -> Tensor:
        q, k, v = (x.contiguous() for x in (q, k, v))
        batch, length, heads, dim = q.shape
        sent = torch.stack([x.view(batch, -1, dim)[:, plan.send] for x in (k, v)], dim=2).transpose(0, 1).contiguous()
        received = sent.new_empty(sum(plan.receive_sizes), batch, 2, dim)
        work = _exchange(received, sent, plan.receive_sizes, plan.send_sizes, group)

        accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
        output = q.new_zeros(batch, length * heads, dim, dtype=accumulate)
        log_sum = q.new_full((batch, length * heads), -torch.inf, dtype=accumulate)
        for index, shape, zero_slots in plan.own:
            taken_q, taken_k, taken_v = (take(x, index, shape) for x in (q, k, v))
            piece, piece_sum = attend(taken_q, taken_k, taken_v, is_causal, scale)
            merge(output, log_sum, index, piece, piece_sum, 0 if is_causal else zero_slots)
        work.wait()
        received_k, received_v = received.transpose(0, 1).unbind(2)
        for other in plan.others:
            taken_k, taken_v = (take(x, other.keys, other.key_shape) for x in (received_k, received_v))
            piece, piece_sum = attend(take(q, other.queries, other.query_shape), taken_k, taken_v, False, scale)
            merge(output, log_sum, other.queries, piece, piece_sum)

        result = output.to(q.dtype).view(q.shape)
        ctx.save_for_backward(q, k, v, result, log_sum, received_k, received_v)
        ctx.settings = (plan, group, is_causal, scale)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, output, log_sum, received_k, received_v = ctx.saved_tensors
        plan, group, is_causal, scale = ctx.settings
        grad = grad.contiguous()
        batch, length, heads, dim = q.shape
        grads = [torch.zeros(batch, length * heads, dim, dtype=log_sum.dtype, device=q.device) for _ in range(3)]
        back = [torch.zeros(received_k.shape, dtype=log_sum.dtype, device=q.device) for _ in range(2)]
        for other in plan.others:
            taken_grad, taken_q, taken_output, taken_sum = (
                take(x, other.queries, other.query_shape) for x in (grad, q, output, log_sum[..., None])
            )
            taken_k, taken_v = (take(x, other.keys, other.key_shape) for x in (received_k, received_v))
            pieces = attend_backward(
                taken_grad, taken_q, taken_k, taken_v, taken_output, taken_sum[..., 0], False, scale
            )
            grads[0][:, other.queries] += flat(pieces[0], batch)
            for total, piece in zip(back, pieces[1:], strict=True):
                total[:, other.keys] += flat(piece, batch)
        sent = torch.stack(back, dim=2).to(q.dtype).transpose(0, 1).contiguous()
        returned = sent.new_empty(sum(plan.send_sizes), batch, 2, dim)
        work = _exchange(returned, sent, plan.send_sizes, plan.receive_sizes, group)

        for index, shape, _ in plan.own:
            taken_grad, taken_q, taken_k, taken_v, taken_output, taken_sum = (
                take(x, index, shape) for x in (grad, q, k, v, output, log_sum[..., None])
            )
            pieces = attend_backward(
                taken_grad, taken_q, taken_k, taken_v, taken_output, taken_sum[..., 0], is_causal, scale
            )
            for total, piece in zip(grads, pieces, strict=True):
                total[:, index] += flat(piece, batch)
        work.wait()
        ends = itertools.accumulate(plan.send_sizes)
        for size, end in zip(plan.send_sizes, ends, strict=True):
            part = slice(end - size, end)  # one rank asks for a token and head once: no index comes twice
            for which, total in enumerate(grads[1:]):
                total[:, plan.send[part]] += returned[part, :, which].transpose(0, 1)
        return (*(total.to(q.dtype).view(q.shape) for total in grads), None, None, None, None)


def _exchange(
    received: Tensor, sent: Tensor, receive_sizes: list[int], send_sizes: list[int], group: dist.ProcessGroup
) -> dist.Work:
    work = dist.all_to_all_single(received, sent, receive_sizes, send_sizes, group=group, async_op=True)
    assert work is not None
    return work
