"""The kernels as differentiable torch operations."""

from typing import Any

import torch
from torch import Tensor

from ...once import differentiable_once
from .backward import run_backward
from .forward import run_forward
from .layout import run_arrange


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    segment_lengths: list[int],
    dilated_ratios: list[int],
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output (T, H, D) and base-2 log-sum-exp (H, T), +inf where no branch covers a token."""
    arranged = run_arrange(q, k, v, cu_seqlens, dilated_ratios)
    return run_forward(arranged, q.shape, cu_seqlens, segment_lengths, dilated_ratios, is_causal, scale)


attention_op = torch.library.custom_op("longslide::dilated_attention", _attend, mutates_args=())


@attention_op.register_fake
def _op_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    segment_lengths: list[int],
    dilated_ratios: list[int],
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


def _attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    out: Tensor,
    lse: Tensor,
    segment_lengths: list[int],
    dilated_ratios: list[int],
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    arranged = run_arrange(q, k, v, cu_seqlens, dilated_ratios)
    grad_q, grad_k, grad_v = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    run_backward(
        grad,
        arranged,
        cu_seqlens,
        out,
        lse,
        (grad_q, grad_k, grad_v),
        segment_lengths,
        dilated_ratios,
        is_causal,
        scale,
    )
    return grad_q, grad_k, grad_v


_backward_op = torch.library.custom_op("longslide::dilated_attention_backward", _attend_backward, mutates_args=())


@_backward_op.register_fake
def _backward_op_fake(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    out: Tensor,
    lse: Tensor,
    segment_lengths: list[int],
    dilated_ratios: list[int],
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, *ctx.settings = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, cu_seqlens, *output)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return (*_backward_op(grad, *ctx.saved_tensors, *ctx.settings), None, None, None, None, None)


attention_op.register_autograd(_differentiate, setup_context=_save)


def attend(qkv: Tensor, cu_seqlens: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernels read, output (T, H, D), and base-2 log-sum-exp (H, T); settings as of `SelfAttention`."""
    q, k, v = qkv.unbind(1)
    arranged = run_arrange(q, k, v, cu_seqlens, settings[1], settings[4])
    return arranged, *run_forward(arranged, (qkv.shape[0], *qkv.shape[2:]), cu_seqlens, *settings)


class SelfAttention(torch.autograd.Function):
    """The op without its dispatcher, which takes longer than the kernels on short sequences; of `(T, 3, H, D)`.

    What the kernels read is kept in place of the projection, whose memory is free once this has run. With windows the
    sequences are spread over ranks, of which each holds T tokens of its own.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cu_seqlens: Tensor, *settings: Any) -> Tensor:
        """`(T, H, D)`; the settings are segment lengths, ratios, whether it is causal, the scale, and the windows."""
        arranged, out, lse = attend(qkv, cu_seqlens, *settings)
        ctx.save_for_backward(arranged, cu_seqlens, out, lse)
        ctx.settings = settings
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the projection."""
        arranged, cu_seqlens, out, lse = ctx.saved_tensors
        grad_qkv = torch.empty((out.shape[0], 3, *out.shape[1:]), dtype=out.dtype, device=out.device)
        run_backward(grad, arranged, cu_seqlens, out, lse, grad_qkv.unbind(1), *ctx.settings)
        return grad_qkv, None, None, None, None, None, None
