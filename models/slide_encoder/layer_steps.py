"""The halves of a LongNet layer on a GPU as one step of autograd, or as one each where dropout comes between them.

Of few tokens launches, and what Python and autograd do between them, take longer than the kernels. So what a layer does is
one node of autograd, whose launches are prepared once for all calls of a shape. The kernels are those of
`norm_linear_fused` and `dilated_attention.fused`.
"""

from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .dilated_attention.fused import eligible
from .dilated_attention.fused.backward import run_backward
from .dilated_attention.fused.forward import run_forward
from .dilated_attention.fused.layout import run_arrange
from .launch import Repeated, empty
from .norm_linear_fused import column_sums, compute_dtype, normalise, normalise_backward
from .once import differentiable_once

MAX_TOKENS = 16_384
"""Above it the GPU is the slower part, and norms and linear layers on their own give back their memory earlier."""

Attention = tuple[int, tuple[int, ...], tuple[int, ...]]
"""Heads, segment lengths and dilated ratios of dilated attention."""
Half = tuple[nn.LayerNorm, nn.Linear, nn.LayerNorm, nn.Linear, Attention | None]
"""A norm, the linear layer behind it, a norm, the linear layer behind it; between the pairs attention, or else GELU."""
Settings = tuple[float, float, Attention | None]
"""The eps of the norms, and the attention."""


def takes_steps(x: Tensor, weight: Tensor, attention: Attention) -> bool:
    """Whether the halves of a layer of tokens x `(T, width)` on a GPU can be steps; the weight is of a linear layer."""
    if not 0 < x.shape[0] <= MAX_TOKENS or x.dtype == torch.float64 or weight.dtype == torch.float64:
        return False
    return eligible(compute_dtype(weight), x.shape[1] // attention[0], attention[2])


def layer_step(x: Tensor, residual: Tensor | None, cu_seqlens: Tensor, *halves: Half) -> tuple[Tensor, Tensor]:
    """One half of a layer, `second(inner_norm(middle(first(norm(residual + x)))))`, or two, of which the second takes the
    first one's outputs.

    Args:
        x: `(T, width)`.
        residual: `(T, width)` to be added to x first.
        cu_seqlens: `(B + 1,)` int32: where each sequence begins, and T.
        halves: The halves.

    Returns:
        `(T, width)` in the autocast dtype, or the dtype of the weights; and `residual + x`, or x, of the last half.
    """
    parameters: list[Tensor] = []
    settings: list[Settings] = []
    for norm, first, inner_norm, second, attention in halves:
        parameters += (
            norm.weight, norm.bias, first.weight, first.bias, inner_norm.weight, inner_norm.bias, second.weight, second.bias,
        )  # fmt: skip
        settings.append((norm.eps, inner_norm.eps, attention))
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (residual is not None and residual.requires_grad)
        or any(parameter.requires_grad for parameter in parameters)
    ):
        found = _Step.apply(x, residual, cu_seqlens, settings, *parameters)
        return (found, x) if residual is None and len(halves) == 1 else found
    for number, each in enumerate(settings):
        output, total, _, _ = _forward(x, residual, cu_seqlens, each, parameters[8 * number : 8 * number + 8], False)
        x, residual = output, total
    return x, total


@lru_cache(maxsize=4096)
def _launches(kinds: Hashable) -> tuple[Repeated, Repeated]:
    """Those of the outer norm and what follows it, and those of the inner norm."""
    return Repeated(), Repeated()


