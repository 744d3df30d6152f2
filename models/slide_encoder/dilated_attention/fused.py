"""Dilated attention in Triton: all branches in one softmax, forward and backward.

Tokens are taken in residue classes of half the largest ratio R: within a segment a branch of a smaller ratio covers either
every token of a class or none, so a block of one class streams exactly the keys of the branches that cover it, and no
branch has an output of its own. In the classes of which R's branch covers every second token, one block takes those tokens
and its neighbour the others. Zero-key slots are added to the denominator by arithmetic. A block that straddles a segment's
border goes through the keys of both segments, each for its own rows.

Queries, keys and values are first laid out by head and class, so that what is read together lies together. Their rows have
a power of two of columns; those left over hold what makes one matrix product of several steps: ones in the values sum the
exponentials, ones in the keys add to the logits what the queries have there (minus the reference of their softmax, in the
backward minus its log-sum-exp), and ones in the values add minus the inner product in the backward.

Sequences are packed end to end; programs find theirs by the cumulative lengths, so that no table is made and lengths never
come to the host. No atomics: results are the same in every run.

Branches share keys: where a segment lies within that of a branch whose ratio is a multiple, the keys of the latter in there
are among those of the former. These are scored once and count as often as branches have them (`MERGE`).
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

LOG2_E = tl.constexpr(1.4426950408889634)


def eligible(dtype: torch.dtype, head_dim: int, dilated_ratios: Sequence[int], scale: float = 1.0) -> bool:
    """Whether the kernels take tensors of this kind: ratios are powers of two, head dimension up to 128."""
    return (
        dtype in (torch.float16, torch.bfloat16, torch.float32)
        and head_dim <= 128
        and max(dilated_ratios) <= 64
        and all(ratio & (ratio - 1) == 0 for ratio in dilated_ratios)
        and scale > 0
    )


@triton.jit
def _load(pointer, rows, mask, DP: tl.constexpr, MASK: tl.constexpr):
    """(rows, DP) of a matrix whose rows are contiguous."""
    where = rows[:, None] * DP + tl.arange(0, DP)[None, :]
    if MASK:
        return tl.load(pointer + where, mask=mask[:, None], other=0.0)
    return tl.load(pointer + where)


@triton.jit
def _load_columns(pointer, offsets, mask, D: tl.constexpr, DP: tl.constexpr):
    """(rows, DP) of rows of D columns, where the offsets of the rows are given; zero past D."""
    column = tl.arange(0, DP)
    inside = mask[:, None] & (column < D)[None, :]
    return tl.load(pointer + offsets[:, None] + column[None, :], mask=inside, other=0.0)


@triton.jit
def _store_columns(pointer, offsets, mask, value, D: tl.constexpr, DP: tl.constexpr):
    column = tl.arange(0, DP)
    inside = mask[:, None] & (column < D)[None, :]
    tl.store(pointer + offsets[:, None] + column[None, :], value.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _sequence(cu_seqlens, sequences, block, span):
    """(sequence, its begin, its length) of a block, of which each sequence has as many as it needs of `span` tokens.

    Sequence b starts at block `begin // span + b`.
    """
    low = 0
    high = sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(cu_seqlens + middle) // span + middle <= block:
            low = middle
        else:
            high = middle
    begin = tl.load(cu_seqlens + low)
    return low, begin, tl.load(cu_seqlens + low + 1) - begin


@triton.jit
def _arrangement(sequence, begin, length, S: tl.constexpr):
    """(first row of a sequence, rows from one of its classes to the next) in what `_arrange` makes."""
    group = 4 * S
    return (begin // group + sequence).to(tl.int64) * group, tl.cdiv(length, group) * 4


@triton.jit
def _tensor(arranged, which, head, origin, padded, H: tl.constexpr, DP: tl.constexpr):
    """Where a sequence begins in one of the tensors (H, padded, DP) that `_arrange` makes."""
    return arranged + ((which * H + head).to(tl.int64) * padded + origin) * DP


@triton.jit
def _spare(value, column, D: tl.constexpr):
    """A float32 a row as columns D .. D + 2, the sum of three numbers that are exact in each of the dtypes.

    Its product with three ones is the number again, 24 bits of it: so the matrix units add it to a product of rows.
    """
    high = value.to(tl.bfloat16).to(tl.float32)
    middle = (value - high).to(tl.bfloat16).to(tl.float32)
    low = value - high - middle
    part = tl.where(column == D, high[:, None], tl.where(column == D + 1, middle[:, None], low[:, None]))
    return tl.where((column >= D) & (column < D + 3), part, 0.0)


@triton.jit
def _own_block(cu_seqlens, sequences, H: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr):
    """What a program of `_arrange` and `_arrange_grad` moves: (head, begin, origin, positions, rows, which there are)."""
    program = tl.program_id(0)
    head = program % H
    residue = program // H % S
    block = program // (H * S)
    sequence, begin, length = _sequence(cu_seqlens, sequences, block, BLOCK * S)
    origin, run = _arrangement(sequence, begin, length, S)
    index = BLOCK * (block - begin // (BLOCK * S) - sequence) + tl.arange(0, BLOCK)
    position = residue + S * index
    return head, begin.to(tl.int64), origin, position, residue * run + index, position < length


@triton.jit
def _arrange(
    q, k, v, arranged, cu_seqlens, sequences, padded, stride_l, stride_h,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, S: tl.constexpr, ONE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Queries, keys and values (T, H, D) by head, then by class of S, in rows of DP columns.

    The cache answers as many requests in a second for parts of lines as for whole ones: so what is read together should
    lie together. Where columns are left over, three hold ones for the keys and values, and for the queries minus the logit
    of the token's own key, the reference of its softmax.
    """
    head, begin, origin, position, row, valid = _own_block(cu_seqlens, sequences, H, S, BLOCK)
    base = begin * stride_l + head * stride_h
    offsets = position.to(tl.int64) * stride_l
    column = tl.arange(0, DP)[None, :]
    queries = _load_columns(q + base, offsets, valid, D, DP)
    keys = _load_columns(k + base, offsets, valid, D, DP)
    values = _load_columns(v + base, offsets, valid, D, DP)
    if DP - D >= 3:
        logit = tl.sum(queries.to(tl.float32) * keys.to(tl.float32), 1)
        ones = ((column >= D) & (column < D + 3)).to(tl.float32)
        most: tl.constexpr = 1.0e30 if ONE == 1 else 60000.0
        reference = _spare(tl.maximum(tl.minimum(-logit / ONE, most), -most), column, D)
        queries = tl.where(column < D, queries, reference.to(queries.dtype))
        keys = tl.where(column < D, keys, (ones * ONE).to(keys.dtype))
        values = tl.where(column < D, values, ones.to(values.dtype))
    _store_columns(_tensor(arranged, 0, head, origin, padded, H, DP), row * DP, valid, queries, DP, DP)
    _store_columns(_tensor(arranged, 1, head, origin, padded, H, DP), row * DP, valid, keys, DP, DP)
    _store_columns(_tensor(arranged, 2, head, origin, padded, H, DP), row * DP, valid, values, DP, DP)


