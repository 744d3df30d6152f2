"""Dilated attention in plain PyTorch: gather each branch's tokens, attend, merge by log-sum-exp.

All branches together are one softmax over the union of their keys. So the backward of a branch is the ordinary backward of
attention with the *merged* output and log-sum-exp in place of its own (as in ring attention), and the fused kernels of
PyTorch do both directions. Zero-key slots only add to the denominator; nothing is padded.
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .attend import attend, attend_backward


def gather_dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: Sequence[int],
    dilated_ratios: Sequence[int],
    is_causal: bool,
    scale: float,
) -> Tensor:
    """See `dilated_attention`. Memory grows linearly with the number of tokens."""
    branches = tuple(zip(segment_lengths, dilated_ratios, strict=True))
    output: Tensor = _GatherAttention.apply(q, k, v, branches, is_causal, scale)
    return output


class _GatherAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, branches: tuple[tuple[int, int], ...], is_causal: bool, scale: float
    ) -> Tensor:
        q, k, v = (x.contiguous() for x in (q, k, v))  # once, not for each piece
        batch, length, heads, dim = q.shape
        accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
        output = q.new_zeros(batch, length * heads, dim, dtype=accumulate)
        log_sum = q.new_full((batch, length * heads), -torch.inf, dtype=accumulate)
        for index, shape, zero_slots in _pieces(length, heads, branches, q.device):
            taken_q, taken_k, taken_v = (take(x, index, shape) for x in (q, k, v))
            piece, piece_sum = attend(taken_q, taken_k, taken_v, is_causal, scale)
            merge(output, log_sum, index, piece, piece_sum, 0 if is_causal else zero_slots)
        result = output.to(q.dtype).view(q.shape)
        ctx.save_for_backward(q, k, v, result, log_sum)
        ctx.settings = (branches, is_causal, scale)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, output, log_sum = ctx.saved_tensors
        branches, is_causal, scale = ctx.settings
        grad = grad.contiguous()
        batch, length, heads, dim = q.shape
        grads = [torch.zeros(batch, length * heads, dim, dtype=log_sum.dtype, device=q.device) for _ in range(3)]
        for index, shape, _ in _pieces(length, heads, branches, q.device):
            piece_sum = take(log_sum[..., None], index, shape)[..., 0]
            taken_grad, taken_q, taken_k, taken_v, taken_output = (
                take(x, index, shape) for x in (grad, q, k, v, output)
            )
            pieces = attend_backward(taken_grad, taken_q, taken_k, taken_v, taken_output, piece_sum, is_causal, scale)
            for total, piece in zip(grads, pieces, strict=True):
                total[:, index] += flat(piece, batch)  # a branch covers a token and head once: no index comes twice
        return (*(total.to(q.dtype).view(q.shape) for total in grads), None, None, None)


Piece = tuple[Tensor, tuple[int, int, int], int]
"""Flat indices `token * heads + head`, in the order (segment, slot, head); that shape; the number of zero-key slots."""


def _pieces(length: int, heads: int, branches: tuple[tuple[int, int], ...], device: torch.device) -> Iterator[Piece]:
    for segment_length, ratio in branches:
        yield from branch_pieces(length, heads, min(segment_length, length), ratio, device)


@lru_cache(maxsize=8)  # a few branches: every layer asks for the same ones
def branch_pieces(length: int, heads: int, width: int, ratio: int, device: torch.device) -> list[Piece]:
    """Parts of a branch with one number of real slots: (segments, slots, heads) that attend in one call.

    Returns:
        For each part the indices `token * heads + head`, flat, in the order (segment, slot, head); that shape; and the
        number of zero-key slots.
    """
    slots = math.ceil(width / ratio)
    offsets = torch.arange(heads) // math.ceil(heads / ratio)
    whole, tail = length // width * width, length % width
    pieces: list[Piece] = []
    for first, segments, extent in ((0, length // width, width), (whole, 1, tail)):
        real_slots = ((extent - offsets + ratio - 1) // ratio).clamp(min=0)
        for real in sorted(set(real_slots.tolist()) - {0}):
            chosen = torch.nonzero(real_slots == real).flatten()
            tokens = (
                first
                + torch.arange(segments)[:, None, None] * width
                + torch.arange(real)[None, :, None] * ratio
                + offsets[chosen]
            )
            index = (tokens * heads + chosen).flatten().to(device)
            pieces.append((index, (segments, real, len(chosen)), slots - real))
    return pieces


def take(x: Tensor, index: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """(B, L, H, D) or (B, L * H, D) -> (B * segments, heads, slots, D)."""
    segments, slots, heads = shape
    taken = x.reshape(len(x), -1, x.shape[-1])[:, index]
    return taken.view(len(x) * segments, slots, heads, -1).transpose(1, 2)


def flat(piece: Tensor, batch: int) -> Tensor:
    """(B * segments, heads, slots, D) -> (B, segments * slots * heads, D), the order of the indices."""
    return piece.transpose(1, 2).reshape(batch, -1, piece.shape[-1])


def merge(
    output: Tensor, log_sum: Tensor, index: Tensor, piece: Tensor, piece_sum: Tensor, zero_slots: int = 0
) -> None:
    """Take one piece's attention into the running softmax, in place.

    Args:
        output: `(B, L * H, D)` of the keys so far.
        log_sum: `(B, L * H)` log-sum-exp of their logits; `-inf` where there were none.
        index: Flat indices of the piece's queries; none comes twice.
        piece: `(B * segments, heads, slots, D)` attention to the piece's keys.
        piece_sum: `(B * segments, heads, slots)` log-sum-exp of their logits.
        zero_slots: Zero keys with zero values to add to the piece.
    """
    piece_sum = piece_sum.to(log_sum.dtype)
    if zero_slots:
        full_sum = torch.logaddexp(piece_sum, piece_sum.new_tensor(math.log(zero_slots)))
        piece = piece * (piece_sum - full_sum).exp()[..., None]
        piece_sum = full_sum
    piece, piece_sum = flat(piece, len(output)), flat(piece_sum[..., None], len(output))[..., 0]
    before = log_sum[:, index]
    merged = torch.logaddexp(before, piece_sum)
    output[:, index] = (
        output[:, index] * (before - merged).exp()[..., None] + piece * (piece_sum - merged).exp()[..., None]
    )
    log_sum[:, index] = merged
