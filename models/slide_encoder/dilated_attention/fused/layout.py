"""How the kernels see queries, keys and values: by head, then by class of positions, in rows of a power of two of columns.

Tokens that are read together lie together. The columns past the head dimension hold what makes one matrix product of several
steps: ones in the values sum the exponentials; ones in the keys add to the logits what the queries have there (minus the
reference of their softmax, in the backward minus its log-sum-exp); ones in the values add minus the inner product in the
backward.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...launch import Launch, empty, launch
from ..windows import Windows

LOG2_E = tl.constexpr(1.4426950408889634)
BLOCK = 64
"""Tokens that a program of `arrange` moves."""


class LayoutSizes(NamedTuple):
    """What is known when a kernel of this file is compiled; the legend is in this package's docstring."""

    H: int
    D: int
    DP: int
    S: int
    SPARE: bool
    ONE: int
    BLOCK: int
    SHARDED: bool


@triton.jit
def load(pointer, rows, mask, DP: tl.constexpr, MASK: tl.constexpr):
    """(rows, DP) of a matrix whose rows are contiguous."""
    where = rows[:, None] * DP + tl.arange(0, DP)[None, :]
    if MASK:
        return tl.load(pointer + where, mask=mask[:, None], other=0.0)
    return tl.load(pointer + where)


@triton.jit
def load_columns(pointer, offsets, mask, D: tl.constexpr, DP: tl.constexpr):
    """(rows, DP) of rows of D columns, where the offsets of the rows are given; zero past D."""
    column = tl.arange(0, DP)
    inside = mask[:, None] & (column < D)[None, :]
    return tl.load(pointer + offsets[:, None] + column[None, :], mask=inside, other=0.0)