def _aligned(x: Tensor) -> Tensor:
    """The same, contiguous, where a load may be wide."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() & 15 else x


def _forward(
    x: Tensor,
    residual: Tensor | None,
    cu_seqlens: Tensor,
    settings: Settings,
    parameters: Sequence[Tensor],
    keep: bool,
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...], Hashable]:
    """Output, what was normalised, what the backward needs, and the kinds of the arguments of the launches."""
    norm_weight, norm_bias, weight, bias, inner_weight, inner_bias, out_weight, out_bias = parameters
    eps, inner_eps, attention = settings
    dtype = compute_dtype(weight)
    norm_weight, norm_bias, x = _aligned(norm_weight), _aligned(norm_bias), _aligned(x)
    inner_weight, inner_bias = _aligned(inner_weight), _aligned(inner_bias)
    if residual is not None:
        residual = _aligned(residual)
    kinds: tuple[Hashable, ...] = (
        x.device, x.shape, weight.shape, out_weight.shape, dtype, x.dtype, None if residual is None else residual.dtype,
        norm_weight.dtype, norm_bias.dtype, inner_weight.dtype, inner_bias.dtype, keep,
    )  # fmt: skip
    if attention is not None:
        cu_seqlens = _aligned(cu_seqlens)
        precision = torch.backends.cuda.matmul.fp32_precision if dtype == torch.float32 else ""
        kinds = (*kinds, attention, cu_seqlens.shape, cu_seqlens.dtype, precision)
    outer, inner = _launches(kinds)
    if weight.dtype != dtype:  # under autocast, which finds nothing more to do then
        weight, bias, out_weight, out_bias = (part.to(dtype) for part in (weight, bias, out_weight, out_bias))
    y, total, moments = normalise(x, residual, norm_weight, norm_bias, eps, False, dtype, keep, outer)
    middle = linear(y, weight, bias)
    attended: tuple[Tensor, ...] = ()
    if attention is not None:
        middle, arranged, lse = _attend(middle, cu_seqlens, attention, outer)
        attended = (cu_seqlens, arranged, lse)
    y, _, inner_moments = normalise(
        middle, None, inner_weight, inner_bias, inner_eps, attention is None, dtype, keep, inner
    )
    output = linear(y, out_weight, out_bias)
    saved = (
        total, moments, middle, inner_moments, norm_weight, norm_bias, weight, inner_weight, inner_bias, out_weight,
        *attended,
    )  # fmt: skip
    return output, total, saved, kinds


def _attend(qkv: Tensor, cu_seqlens: Tensor, attention: Attention, launch: Repeated) -> tuple[Tensor, Tensor, Tensor]:
    """Attended tokens `(T, width)`, what the kernels read, and the log-sum-exp."""
    heads, segment_lengths, ratios = attention
    rows, columns = qkv.shape
    q, k, v = qkv.view(rows, 3, heads, columns // (3 * heads)).unbind(1)
    arranged = run_arrange(q, k, v, cu_seqlens, ratios, launch=launch)
    scale = q.shape[2] ** -0.5
    out, lse = run_forward(arranged, q.shape, cu_seqlens, segment_lengths, ratios, False, scale, launch=launch)
    return out.view(rows, columns // 3), arranged, lse


def _attend_backward(
    grad: Tensor, attended: Tensor, saved: Sequence[Tensor], attention: Attention, launch: Repeated
) -> Tensor:
    """The gradient of queries, keys and values `(T, 3 * width)`."""
    cu_seqlens, arranged, lse = saved
    heads, segment_lengths, ratios = attention
    rows, width = attended.shape
    out = attended.view(rows, heads, width // heads)
    grad_qkv = empty((rows, 3, heads, width // heads), out.dtype, out.device)
    run_backward(
        grad, arranged, cu_seqlens, out, lse, grad_qkv.unbind(1), segment_lengths, ratios, False, out.shape[2] ** -0.5,
        launch=launch,
    )  # fmt: skip
    return grad_qkv.view(rows, 3 * width)


def _product(grad: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of a weight."""
    product = torch.mm(grad.t(), y)
    return product if product.dtype == dtype else product.to(dtype)


SMALL = (0, 1, 4, 5, 3, 7)
"""Which parameters of a half have column sums for gradients: the norms, then the biases."""


