"""`norm_linear` on a GPU: one Triton kernel each way around the matrix products, and sums over the rows."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.nn.functional import linear

from .launch import Launch, empty, launch
from .once import differentiable_once

SQRT_HALF = tl.constexpr(0.7071067811865476)
MINUS_HALF_LOG2_E = tl.constexpr(-0.7213475204444817)
NORMAL = tl.constexpr(0.3989422804014327)
PROGRAMS = 528
"""Of the backward, each with sums of its own: four on each of the 132 multiprocessors of an H100 or H200."""


@triton.jit
def _normal(x):
    """(cumulative distribution, exp(-x * x / 2)) of the normal distribution, to 1e-7 (Abramowitz and Stegun, 7.1.26)."""
    bell = tl.exp2(x * x * MINUS_HALF_LOG2_E)
    t = tl.rsqrt(tl.abs(x) * (0.3275911 * SQRT_HALF) + 1.0)  # an instruction; a division takes a dozen
    t = t * t
    tail = (((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592
    tail = 0.5 * tail * t * bell
    return tl.where(x > 0, 1.0 - tail, tail), bell


@triton.jit
def _norm_forward(
    x, residual, total, weight, bias, y, moments, rows, eps,
    N: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, RESIDUAL: tl.constexpr, GELU: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = column < N
    where = row[:, None] * N + column[None, :]
    mask = (row < rows)[:, None] & inside[None, :]
    value = tl.load(x + where, mask=mask, other=0.0).to(tl.float32)
    if RESIDUAL:
        value += tl.load(residual + where, mask=mask, other=0.0).to(tl.float32)
        value = value.to(total.dtype.element_ty)
        tl.store(total + where, value, mask=mask)
        value = value.to(tl.float32)
    if GELU:
        value = value * _normal(value)[0]
    centre = tl.sum(value, 1) / N
    value = tl.where(inside[None, :], value - centre[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(value * value, 1) / N + eps)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    value = value * inverse[:, None] * w[None, :] + b[None, :]
    tl.store(y + where, value.to(y.dtype.element_ty), mask=mask)
    if KEEP:
        tl.store(moments + row, centre, mask=row < rows)
        tl.store(moments + rows + row, inverse, mask=row < rows)


@triton.jit
def _norm_backward(
    x, grad_y, grad_total, weight, bias, moments, grad_x, grad_sum, y, grad_norm, rows,
    N: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, TOTAL: tl.constexpr, SUM: tl.constexpr,
    GELU: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Each program takes every so many-th group of rows and keeps the gradients of weight and bias in registers.

    It fetches the next rows while it works on these: 1.4 to 1.7 times as fast on an H200.
    """
    column = tl.arange(0, BLOCK)
    inside = column < N
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    sum_w = tl.zeros((ROWS, BLOCK), tl.float32)
    sum_b = tl.zeros((ROWS, BLOCK), tl.float32)
    for group in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (group * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        where = row[:, None] * N + column[None, :]
        mask = (row < rows)[:, None] & inside[None, :]
        value = tl.load(x + where, mask=mask, other=0.0).to(tl.float32)
        slope = value
        if GELU:
            share, bell = _normal(value)
            slope = share + value * NORMAL * bell
            value = value * share
        centre = tl.load(moments + row, mask=row < rows, other=0.0)
        inverse = tl.load(moments + rows + row, mask=row < rows, other=0.0)
        value = tl.where(mask, (value - centre[:, None]) * inverse[:, None], 0.0)
        tl.store(y + where, (value * w[None, :] + b[None, :]).to(y.dtype.element_ty), mask=mask)
        grad = tl.load(grad_y + where, mask=mask, other=0.0).to(tl.float32)
        sum_w += grad * value
        sum_b += grad
        grad = grad * w[None, :]
        along = tl.sum(grad * value, 1) / N
        level = tl.sum(grad, 1) / N
        grad = (grad - level[:, None] - value * along[:, None]) * inverse[:, None]
        if GELU:
            grad = grad * slope
        if TOTAL:
            grad += tl.load(grad_total + where, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_x + where, grad.to(grad_x.dtype.element_ty), mask=mask)
        if SUM:
            tl.store(grad_sum + where, grad.to(grad_sum.dtype.element_ty), mask=mask)
    where = tl.program_id(0) * (2 * N) + column
    tl.store(grad_norm + where, tl.sum(sum_w, 0), mask=inside)
    tl.store(grad_norm + N + where, tl.sum(sum_b, 0), mask=inside)


@triton.jit
def _sum_rows(x, sums, rows, N: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Each program (.., p) sums every so many-th group of rows into row p."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < N
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for group in tl.range(tl.program_id(1), tl.cdiv(rows, ROWS), tl.num_programs(1), num_stages=3):
        row = (group * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & inside[None, :]
        total += tl.load(x + row[:, None] * N + column[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(sums + tl.program_id(1).to(tl.int64) * N + column, tl.sum(total, 0), mask=inside)


@triton.jit
def _sum_into(sums, x, rows, block, N: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """One block of the column sums of a matrix; nothing for a block that it does not have."""
    if (block >= 0) & (block < tl.cdiv(N, BLOCK)):
        column = block * BLOCK + tl.arange(0, BLOCK)
        inside = column < N
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in tl.range(0, rows, ROWS, num_stages=3):
            row = (start + tl.arange(0, ROWS)).to(tl.int64)
            mask = (row < rows)[:, None] & inside[None, :]
            total += tl.load(x + row[:, None] * N + column[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(sums + column, tl.sum(total, 0).to(sums.dtype.element_ty), mask=inside)


@triton.jit
def _sum_columns(
    sums, a, b, c, d, rows_a, rows_b, rows_c, rows_d,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The column sums of up to four matrices, one after the other; c and d may be missing, with no columns."""
    block = tl.program_id(0)
    _sum_into(sums, a, rows_a, block, A, BLOCK, ROWS)
    block -= tl.cdiv(A, BLOCK)
    _sum_into(sums + A, b, rows_b, block, B, BLOCK, ROWS)
    if C > 0:
        block -= tl.cdiv(B, BLOCK)
        _sum_into(sums + A + B, c, rows_c, block, C, BLOCK, ROWS)
    if D > 0:
        block -= tl.cdiv(C, BLOCK)
        _sum_into(sums + A + B + C, d, rows_d, block, D, BLOCK, ROWS)


@cache
def _shape(width: int, most: int) -> tuple[int, int, int]:
    """Width, columns of a program, and the rows it takes at a time: `most`, or fewer where they are wide."""
    block = triton.next_power_of_2(width)
    return width, block, max(1, min(most, most * 1024 // block))


def normalise(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    gelu: bool,
    dtype: torch.dtype,
    keep: bool,
    launch: Launch = launch,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Normalised values (T, width); what was normalised; if kept, mean and inverse deviation (2, T) of each row."""
    x = x.contiguous()
    rows, width = x.shape
    y = empty((rows, width), dtype, x.device)
    moments = empty((2, rows), torch.float32, x.device) if keep else None
    total = x
    if residual is not None:
        residual = residual.contiguous()
        total_dtype = x.dtype if x.dtype == residual.dtype else torch.promote_types(x.dtype, residual.dtype)
        total = empty((rows, width), total_dtype, x.device)
    shape = _shape(width, 4)
    launch(
        _norm_forward, (-(-rows // shape[2]),), (x, residual, total, weight, bias, y, moments, rows, eps),
        (*shape, residual is not None, gelu, keep),
    )  # fmt: skip
    return y, total, moments


def normalise_backward(
    total: Tensor,
    grad_y: Tensor,
    grad_total: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    moments: Tensor,
    gelu: bool,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    launch: Launch = launch,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and of the residual, which may be one tensor; the normalised values again; and `(programs, 2 * width)`
    float32, whose column sums are the gradients of weight and bias."""
    rows, width = total.shape
    device = total.device
    y = empty((rows, width), grad_y.dtype, device)
    grad_x = empty((rows, width), x_dtype, device)
    # The gradient of the residual is that of x, in a dtype of its own.
    own = residual_dtype if residual_dtype != x_dtype else None
    grad_sum = grad_x if own is None else empty((rows, width), own, device)
    shape = _shape(width, 2)
    held = shape[2] * shape[1] * max(total.element_size(), grad_y.element_size())
    programs = min(-(-rows // shape[2]), PROGRAMS)
    grad_norm = empty((programs, 2 * width), torch.float32, device)
    arguments = (total, grad_y, grad_total, weight, bias, moments, grad_x, grad_sum, y, grad_norm, rows)
    flags = (grad_total is not None, own is not None, gelu, 3 if held <= 8192 else 1)
    launch(_norm_backward, (programs,), arguments, (*shape, *flags))
    return grad_x, grad_sum, y, grad_norm


FEW_ROWS = 4096
"""Up to which one program sums all rows of a column."""


def column_sums(matrices: Sequence[Tensor], dtype: torch.dtype, launch: Launch = launch) -> Tensor:
    """Sums over the rows of two to four contiguous matrices, end to end, in float32 before they are rounded to `dtype`."""
    short = [x if x.shape[0] <= FEW_ROWS else _sums_of_parts(x) for x in matrices]
    widths = [x.shape[1] for x in short]
    sums = empty((sum(widths),), dtype, short[0].device)
    columns, rows = 64, 128
    blocks = sum([-(-width // columns) for width in widths])
    missing = 4 - len(short)
    none, zeros = (None,) * missing, (0,) * missing
    arguments = (sums, *short, *none, *[x.shape[0] for x in short], *zeros)
    launch(_sum_columns, (blocks,), arguments, (*widths, *zeros, columns, rows))
    return sums


def _sums_of_parts(x: Tensor) -> Tensor:
    """`(parts, width)` float32, which add up to the sums over the rows of a contiguous matrix."""
    length, width = x.shape
    columns, rows = 128, 32
    across = -(-width // columns)
    programs = min(-(-length // rows), max(2, PROGRAMS // across))
    sums = empty((programs, width), torch.float32, x.device)
    launch(_sum_rows, (across, programs), (x, sums, length), (width, columns, rows))
    return sums


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Of the products with a weight."""
    device = "cuda" if weight.is_cuda else weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        norm_weight: Tensor,
        norm_bias: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        gelu: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        dtype = compute_dtype(weight)
        y, total, moments = normalise(x, residual, norm_weight, norm_bias, eps, gelu, dtype, True)
        cast = weight.to(dtype)  # under autocast, which finds nothing more to do then
        ctx.save_for_backward(total, moments, norm_weight, norm_bias, cast)
        ctx.settings = (
            gelu, dtype, x.dtype, None if residual is None else residual.dtype, weight.dtype, bias.dtype,
        )  # fmt: skip
        output = linear(y, cast, bias.to(dtype))
        return output if residual is None else (output, total)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor | None, grad_total: Tensor | None = None) -> tuple[Tensor | None, ...]:
        total, moments, norm_weight, norm_bias, weight = ctx.saved_tensors
        gelu, dtype, x_dtype, residual_dtype, weight_dtype, bias_dtype = ctx.settings
        rows, width = total.shape
        grad = torch.zeros((rows, len(weight)), dtype=dtype, device=total.device) if grad is None else grad.contiguous()
        if grad_total is not None:
            grad_total = grad_total.contiguous()
        grad_x, grad_sum, y, grad_norm = normalise_backward(
            total, torch.mm(grad, weight), grad_total, norm_weight, norm_bias, moments, gelu, x_dtype, residual_dtype
        )
        small_dtype = bias_dtype if bias_dtype == norm_weight.dtype else torch.float32
        sums = column_sums((grad_norm, grad), small_dtype)
        grad_norm_weight, grad_norm_bias, grad_bias = torch.split_with_sizes(sums, [width, width, len(weight)])
        return (
            grad_x,
            None if residual_dtype is None else grad_sum,
            grad_norm_weight.to(norm_weight.dtype),
            grad_norm_bias.to(norm_bias.dtype),
            torch.mm(grad.t(), y).to(weight_dtype) if ctx.needs_input_grad[4] else None,
            grad_bias.to(bias_dtype),
            None,
            None,
        )


def fused_norm_linear(
    x: Tensor, norm: nn.LayerNorm, layer: nn.Linear, residual: Tensor | None, gelu: bool
) -> tuple[Tensor, Tensor]:
    """See `norm_linear`."""
    norm_weight, norm_bias, weight, bias = norm.weight, norm.bias, layer.weight, layer.bias
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (residual is not None and residual.requires_grad)
        or norm_weight.requires_grad
        or norm_bias.requires_grad
        or weight.requires_grad
        or bias.requires_grad
    ):
        found = _NormLinear.apply(x, residual, norm_weight, norm_bias, weight, bias, norm.eps, gelu)
        return (found, x) if residual is None else found
    dtype = compute_dtype(weight)
    y, total, _ = normalise(x, residual, norm_weight, norm_bias, norm.eps, gelu, dtype, False)
    return linear(y, weight.to(dtype), bias.to(dtype)), total