@triton.jit
def _arrange_grad(
    grad, out, lse, arranged, arranged_grad, inners, cu_seqlens, sequences, tokens, padded, scale,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, S: tl.constexpr, ONE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of the output like the queries, and its inner product with the output.

    The columns left over take what the backward subtracts from logits and from their gradients: here minus the inner
    product, in the queries minus the log-sum-exp.
    """
    head, begin, origin, position, row, valid = _own_block(cu_seqlens, sequences, H, S, BLOCK)
    base = (begin * H + head) * D
    offsets = position.to(tl.int64) * (H * D)
    column = tl.arange(0, DP)[None, :]
    value = _load_columns(grad + base, offsets, valid, D, DP)
    inner = tl.sum(value.to(tl.float32) * _load_columns(out + base, offsets, valid, D, DP).to(tl.float32), 1)
    if DP - D >= 3:
        value = tl.where(column < D, value, _spare(-inner, column, D).to(value.dtype))
        log_sum = tl.load(lse + head.to(tl.int64) * tokens + begin + position, mask=valid, other=0.0)
        least: tl.constexpr = -1.0e30 if ONE == 1 else -60000.0  # for +inf, of a token that nothing covers
        parts = _spare(tl.maximum(-log_sum / (scale * LOG2_E * ONE), least), column, D)
        queries = _tensor(arranged, 0, head, origin, padded, H, DP) + row[:, None] * DP + column
        tl.store(queries, parts.to(arranged.dtype.element_ty), mask=valid[:, None] & (column >= D))
    else:
        tl.store(inners + head.to(tl.int64) * tokens + begin + position, inner, mask=valid)
    _store_columns(_tensor(arranged_grad, 0, head, origin, padded, H, DP), row * DP, valid, value, DP, DP)


@triton.jit
def _place(
    cu_seqlens, sequences, tokens, plan, head,
    H: tl.constexpr, R: tl.constexpr, S: tl.constexpr, NB: tl.constexpr, LARGEST: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Where this program's rows are: (begin of their sequence, its length, end of what is to be written, the two of
    `_arrangement`, step between rows, rows, their places in the arrangement, first row, last row that there is).

    Two neighbouring programs share 2 * BM rows of one class of S. Rows past the last sequence are written too: zeros.
    """
    span = 2 * BM * S
    pair = tl.program_id(0) // 2
    half = tl.program_id(0) % 2
    sequence, begin, length = _sequence(cu_seqlens, sequences, pair, span)
    end = tl.where(sequence == sequences - 1, tokens - begin, length)
    origin, run = _arrangement(sequence, begin, length, S)
    residue = tl.load(plan + NB * (2 + H) + head * S + tl.program_id(2))  # the classes with most keys first
    first = residue + S * 2 * BM * (pair - begin // span - sequence)
    width = tl.maximum(tl.minimum(tl.load(plan + 2 * LARGEST), length), 1)
    offset = tl.load(plan + NB * 2 + LARGEST * H + head)
    alternate = (S < R) & (((residue - first // width * width - offset) & (S - 1)) == 0)
    first += half * tl.where(alternate, S, S * BM)
    step = tl.where(alternate, R, S)
    rows = first + step * tl.arange(0, BM)
    last = tl.minimum(first + step * (BM - 1), length - 1)
    return begin, length, end, origin, run, step, rows, first % S * run + rows // S, first, last


@triton.jit
def _branch(plan, branch, head, first, last, step, length, H: tl.constexpr, NB: tl.constexpr):
    """What a branch is to this program's rows: (segment length, log2 of the ratio, offset of the head, start of the first
    row's segment, whether that segment holds and the branch covers all rows, whether it holds all and covers none)."""
    width = tl.minimum(tl.load(plan + 2 * branch), length)
    shift = tl.load(plan + 2 * branch + 1)
    offset = tl.load(plan + NB * 2 + branch * H + head)
    start = first // width * width
    one = last < start + width
    ratio = 1 << shift
    covers = ((first - start - offset) & (tl.minimum(ratio, step) - 1)) == 0
    return width, shift, offset, start, one & covers & (ratio <= step), one & (covers == 0)


@triton.jit
def _earlier(plan, branch, head, first, last, step, length, H: tl.constexpr, NB: tl.constexpr):
    """The nearest earlier branch that has keys for this program's rows, as `_branch` after its number; -1 for none."""
    before = branch - 1
    width, shift, offset, start, whole, none = _branch(
        plan, tl.maximum(before, 0), head, first, last, step, length, H, NB
    )  # fmt: skip
    while none & (before > 0):
        before -= 1
        width, shift, offset, start, whole, none = _branch(plan, before, head, first, last, step, length, H, NB)
    return before, width, shift, offset, start, whole & (before >= 0)


@triton.jit
def _hole(merges, real, key, shift, start, end):
    """(first, end) of a segment's slots that lie within start..end; `real` for both where a branch does not merge."""
    round_up = (1 << shift) - 1
    low = tl.minimum(tl.maximum((start - key + round_up) >> shift, 0), real)
    high = tl.minimum(tl.maximum((end - key + round_up) >> shift, low), real)
    return tl.where(merges, low, real), tl.where(merges, high, real)


@triton.jit
def _log_times(position, first, merged, R: tl.constexpr):
    """Log2 of how many branches have the key at a position: this one, and of the merged ones those whose ratio divides its
    distance from the rows. Four bits of `merged` for each power of two say how many have that ratio or a smaller one."""
    distance = (position - first) | R
    lowest = (distance & -distance).to(tl.float32)
    exponent = (lowest.to(tl.int32, bitcast=True) >> 23) - 127
    return tl.log2((1 + ((merged >> (4 * exponent)) & 15)).to(tl.float32))


@triton.jit
def _segment(rows, first, last, step, length, start, width, shift, offset, R: tl.constexpr, S: tl.constexpr):
    """(number of real slots, which rows the segment's branch covers, whether it covers all of them)."""
    ratio = 1 << shift
    real = (tl.minimum(width, length - start) - offset + ratio - 1) >> shift
    inside = (rows >= start) & (rows < start + width)
    whole = (first >= start) & (last < start + width) & (ratio <= step)
    if S < R:
        inside = inside & ((ratio <= step) | (((rows - start - offset) & (ratio - 1)) == 0))
    return real, inside, whole


@triton.jit
def _lanes(key, shift, run, S: tl.constexpr, BN: tl.constexpr):
    """(slot, row in the arrangement, position) of each of BN keys of a segment, of which the first is at position `key`.

    They are taken class by class, so that neighbours lie together. The next BN are BN * ratio / S rows further.
    """
    lane = tl.arange(0, BN)
    classes = tl.maximum(S >> shift, 1)
    group = lane * classes // BN
    within = lane - group * (BN // classes)
    position = key + (group << shift)
    row = position % S * run + position // S + within * tl.maximum((1 << shift) // S, 1)
    return group + within * classes, row, key + ((group + within * classes) << shift)


@triton.jit
def _hold(x, mask, BN: tl.constexpr, PRECISION: tl.constexpr):
    """A left factor of products in registers rather than in shared memory, and zeros (rows, 1) without which it is not.

    Triton keeps what was loaded in shared memory; and what was computed it copies to registers in every step of a loop, to
    spare them, unless a product outside the loop takes it too.
    """
    if x.dtype.primitive_bitwidth == 16 and x.shape[1] <= 64:
        x = tl.where(mask[:, None], x, 0.0)
        none = tl.zeros((x.shape[1], BN), x.dtype)
        return x, tl.sum(tl.dot(x, none, input_precision=PRECISION), 1)[:, None]
    return x, tl.zeros((x.shape[0], 1), tl.float32)


@triton.jit
def _forward_keys(
    q, acc, largest, total, ones, keys_at, values_at, lane, slot, log_times, tile_rows, low, high, key, key_step, real, rows,
    inside, factor,
    DP: tl.constexpr, SPARE: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    ONLINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take slots low..high of a segment into the softmax; `largest` is raised if ONLINE, else taken as it is."""
    for j in range(low, high, BN):
        there = slot < real - j
        row = (j // BN) * tile_rows * DP
        k = _load(keys_at + row, lane, there, DP, MASK)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASK:
            seen = inside[:, None] & there[None, :]
            if CAUSAL:
                seen = seen & ((key + (j + slot) * key_step)[None, :] <= rows[:, None])
            logits = tl.where(seen, logits, -float("inf"))
        if ONLINE:
            raised = tl.maximum(largest, tl.max(logits, 1) * factor)
            shrink = tl.exp2(largest - raised)
            largest = raised
            acc = acc * shrink[:, None]
            if not SPARE:
                total = total * shrink[:, None]
        exponent = logits * factor + log_times[None, :]
        if ONLINE or not SPARE:
            exponent -= largest[:, None]
        share = tl.exp2(exponent).to(q.dtype)
        if not SPARE:
            total = tl.dot(share, ones, total, input_precision=PRECISION)
        v = _load(values_at + row, lane, there, DP, MASK)
        acc = tl.dot(share, v, acc, input_precision=PRECISION)
    return acc, largest, total


@triton.jit
def _forward_branches(
    q, reference, keys_at, values_at, run, plan, head, rows, first, last, step, length, factor,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, S: tl.constexpr, NB: tl.constexpr,
    CAUSAL: tl.constexpr, MERGE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ONLINE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The softmax over all branches before its division: (sums of values; reference; sum of exponentials).

    Where columns are left over, the products of the queries with the keys have had the reference taken off already.
    """
    SPARE: tl.constexpr = DP - D >= 3
    zero = -reference if SPARE else tl.zeros((BM,), tl.float32)  # the exponent of a zero key
    largest = tl.zeros((BM,), tl.float32) if SPARE else reference
    q, none = _hold(q, rows < length, BN, PRECISION)
    acc = tl.zeros((BM, DP), tl.float32) + none
    total = tl.zeros((BM, 16), tl.float32)
    ones = tl.full((BN, 16), 1.0, q.dtype)
    zeros = tl.zeros((BM,), tl.int32)
    branch = NB - 1
    width, shift, offset, start, whole, _ = _branch(plan, branch, head, first, last, step, length, H, NB)
    merged = 0
    while branch >= 0:
        before, before_width, before_shift, before_offset, before_start, before_whole = _earlier(
            plan, branch, head, first, last, step, length, H, NB
        )  # fmt: skip
        hole, hole_end = before_start, tl.minimum(before_start + before_width, length)
        merges = MERGE & whole & before_whole & (before_shift <= shift) & (hole >= start) & (hole_end <= start + width)
        ratio = 1 << shift
        while start <= last:
            if ((first - start - offset) & (tl.minimum(ratio, step) - 1)) == 0:  # the branch covers rows here
                real, inside, all_rows = _segment(rows, first, last, step, length, start, width, shift, offset, R, S)
                key = start + offset
                unmasked = tl.where(all_rows, real, 0)
                if CAUSAL:
                    real = tl.minimum(real, ((last - key) >> shift) + 1)
                    unmasked = tl.minimum(unmasked, ((first - key) >> shift) + 1)
                else:
                    zeros += tl.where(inside, ((width + ratio - 1) >> shift) - real, 0)
                low, high = _hole(merges, real, key, shift, hole, hole_end)
                for piece in range(2):
                    skip = piece * high
                    count = tl.where(piece == 0, low, real - high)
                    if count > 0:
                        slot, lane, position = _lanes(key + (skip << shift), shift, run, S, BN)
                        log_times = _log_times(position, first, merged, R)
                        full = tl.maximum(tl.minimum(count, unmasked - skip), 0) // BN * BN
                        acc, largest, total = _forward_keys(
                            q, acc, largest, total, ones, keys_at, values_at, lane, slot, log_times, BN * ratio // S, 0,
                            full, key + (skip << shift), ratio, count, rows, inside, factor, DP, SPARE, BN, False, CAUSAL,
                            ONLINE, PRECISION,
                        )  # fmt: skip
                        if full < count:
                            acc, largest, total = _forward_keys(
                                q, acc, largest, total, ones, keys_at, values_at, lane, slot, log_times, BN * ratio // S,
                                full, count, key + (skip << shift), ratio, count, rows, inside, factor, DP, SPARE, BN,
                                True, CAUSAL, ONLINE, PRECISION,
                            )  # fmt: skip
            start += width
        merged = tl.where(merges, merged + (0x1111111 << (4 * shift)), 0)
        branch, width, shift, offset = before, before_width, before_shift, before_offset
        start, whole = before_start, before_whole
    sums = tl.sum(total, 1) / 16
    if SPARE:  # the values have a column of ones
        sums = tl.sum(tl.where(tl.arange(0, DP)[None, :] == D, acc, 0.0), 1)
    if not CAUSAL:  # at the end: scaling the accumulators within the loops would serialise their matrix instructions
        raised = largest
        if ONLINE:
            raised = tl.where(zeros > 0, tl.maximum(largest, zero), largest)
            shrink = tl.exp2(largest - raised)
            sums = sums * shrink
            acc = acc * shrink[:, None]
        sums += tl.where(zeros > 0, zeros * tl.exp2(zero - raised), 0.0)
        largest = raised
    return acc, largest - zero, sums


@triton.jit
def _forward(
    arranged, out, lse, plan, cu_seqlens, sequences, tokens, padded, scale,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, S: tl.constexpr, NB: tl.constexpr,
    LARGEST: tl.constexpr, CAUSAL: tl.constexpr, MERGE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    begin, length, end, origin, run, step, rows, own, first, last = _place(
        cu_seqlens, sequences, tokens, plan, head, H, R, S, NB, LARGEST, BM
    )  # fmt: skip
    if first >= end:
        return
    valid = rows < length
    keys_at = _tensor(arranged, 1, head, origin, padded, H, DP)
    values_at = _tensor(arranged, 2, head, origin, padded, H, DP)
    factor = scale * LOG2_E
    q = _load(_tensor(arranged, 0, head, origin, padded, H, DP), own, valid, DP, True)
    # A token sees its own key. Its logit is a good enough reference for the exponentials, unless another one is larger by
    # more than 41 (2 ** 60): then once more, with the running maximum. Shares of float16 are too narrow for that.
    NARROW: tl.constexpr = arranged.dtype.element_ty == tl.float16
    ONE: tl.constexpr = 256 if NARROW else 1
    if DP - D >= 3:
        parts = tl.where(tl.arange(0, DP)[None, :] >= D, q.to(tl.float32), 0.0)
        reference = tl.sum(parts, 1) * (-ONE * factor)
    else:
        reference = tl.sum(q.to(tl.float32) * _load(keys_at, own, valid, DP, True).to(tl.float32), 1) * factor
    acc, largest, total = _forward_branches(
        q, reference, keys_at, values_at, run, plan, head, rows, first, last, step, length, factor, H, D, DP, R, S,
        NB, CAUSAL, MERGE, BM, BN, NARROW, PRECISION,
    )  # fmt: skip
    if not NARROW:  # noqa: SIM102 (known when compiled: the other only when run)
        if tl.max(tl.where(valid & ~(total < 1.0e18), 1, 0), 0) > 0:
            acc, largest, total = _forward_branches(
                q, reference, keys_at, values_at, run, plan, head, rows, first, last, step, length, factor, H, D,
                DP, R, S, NB, CAUSAL, MERGE, BM, BN, True, PRECISION,
            )  # fmt: skip
    covered = total > 0
    inverse = tl.where(covered, 1.0 / tl.where(covered, total, 1.0), 0.0)
    # +inf where nothing covers the token: the backward's exp(logit - lse) is then 0.
    log_sum = tl.where(covered, largest + tl.log2(tl.where(covered, total, 1.0)), float("inf"))
    out_base = (begin.to(tl.int64) * H + head) * D
    inverse = tl.where(valid, inverse, 0.0)
    _store_columns(out + out_base, rows.to(tl.int64) * (H * D), rows < end, acc * inverse[:, None], D, DP)
    tl.store(lse + head.to(tl.int64) * tokens + begin + rows, log_sum, mask=valid)


@triton.jit
def _backward_q_keys(
    q, grad, acc, log_sum, inner, keys_at, values_at, lane, slot, log_times, tile_rows, low, high, key, key_step, real, rows,
    inside, factor,
    DP: tl.constexpr, SPARE: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    for j in range(low, high, BN):
        there = slot < real - j
        row = (j // BN) * tile_rows * DP
        k = _load(keys_at + row, lane, there, DP, MASK)
        v = _load(values_at + row, lane, there, DP, MASK)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        grad_share = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        exponent = logits * factor + log_times[None, :]
        if not SPARE:
            exponent -= log_sum[:, None]
            grad_share -= inner[:, None]
        share = tl.exp2(exponent)
        if MASK:
            seen = inside[:, None] & there[None, :]
            if CAUSAL:
                seen = seen & ((key + (j + slot) * key_step)[None, :] <= rows[:, None])
            share = tl.where(seen, share, 0.0)
        acc = tl.dot((share * grad_share).to(q.dtype), k, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _backward_q(
    arranged, arranged_grad, lse, inners, grad_q, grad_stride, plan, cu_seqlens, sequences, tokens, padded, scale,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, S: tl.constexpr, NB: tl.constexpr,
    LARGEST: tl.constexpr, CAUSAL: tl.constexpr, MERGE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    SPARE: tl.constexpr = DP - D >= 3
    head = tl.program_id(1)
    begin, length, end, origin, run, step, rows, own, first, last = _place(
        cu_seqlens, sequences, tokens, plan, head, H, R, S, NB, LARGEST, BM
    )  # fmt: skip
    if first >= end:
        return
    valid = rows < length
    keys_at = _tensor(arranged, 1, head, origin, padded, H, DP)
    values_at = _tensor(arranged, 2, head, origin, padded, H, DP)
    q = _load(_tensor(arranged, 0, head, origin, padded, H, DP), own, valid, DP, True)
    grad = _load(_tensor(arranged_grad, 0, head, origin, padded, H, DP), own, valid, DP, True)
    log_sum = tl.zeros((BM,), tl.float32)
    inner = tl.zeros((BM,), tl.float32)
    if not SPARE:
        log_sum = tl.load(lse + head.to(tl.int64) * tokens + begin + rows, mask=valid, other=float("inf"))
        inner = tl.load(inners + head.to(tl.int64) * tokens + begin + rows, mask=valid, other=0.0)
    q, none = _hold(q, valid, BN, PRECISION)
    grad, nothing = _hold(grad, valid, BN, PRECISION)
    acc = tl.zeros((BM, DP), tl.float32) + none + nothing
    factor = scale * LOG2_E
    branch = NB - 1
    width, shift, offset, start, whole, _ = _branch(plan, branch, head, first, last, step, length, H, NB)
    merged = 0
    while branch >= 0:
        before, before_width, before_shift, before_offset, before_start, before_whole = _earlier(
            plan, branch, head, first, last, step, length, H, NB
        )  # fmt: skip
        hole, hole_end = before_start, tl.minimum(before_start + before_width, length)
        merges = MERGE & whole & before_whole & (before_shift <= shift) & (hole >= start) & (hole_end <= start + width)
        ratio = 1 << shift
        while start <= last:
            if ((first - start - offset) & (tl.minimum(ratio, step) - 1)) == 0:  # the branch covers rows here
                real, inside, all_rows = _segment(rows, first, last, step, length, start, width, shift, offset, R, S)
                key = start + offset
                unmasked = tl.where(all_rows, real, 0)
                if CAUSAL:
                    real = tl.minimum(real, ((last - key) >> shift) + 1)
                    unmasked = tl.minimum(unmasked, ((first - key) >> shift) + 1)
                low, high = _hole(merges, real, key, shift, hole, hole_end)
                for piece in range(2):
                    skip = piece * high
                    count = tl.where(piece == 0, low, real - high)
                    if count > 0:
                        slot, lane, position = _lanes(key + (skip << shift), shift, run, S, BN)
                        log_times = _log_times(position, first, merged, R)
                        full = tl.maximum(tl.minimum(count, unmasked - skip), 0) // BN * BN
                        acc = _backward_q_keys(
                            q, grad, acc, log_sum, inner, keys_at, values_at, lane, slot, log_times, BN * ratio // S, 0,
                            full, key + (skip << shift), ratio, count, rows, inside, factor, DP, SPARE, BN, False, CAUSAL,
                            PRECISION,
                        )  # fmt: skip
                        if full < count:
                            acc = _backward_q_keys(
                                q, grad, acc, log_sum, inner, keys_at, values_at, lane, slot, log_times, BN * ratio // S,
                                full, count, key + (skip << shift), ratio, count, rows, inside, factor, DP, SPARE, BN,
                                True, CAUSAL, PRECISION,
                            )  # fmt: skip
            start += width
        merged = tl.where(merges, merged + (0x1111111 << (4 * shift)), 0)
        branch, width, shift, offset = before, before_width, before_shift, before_offset
        start, whole = before_start, before_whole
    grad_base = begin.to(tl.int64) * grad_stride + head * D
    acc = tl.where(valid[:, None], acc * scale, 0.0)
    _store_columns(grad_q + grad_base, rows.to(tl.int64) * grad_stride, rows < end, acc, D, DP)


@triton.jit
def _backward_kv_queries(
    k, v, acc_k, acc_v, queries_at, grads_at, lse_at, inners_at, lane, slot, log_times, tile_rows, low, high, query,
    query_step, real, rows, inside, factor,
    DP: tl.constexpr, SPARE: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    for j in range(low, high, BN):
        there = slot < real - j
        row = (j // BN) * tile_rows * DP
        q = _load(queries_at + row, lane, there, DP, MASK)
        grad = _load(grads_at + row, lane, there, DP, MASK)
        logits = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        grad_share = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        exponent = logits * factor + log_times[None, :]
        if not SPARE:
            position = query + (j + slot) * query_step
            exponent -= tl.load(lse_at + position, mask=there, other=float("inf"))[None, :]
            grad_share -= tl.load(inners_at + position, mask=there, other=0.0)[None, :]
        share = tl.exp2(exponent)
        if MASK:
            seen = inside[:, None] & there[None, :]
            if CAUSAL:
                seen = seen & ((query + (j + slot) * query_step)[None, :] >= rows[:, None])
            share = tl.where(seen, share, 0.0)
        acc_v = tl.dot(share.to(k.dtype), grad, acc_v, input_precision=PRECISION)
        acc_k = tl.dot((share * grad_share).to(k.dtype), q, acc_k, input_precision=PRECISION)
    return acc_k, acc_v


@triton.jit
def _backward_kv(
    arranged, arranged_grad, lse, inners, grad_k, grad_v, grad_stride, plan, cu_seqlens, sequences, tokens, padded, scale,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, S: tl.constexpr, NB: tl.constexpr,
    LARGEST: tl.constexpr, CAUSAL: tl.constexpr, MERGE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The queries of a segment are the positions of its keys: the loops are those of the forward, with rows for keys."""
    SPARE: tl.constexpr = DP - D >= 3
    head = tl.program_id(1)
    begin, length, end, origin, run, step, rows, own, first, last = _place(
        cu_seqlens, sequences, tokens, plan, head, H, R, S, NB, LARGEST, BM
    )  # fmt: skip
    if first >= end:
        return
    valid = rows < length
    queries_at = _tensor(arranged, 0, head, origin, padded, H, DP)
    grads_at = _tensor(arranged_grad, 0, head, origin, padded, H, DP)
    lse_at = lse + head.to(tl.int64) * tokens + begin
    inners_at = inners + head.to(tl.int64) * tokens + begin
    k = _load(_tensor(arranged, 1, head, origin, padded, H, DP), own, valid, DP, True)
    v = _load(_tensor(arranged, 2, head, origin, padded, H, DP), own, valid, DP, True)
    k, none = _hold(k, valid, BN, PRECISION)
    v, nothing = _hold(v, valid, BN, PRECISION)
    acc_k = tl.zeros((BM, DP), tl.float32) + none
    acc_v = tl.zeros((BM, DP), tl.float32) + nothing
    factor = scale * LOG2_E
    branch = NB - 1
    width, shift, offset, start, whole, _ = _branch(plan, branch, head, first, last, step, length, H, NB)
    merged = 0
    while branch >= 0:
        before, before_width, before_shift, before_offset, before_start, before_whole = _earlier(
            plan, branch, head, first, last, step, length, H, NB
        )  # fmt: skip
        hole, hole_end = before_start, tl.minimum(before_start + before_width, length)
        merges = MERGE & whole & before_whole & (before_shift <= shift) & (hole >= start) & (hole_end <= start + width)
        ratio = 1 << shift
        while start <= last:
            if ((first - start - offset) & (tl.minimum(ratio, step) - 1)) == 0:  # the branch covers rows here
                real, inside, all_rows = _segment(rows, first, last, step, length, start, width, shift, offset, R, S)
                query = start + offset
                low, high = _hole(merges, real, query, shift, hole, hole_end)
                for piece in range(2):
                    skip = piece * high
                    count = tl.where(piece == 0, low, real - high)
                    if count > 0:
                        slot, lane, position = _lanes(query + (skip << shift), shift, run, S, BN)
                        log_times = _log_times(position, first, merged, R)
                        seen = 0
                        full = tl.where(all_rows, count // BN * BN, 0)
                        if CAUSAL:  # masked up to the last row, then whole
                            seen = tl.maximum((tl.maximum(first - query, 0) >> shift) - skip, 0) // BN * BN
                            seam = tl.maximum(((last - query) >> shift) + BN - skip, 0) // BN * BN
                            seam = tl.minimum(seam, full)
                            acc_k, acc_v = _backward_kv_queries(
                                k, v, acc_k, acc_v, queries_at, grads_at, lse_at, inners_at, lane, slot, log_times,
                                BN * ratio // S, seen, seam, query + (skip << shift), ratio, count, rows, inside, factor,
                                DP, SPARE, BN, True, CAUSAL, PRECISION,
                            )  # fmt: skip
                            seen = tl.maximum(seen, seam)
                        acc_k, acc_v = _backward_kv_queries(
                            k, v, acc_k, acc_v, queries_at, grads_at, lse_at, inners_at, lane, slot, log_times,
                            BN * ratio // S, seen, full, query + (skip << shift), ratio, count, rows, inside, factor, DP,
                            SPARE, BN, False, CAUSAL, PRECISION,
                        )  # fmt: skip
                        if tl.maximum(seen, full) < count:
                            acc_k, acc_v = _backward_kv_queries(
                                k, v, acc_k, acc_v, queries_at, grads_at, lse_at, inners_at, lane, slot, log_times,
                                BN * ratio // S, tl.maximum(seen, full), count, query + (skip << shift), ratio, count,
                                rows, inside, factor, DP, SPARE, BN, True, CAUSAL, PRECISION,
                            )  # fmt: skip
            start += width
        merged = tl.where(merges, merged + (0x1111111 << (4 * shift)), 0)
        branch, width, shift, offset = before, before_width, before_shift, before_offset
        start, whole = before_start, before_whole
    grad_base = begin.to(tl.int64) * grad_stride + head * D
    grad_offsets = rows.to(tl.int64) * grad_stride
    acc_k = tl.where(valid[:, None], acc_k * scale, 0.0)
    acc_v = tl.where(valid[:, None], acc_v, 0.0)
    _store_columns(grad_k + grad_base, grad_offsets, rows < end, acc_k, D, DP)
    _store_columns(grad_v + grad_base, grad_offsets, rows < end, acc_v, D, DP)


@cache  # for good: a CUDA graph may read it
def _plan(
    segment_lengths: tuple[int, ...], dilated_ratios: tuple[int, ...], heads: int, stride: int, device: torch.device
) -> Tensor:
    """What the kernels look up, int32: segment length and log2 of the ratio of each branch; the offset of each head in each
    branch; the classes of each head in the order of their number of keys, most first, so that no long one is left over."""
    ratios = torch.tensor(dilated_ratios)
    offsets = torch.arange(heads) // -(-heads // ratios[:, None])
    covered = (torch.arange(stride) - offsets[..., None]) % ratios[:, None, None].clamp(max=stride) == 0
    keys = (covered * (torch.tensor(segment_lengths) / ratios)[:, None, None]).sum(0)
    branches = torch.stack([torch.tensor(segment_lengths), ratios.log2().long()], 1)
    parts = (branches, offsets, keys.argsort(dim=1, descending=True, stable=True))
    with torch.inference_mode(False):
        return torch.cat([part.flatten() for part in parts]).int().to(device)


BLOCKS: dict[str, dict[str, int]] = {
    "forward": {"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 3, "maxnreg": 168},
    "forward_long": {"BM": 128, "BN": 64, "num_warps": 4, "num_stages": 3, "maxnreg": 255},
    "backward_q": {"BM": 64, "BN": 32, "num_warps": 4, "num_stages": 3, "maxnreg": 128},
    "backward_kv": {"BM": 64, "BN": 32, "num_warps": 4, "num_stages": 3, "maxnreg": 168},
}
"""The fastest of 20 to 30 tried for each on H200s, at 10,000 and 70,000 tokens and head dimension 48."""
LONG = 5 * 2**18
"""Tokens times heads from which on blocks of 128 queries are 2 to 5% faster: those of 64 read the keys twice as often."""
OTHER_BLOCKS = {"BM": 64, "BN": 32, "num_warps": 4, "num_stages": 2}
"""For float32, and for head dimensions over 64."""
ARRANGE_BLOCK = 64


def _columns(dim: int) -> int:
    """Of a row of what `_arrange` makes: a power of two, at least 16, as the matrix units need it."""
    return max(16, int(triton.next_power_of_2(dim)))


def _settings(
    shape: Sequence[int],
    dtype: torch.dtype,
    cu_seqlens: Tensor,
    kernel: str,
    segment_lengths: Sequence[int],
    ratios: Sequence[int],
    causal: bool,
) -> Any:
    tokens, heads, dim = shape
    largest = max(ratios)
    stride = max(1, largest // 2)
    if kernel == "forward" and tokens * heads >= LONG:
        kernel = "forward_long"
    blocks = OTHER_BLOCKS if dtype == torch.float32 or dim > 64 else BLOCKS[kernel]
    pairs = tokens // (2 * blocks["BM"] * stride) + len(cu_seqlens) - 1
    constants = {
        "H": heads, "D": dim, "DP": _columns(dim), "R": largest, "S": stride, "NB": len(ratios),
        "LARGEST": list(ratios).index(largest), "CAUSAL": causal,
        "MERGE": blocks["BN"] >= largest and len(ratios) < 16,  # what `_log_times` can count
        "PRECISION": "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3", **blocks,
    }  # fmt: skip
    lengths = tuple(min(length, 2 ** (tokens - 1).bit_length()) for length in segment_lengths)
    return (2 * pairs, heads, stride), constants, _plan(lengths, tuple(ratios), heads, stride, cu_seqlens.device)


def _arrange_settings(
    shape: Sequence[int], dtype: torch.dtype, cu_seqlens: Tensor, ratios: Sequence[int]
) -> tuple[int, tuple[int], dict[str, int]]:
    """Rows of a head in what `_arrange` makes, its grid and constants.

    Each sequence takes whole groups of four rows of every class. Float16 holds the softmax's reference and the log-sum-exp
    as 256ths.
    """
    tokens, heads, dim = shape
    stride = max(1, max(ratios) // 2)
    sequences = len(cu_seqlens) - 1
    programs = (tokens // (ARRANGE_BLOCK * stride) + sequences) * heads * stride
    one = 256 if dtype == torch.float16 else 1
    constants = {"H": heads, "D": dim, "DP": _columns(dim), "S": stride, "ONE": one, "BLOCK": ARRANGE_BLOCK}
    return (tokens // (4 * stride) + sequences) * 4 * stride, (programs,), constants


def _arranged(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, ratios: Sequence[int]) -> Tensor:
    """`(3, H, rows, columns)`, see `_arrange`."""
    if not q.stride() == k.stride() == v.stride() or q.stride(2) != 1:
        q, k, v = (x.contiguous() for x in (q, k, v))
    rows, grid, constants = _arrange_settings(q.shape, q.dtype, cu_seqlens, ratios)
    arranged = torch.empty((3, q.shape[1], rows, constants["DP"]), dtype=q.dtype, device=q.device)
    _arrange[grid](
        q, k, v, arranged, cu_seqlens, len(cu_seqlens) - 1, rows, q.stride(0), q.stride(1), **constants
    )  # fmt: skip
    return arranged


def _run_forward(
    arranged: Tensor,
    shape: Sequence[int],
    cu_seqlens: Tensor,
    segment_lengths: Sequence[int],
    ratios: Sequence[int],
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    out = torch.empty(tuple(shape), dtype=arranged.dtype, device=arranged.device)
    lse = torch.empty((shape[1], shape[0]), dtype=torch.float32, device=arranged.device)
    grid, constants, plan = _settings(shape, arranged.dtype, cu_seqlens, "forward", segment_lengths, ratios, causal)
    _forward[grid](
        arranged, out, lse, plan, cu_seqlens, len(cu_seqlens) - 1, shape[0], arranged.shape[2], scale, **constants
    )  # fmt: skip
    return out, lse


def _run_backward(
    grad: Tensor,
    arranged: Tensor,
    cu_seqlens: Tensor,
    out: Tensor,
    lse: Tensor,
    grads: Sequence[Tensor],
    segment_lengths: Sequence[int],
    ratios: Sequence[int],
    causal: bool,
    scale: float,
) -> None:
    """Write the gradients of q, k and v to three tensors (T, H, D) of one set of strides, heads end to end."""
    rows, grid, constants = _arrange_settings(out.shape, out.dtype, cu_seqlens, ratios)
    arranged_grad = torch.empty(arranged.shape[1:], dtype=out.dtype, device=out.device)
    inners = torch.empty_like(lse)
    sizes = (cu_seqlens, len(cu_seqlens) - 1, len(out), rows, scale)
    _arrange_grad[grid](grad.contiguous(), out, lse, arranged, arranged_grad, inners, *sizes, **constants)
    for name, kernel, outputs in (("backward_q", _backward_q, grads[:1]), ("backward_kv", _backward_kv, grads[1:])):
        grid, constants, plan = _settings(out.shape, out.dtype, cu_seqlens, name, segment_lengths, ratios, causal)
        kernel[grid](arranged, arranged_grad, lse, inners, *outputs, grads[0].stride(0), plan, *sizes, **constants)


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
    arranged = _arranged(q, k, v, cu_seqlens, dilated_ratios)
    return _run_forward(arranged, q.shape, cu_seqlens, segment_lengths, dilated_ratios, is_causal, scale)


_op = torch.library.custom_op("longslide::dilated_attention", _attend, mutates_args=())


@_op.register_fake
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
    arranged = _arranged(q, k, v, cu_seqlens, dilated_ratios)
    grad_q, grad_k, grad_v = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    _run_backward(
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


_op.register_autograd(_differentiate, setup_context=_save)


class _SelfAttention(torch.autograd.Function):
    """The op without its dispatcher, which takes longer than the kernels on short sequences; of `(T, 3, H, D)`.

    What the kernels read is kept in place of the projection, whose memory is free once this has run.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cu_seqlens: Tensor, *settings: Any) -> Tensor:
        q, k, v = qkv.unbind(1)
        arranged = _arranged(q, k, v, cu_seqlens, settings[1])
        out, lse = _run_forward(arranged, (len(qkv), *qkv.shape[2:]), cu_seqlens, *settings)
        ctx.save_for_backward(arranged, cu_seqlens, out, lse)
        ctx.settings = settings
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        arranged, cu_seqlens, out, lse = ctx.saved_tensors
        grad_qkv = torch.empty((len(out), 3, *out.shape[1:]), dtype=out.dtype, device=out.device)
        _run_backward(grad, arranged, cu_seqlens, out, lse, grad_qkv.unbind(1), *ctx.settings)
        return grad_qkv, None, None, None, None, None


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
    output, _ = _op(q, k, v, cu_seqlens, list(segment_lengths), list(dilated_ratios), is_causal, scale)
    return output


def fused_dilated_self_attention(
    qkv: Tensor, cu_seqlens: Tensor, segment_lengths: Sequence[int], dilated_ratios: Sequence[int]
) -> Tensor:
    """`fused_dilated_attention` of the projection `(T, 3, H, D)` of packed sequences, not causal: `(T, H, D)`."""
    settings = (list(segment_lengths), list(dilated_ratios), False, qkv.shape[3] ** -0.5)
    if torch.compiler.is_compiling():
        q, k, v = qkv.unbind(1)
        return fused_dilated_attention(q, k, v, cu_seqlens, *settings)
    output: Tensor = _SelfAttention.apply(qkv, cu_seqlens, *settings)
    return output