def _backward(
    grad: Tensor | None,
    grad_total: Tensor | None,
    saved: Sequence[Tensor],
    kinds: Hashable,
    attention: Attention | None,
    dtypes: Sequence[torch.dtype],
    summands: tuple[torch.dtype, torch.dtype | None],
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """Gradients of x and of the residual, which may be one tensor, and of the eight parameters.

    Args:
        grad: The gradient of the output.
        grad_total: That of what was normalised.
        saved: What the forward kept.
        kinds: The forward's.
        attention: The half's.
        dtypes: Of the parameters.
        summands: Dtypes of x and of the residual.
        needed: Which of the parameters need a gradient.
    """
    total, moments, middle, inner_moments, norm_weight, norm_bias, weight, inner_weight, inner_bias, out_weight = saved[
        :10
    ]
    if grad is None:
        grad = torch.zeros((total.shape[0], out_weight.shape[0]), dtype=middle.dtype, device=total.device)
    grad = _aligned(grad)
    if grad_total is not None:
        grad_total = _aligned(grad_total)
    mixed = dtypes.count(dtypes[0]) < len(dtypes)
    small_dtype = torch.float32 if mixed else dtypes[0]
    outer, inner = _launches((kinds, None if grad_total is None else grad_total.dtype, small_dtype))
    grad_hidden, _, y, inner_sums = normalise_backward(
        middle, torch.mm(grad, out_weight), None, inner_weight, inner_bias, inner_moments, attention is None, middle.dtype,
        None, inner,
    )  # fmt: skip
    grad_out_weight = _product(grad, y, dtypes[6]) if needed[6] else None
    if attention is not None:
        grad_hidden = _attend_backward(grad_hidden, middle, saved[10:], attention, outer)
    grad_x, grad_sum, y, sums = normalise_backward(
        total, torch.mm(grad_hidden, weight), grad_total, norm_weight, norm_bias, moments, False, *summands, outer
    )
    grad_weight = _product(grad_hidden, y, dtypes[2]) if needed[2] else None
    small: Sequence[Tensor | None] = [None] * len(SMALL)
    if any([needed[n] for n in SMALL]):  # noqa: C419 (a generator takes longer)
        width, inner_width = norm_weight.shape[0], inner_weight.shape[0]
        sizes = [width, width, inner_width, inner_width, weight.shape[0], out_weight.shape[0]]
        whole = column_sums((sums, inner_sums, grad_hidden, grad), small_dtype, outer)
        parts: Sequence[Tensor] = torch.split_with_sizes(whole, sizes)
        small = [part.to(dtypes[n]) for n, part in zip(SMALL, parts, strict=True)] if mixed else parts
    grads = (small[0], small[1], grad_weight, small[4], small[2], small[3], grad_out_weight, small[5])
    return grad_x, grad_sum, grads


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        cu_seqlens: Tensor,
        settings: Sequence[Settings],
        *parameters: Tensor,
    ) -> Tensor | tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        one = residual is None and len(settings) == 1
        ctx.halves = []
        every: list[Tensor | None] = []
        for number, each in enumerate(settings):
            own = parameters[8 * number : 8 * number + 8]
            output, total, saved, kinds = _forward(x, residual, cu_seqlens, each, own, True)
            summands = (x.dtype, None if residual is None else residual.dtype)
            ctx.halves.append((len(saved), kinds, each[2], [parameter.dtype for parameter in own], summands))
            every += saved
            x, residual = output, total
        ctx.save_for_backward(*every)
        return output if one else (output, total)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor | None, grad_total: Tensor | None = None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: a checkpoint gives them once
        end, at = len(saved), len(ctx.needs_input_grad)
        grads: tuple[Tensor | None, ...] = ()
        for kept, kinds, attention, dtypes, summands in reversed(ctx.halves):
            needed = ctx.needs_input_grad[at - 8 : at]
            grad, grad_total, own = _backward(
                grad, grad_total, saved[end - kept : end], kinds, attention, dtypes, summands, needed
            )
            grads = own + grads
            end, at = end - kept, at - 8
        return grad, None if summands[1] is None else grad_total, None, None, *grads