@triton.jit
def store_columns(pointer, offsets, mask, value, D: tl.constexpr, DP: tl.constexpr):
    """Write D of the DP columns of `value`, where the offsets of the rows are given."""
    column = tl.arange(0, DP)
    inside = mask[:, None] & (column < D)[None, :]
    tl.store(pointer + offsets[:, None] + column[None, :], value.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def find_sequence(cu_seqlens, sequences, block, span, MORE: tl.constexpr):
    """(sequence, its begin, its length) of a block, of which each sequence has as many as it needs of `span` tokens.

    Sequence b starts at block `begin // span + MORE * b`.
    """
    low = 0
    high = sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(cu_seqlens + middle) // span + MORE * middle <= block:
            low = middle
        else:
            high = middle
    begin = tl.load(cu_seqlens + low)
    return low, begin, tl.load(cu_seqlens + low + 1) - begin


@triton.jit
def first_row(sequence, begin, length, S: tl.constexpr):
    """(first row of a sequence, rows from one of its classes to the next) in what `arrange` makes."""
    group = 4 * S
    return (begin // group + sequence).to(tl.int64) * group, tl.cdiv(length, group) * 4


@triton.jit
def extent(shards, sequence, begin, count, head, z):
    """(tokens of a sequence, position of the first one here, first row, its classes' rows as `class_row` takes them), where
    `count` of them are here, from token `begin`. All are, unless it is spread over ranks: then `Windows.table` says it."""
    if z.SHARDED:
        entry = shards + sequence * (2 + z.H * z.S)
        length = tl.load(entry)
        here = tl.load(entry + 1)
        origin = begin.to(tl.int64) * 0
        classes = entry + 2 + head * z.S
    else:
        length = count
        here = count * 0
        origin, classes = first_row(sequence, begin, count, z.S)
    return length, here, origin, classes


@triton.jit
def class_row(classes, residue, SHARDED: tl.constexpr):
    """Row of the class's position `residue`; position p has the row p // S after it."""
    return tl.load(classes + residue) if SHARDED else residue * classes


@triton.jit
def tensor_at(arranged, which, head, origin, padded, z: tl.constexpr):
    """Where a sequence begins in one of the tensors (H, padded, DP) that `arrange` makes."""
    return arranged + ((which * z.H + head).to(tl.int64) * padded + origin) * z.DP


@triton.jit
def sums_at(sums, head, origin, padded):
    """Where a sequence begins in what `arrange_grad` makes of its log-sum-exps and inner products, two a row."""
    return sums + (head.to(tl.int64) * padded + origin) * 2


@triton.jit
def spare_columns(value, column, D: tl.constexpr):
    """A float32 per row as columns D .. D + 2, the sum of three numbers that are exact in each of the dtypes.

    Its product with three ones is the number again, 24 bits of it: so the matrix units add it to a product of rows.
    """
    high = value.to(tl.bfloat16).to(tl.float32)
    middle = (value - high).to(tl.bfloat16).to(tl.float32)
    low = value - high - middle
    part = tl.where(column == D, high[:, None], tl.where(column == D + 1, middle[:, None], low[:, None]))
    return tl.where((column >= D) & (column < D + 3), part, 0.0)


@triton.jit
def own_tokens(cu_seqlens, shards, sequences, z: tl.constexpr):
    """What a program of `arrange` and `arrange_grad` moves: (head, the token at position 0 or where it would be, origin,
    positions, rows, which of them exist)."""
    program = tl.program_id(0)
    head = program % z.H
    residue = program // z.H % z.S
    block = program // (z.H * z.S)
    sequence, begin, count = find_sequence(cu_seqlens, sequences, block, z.BLOCK * z.S, 1)
    _, here, origin, classes = extent(shards, sequence, begin, count, head, z)
    index = z.BLOCK * (block - begin // (z.BLOCK * z.S) - sequence) + tl.arange(0, z.BLOCK)
    position = here + ((residue - here) & (z.S - 1)) + z.S * index
    row = class_row(classes, residue, z.SHARDED) + position // z.S
    return head, (begin - here).to(tl.int64), origin, position, row, position < here + count


@triton.jit
def arrange(
    q, k, v, arranged, cu_seqlens, shards, sequences, padded, stride_l, stride_h,
    z: tl.constexpr,
):  # fmt: skip
    """Queries, keys and values (T, H, D) by head, then by class of S, in rows of DP columns.

    The cache answers as many requests in a second for parts of lines as for whole ones: so what is read together should
    lie together. Where columns are left over, three hold ones for the keys and values, and for the queries minus the logit
    of the token's own key, the reference of its softmax.
    """
    head, begin, origin, position, row, valid = own_tokens(cu_seqlens, shards, sequences, z)
    base = begin * stride_l + head * stride_h
    offsets = position.to(tl.int64) * stride_l
    column = tl.arange(0, z.DP)[None, :]
    queries = load_columns(q + base, offsets, valid, z.D, z.DP)
    keys = load_columns(k + base, offsets, valid, z.D, z.DP)
    values = load_columns(v + base, offsets, valid, z.D, z.DP)
    if z.SPARE:
        logit = tl.sum(queries.to(tl.float32) * keys.to(tl.float32), 1)
        ones = ((column >= z.D) & (column < z.D + 3)).to(tl.float32)
        most: tl.constexpr = 1.0e30 if z.ONE == 1 else 60000.0
        reference = spare_columns(tl.maximum(tl.minimum(-logit / z.ONE, most), -most), column, z.D)
        queries = tl.where(column < z.D, queries, reference.to(queries.dtype))
        keys = tl.where(column < z.D, keys, (ones * z.ONE).to(keys.dtype))
        values = tl.where(column < z.D, values, ones.to(values.dtype))
    store_columns(tensor_at(arranged, 0, head, origin, padded, z), row * z.DP, valid, queries, z.DP, z.DP)
    store_columns(tensor_at(arranged, 1, head, origin, padded, z), row * z.DP, valid, keys, z.DP, z.DP)
    store_columns(tensor_at(arranged, 2, head, origin, padded, z), row * z.DP, valid, values, z.DP, z.DP)


@triton.jit
def arrange_grad(
    grad, out, lse, arranged, arranged_grad, sums, cu_seqlens, shards, sequences, tokens, padded, scale,
    z: tl.constexpr,
):  # fmt: skip
    """The gradient of the output like the queries, and its inner product with the output.

    The columns left over take what the backward subtracts from logits and from their gradients: here minus the inner
    product, in the queries minus the log-sum-exp. Where none are left over, `sums` (H, padded, 2) holds log-sum-exp and
    inner product.
    """
    head, begin, origin, position, row, valid = own_tokens(cu_seqlens, shards, sequences, z)
    base = (begin * z.H + head) * z.D
    offsets = position.to(tl.int64) * (z.H * z.D)
    column = tl.arange(0, z.DP)[None, :]
    value = load_columns(grad + base, offsets, valid, z.D, z.DP)
    inner = tl.sum(value.to(tl.float32) * load_columns(out + base, offsets, valid, z.D, z.DP).to(tl.float32), 1)
    log_sum = tl.load(lse + head.to(tl.int64) * tokens + begin + position, mask=valid, other=0.0)
    if z.SPARE:
        value = tl.where(column < z.D, value, spare_columns(-inner, column, z.D).to(value.dtype))
        least: tl.constexpr = -1.0e30 if z.ONE == 1 else -60000.0  # for +inf, of a token that nothing covers
        parts = spare_columns(tl.maximum(-log_sum / (scale * LOG2_E * z.ONE), least), column, z.D)
        queries = tensor_at(arranged, 0, head, origin, padded, z) + row[:, None] * z.DP + column
        tl.store(queries, parts.to(arranged.dtype.element_ty), mask=valid[:, None] & (column >= z.D))
    else:
        pair = sums_at(sums, head, origin, padded) + 2 * row
        tl.store(pair, log_sum, mask=valid)
        tl.store(pair + 1, inner, mask=valid)
    store_columns(tensor_at(arranged_grad, 0, head, origin, padded, z), row * z.DP, valid, value, z.DP, z.DP)


def columns(dim: int) -> int:
    """Of a row of what `arrange` makes: a power of two, at least 16, as the matrix units need it."""
    return max(16, int(triton.next_power_of_2(dim)))


def has_spare(dim: int) -> bool:
    """Whether a row has the three columns to spare that this file's docstring speaks of."""
    return columns(dim) - dim >= 3


def _settings(
    shape: Sequence[int], dtype: torch.dtype, cu_seqlens: Tensor, ratios: Sequence[int], windows: Windows | None = None
) -> tuple[int, tuple[int], LayoutSizes]:
    """Rows of a head in what `arrange` makes, its grid and sizes.

    Each sequence takes whole groups of four rows of every class, or what its windows take. Float16 holds the softmax's
    reference and the log-sum-exp as 256ths.
    """
    spread = None if windows is None else windows.rows
    return _layout(tuple(shape), dtype, cu_seqlens.shape[0] - 1, tuple(ratios), spread)


@lru_cache(maxsize=4096)
def _layout(
    shape: tuple[int, int, int], dtype: torch.dtype, sequences: int, ratios: tuple[int, ...], spread: int | None
) -> tuple[int, tuple[int], LayoutSizes]:
    """See `_settings`; `spread` are the rows of sequences that are spread over ranks, None if none are."""
    tokens, heads, dim = shape
    stride = max(1, max(ratios) // 2)
    programs = (tokens // (BLOCK * stride) + sequences) * heads * stride
    one = 256 if dtype == torch.float16 else 1
    z = LayoutSizes(heads, dim, columns(dim), stride, has_spare(dim), one, BLOCK, spread is not None)
    rows = (tokens // (4 * stride) + sequences) * 4 * stride if spread is None else spread
    return rows, (programs,), z


def run_arrange(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    ratios: Sequence[int],
    windows: Windows | None = None,
    launch: Launch = launch,
) -> Tensor:
    """`(3, H, rows, columns)` of q, k and v `(T, H, D)`, see `arrange`."""
    strides = q.stride()
    if not strides == k.stride() == v.stride() or strides[2] != 1:
        q, k, v = (x.contiguous() for x in (q, k, v))
        strides = q.stride()
    rows, grid, z = _settings(q.shape, q.dtype, cu_seqlens, ratios, windows)
    arranged = empty((3, q.shape[1], rows, z.DP), q.dtype, q.device)
    sizes = (cu_seqlens, shards_of(cu_seqlens, windows), cu_seqlens.shape[0] - 1, rows)
    launch(arrange, grid, (q, k, v, arranged, *sizes, *strides[:2]), (z,))
    return arranged


def run_arrange_grad(
    grad: Tensor,
    arranged: Tensor,
    cu_seqlens: Tensor,
    out: Tensor,
    lse: Tensor,
    ratios: Sequence[int],
    scale: float,
    windows: Windows | None = None,
    launch: Launch = launch,
) -> tuple[Tensor, Tensor]:
    """`(H, rows, columns)` of the output's gradient `(T, H, D)`; and `(H, rows, 2)` log-sum-exps and inner products, of no
    rows where there are columns to spare. See `arrange_grad`."""
    rows, grid, z = _settings(out.shape, out.dtype, cu_seqlens, ratios, windows)
    arranged_grad = empty(tuple(arranged.shape[1:]), out.dtype, out.device)
    sums = empty((out.shape[1], 0 if z.SPARE else rows, 2), torch.float32, out.device)
    sizes = (cu_seqlens, shards_of(cu_seqlens, windows), cu_seqlens.shape[0] - 1, out.shape[0], rows, scale)
    launch(arrange_grad, grid, (grad.contiguous(), out, lse, arranged, arranged_grad, sums, *sizes), (z,))
    return arranged_grad, sums


def shards_of(cu_seqlens: Tensor, windows: Windows | None) -> Tensor:
    """The kernels' argument `shards`; without windows they do not read it."""
    return cu_seqlens if windows is None else windows.table
