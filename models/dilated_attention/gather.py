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
            taken_q, taken_k, taken_v = (_take(x, index, shape) for x in (q, k, v))
            piece, piece_sum = attend(taken_q, taken_k, taken_v, is_causal, scale)
            piece_sum = piece_sum.to(accumulate)
            if zero_slots and not is_causal:
                full_sum = torch.logaddexp(piece_sum, piece_sum.new_tensor(math.log(zero_slots)))
                piece = piece * (piece_sum - full_sum).exp()[..., None]
                piece_sum = full_sum
            piece, piece_sum = _flat(piece, batch), _flat(piece_sum[..., None], batch)[..., 0]
            before = log_sum[:, index]
            merged = torch.logaddexp(before, piece_sum)
            output[:, index] = (
                output[:, index] * (before - merged).exp()[..., None] + piece * (piece_sum - merged).exp()[..., None]
            )
            log_sum[:, index] = merged
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
            piece_sum = _take(log_sum.view(batch, length, heads, 1), index, shape)[..., 0]
            taken_grad, taken_q, taken_k, taken_v, taken_output = (
                _take(x, index, shape) for x in (grad, q, k, v, output)
            )
            pieces = attend_backward(taken_grad, taken_q, taken_k, taken_v, taken_output, piece_sum, is_causal, scale)
            for total, piece in zip(grads, pieces, strict=True):
                total[:, index] += _flat(piece, batch)  # a branch covers a token and head once: no index comes twice
        return (*(total.to(q.dtype).view(q.shape) for total in grads), None, None, None)


_Piece = tuple[Tensor, tuple[int, int, int], int]


def _pieces(length: int, heads: int, branches: tuple[tuple[int, int], ...], device: torch.device) -> Iterator[_Piece]:
    for segment_length, ratio in branches:
        yield from _branch_pieces(length, heads, min(segment_length, length), ratio, device)


@lru_cache(maxsize=8)  # a few branches: every layer asks for the same ones
def _branch_pieces(length: int, heads: int, width: int, ratio: int, device: torch.device) -> list[_Piece]:
    """Parts of a branch with one number of real slots: (segments, slots, heads) that attend in one call.

    Returns:
        For each part the indices `token * heads + head`, flat, in the order (segment, slot, head); that shape; and the
        number of zero-key slots.
    """
    slots = math.ceil(width / ratio)
    offsets = torch.arange(heads) // math.ceil(heads / ratio)
    whole, tail = length // width * width, length % width
    pieces: list[_Piece] = []
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


def _take(x: Tensor, index: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """(B, L, H, D) -> (B * segments, heads, slots, D)."""
    segments, slots, heads = shape
    taken = x.reshape(len(x), -1, x.shape[-1])[:, index]
    return taken.view(len(x) * segments, slots, heads, -1).transpose(1, 2)


def _flat(piece: Tensor, batch: int) -> Tensor:
    """(B * segments, heads, slots, D) -> (B, segments * slots * heads, D), the order of the indices."""
    return piece.transpose(1, 2).reshape(batch, -1, piece.shape[-1])
