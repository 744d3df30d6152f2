"""Dilated attention in Triton: all branches in one running softmax, forward and backward, nothing gathered or padded.

Tokens are taken in residue classes of half the largest ratio R: within a segment a branch of a smaller ratio covers either
every token of a class or none, so a block of one class streams exactly the keys of the branches that cover it, by strided
reads, and no branch has an output of its own. In the classes of which R's branch covers every second token, one block takes
those tokens and its neighbour the others. Zero-key slots are added to the denominator by arithmetic. A block that straddles
a segment's border goes through the keys of both segments, each for its own rows. Sequences are packed end to end; programs
find theirs by the cumulative lengths, so that no table is made and lengths never come to the host. No atomics: results are
the same in every run.
"""

from collections.abc import Sequence
from functools import lru_cache
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
def _load(pointer, offsets, mask, D: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, MASK: tl.constexpr):
    """(rows, WIDTH) of columns START.. of rows of D columns, where the offsets of the rows are given."""
    columns = START + tl.arange(0, WIDTH)
    where = offsets[:, None] + columns[None, :]
    if MASK:
        if START + WIDTH > D:
            return tl.load(pointer + where, mask=mask[:, None] & (columns < D)[None, :], other=0.0)
        return tl.load(pointer + where, mask=mask[:, None], other=0.0)
    if START + WIDTH > D:
        return tl.load(pointer + where, mask=(columns < D)[None, :], other=0.0)
    return tl.load(pointer + where)


@triton.jit
def _store(pointer, offsets, mask, value, D: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr):
    columns = START + tl.arange(0, WIDTH)
    where = offsets[:, None] + columns[None, :]
    value = value.to(pointer.dtype.element_ty)
    if START + WIDTH > D:
        tl.store(pointer + where, value, mask=mask[:, None] & (columns < D)[None, :])
    else:
        tl.store(pointer + where, value, mask=mask[:, None])


@triton.jit
def _place(
    cu_seqlens, sequences, plan, head,
    H: tl.constexpr, R: tl.constexpr, S: tl.constexpr, NB: tl.constexpr, LARGEST: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Where this program's rows are: (begin of the sequence, its length, first row, step between rows).

    Two neighbouring programs share 2 * BM rows of one class of S. Sequence b starts at pair `begin // span + b`, which
    leaves each at least as many pairs as it needs.
    """
    span = 2 * BM * S
    pair = tl.program_id(0) // 2
    half = tl.program_id(0) % 2
    low = 0
    high = sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(cu_seqlens + middle) // span + middle <= pair:
            low = middle
        else:
            high = middle
    begin = tl.load(cu_seqlens + low)
    length = tl.load(cu_seqlens + low + 1) - begin
    residue = tl.load(plan + NB * (2 + H) + head * S + tl.program_id(2))  # the classes with most keys first
    first = residue + S * 2 * BM * (pair - begin // span - low)
    width = tl.maximum(tl.minimum(tl.load(plan + 2 * LARGEST), length), 1)
    offset = tl.load(plan + NB * 2 + LARGEST * H + head)
    alternate = (S < R) & (((residue - first // width * width - offset) & (S - 1)) == 0)
    first += half * tl.where(alternate, S, S * BM)
    return begin, length, first, tl.where(alternate, R, S)


@triton.jit
def _branch(plan, branch, head, first, length, H: tl.constexpr, NB: tl.constexpr):
    """(segment length, log2 of the ratio, offset of the head, start of the first row's segment) of a branch."""
    width = tl.minimum(tl.load(plan + 2 * branch), length)
    shift = tl.load(plan + 2 * branch + 1)
    offset = tl.load(plan + NB * 2 + branch * H + head)
    return width, shift, offset, first // width * width


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
def _forward_keys(
    q1, q2, acc1, acc2, largest, total, ones, k, v, lane, base, base_step, low, high, key, key_step, real, rows, inside,
    factor,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    ONLINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take slots low..high of a segment into the softmax; `largest` is raised if ONLINE, else taken as it is."""
    for j in range(low, high, BN):
        there = j + tl.arange(0, BN) < real
        where = base + (j // BN) * base_step
        k1 = _load(k + where, lane, there, D, 0, D1, MASK)
        logits = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
        if D2 > 0:
            k2 = _load(k + where, lane, there, D, D1, D2, MASK)
            logits = tl.dot(q2, tl.trans(k2), logits, input_precision=PRECISION)
        if MASK:
            seen = inside[:, None] & there[None, :]
            if CAUSAL:
                keys = key + (j + tl.arange(0, BN)) * key_step
                seen = seen & (keys[None, :] <= rows[:, None])
            logits = tl.where(seen, logits, -float("inf"))
        if ONLINE:
            raised = tl.maximum(largest, tl.max(logits, 1) * factor)
            shrink = tl.exp2(largest - raised)
            largest = raised
            acc1 = acc1 * shrink[:, None]
            total = total * shrink[:, None]
            if D2 > 0:
                acc2 = acc2 * shrink[:, None]
        share = tl.exp2(logits * factor - largest[:, None])
        share = share.to(q1.dtype)
        total = tl.dot(share, ones, total, input_precision=PRECISION)
        v1 = _load(v + where, lane, there, D, 0, D1, MASK)
        acc1 = tl.dot(share, v1, acc1, input_precision=PRECISION)
        if D2 > 0:
            v2 = _load(v + where, lane, there, D, D1, D2, MASK)
            acc2 = tl.dot(share, v2, acc2, input_precision=PRECISION)
    return acc1, acc2, largest, total


@triton.jit
def _forward_branches(
    q1, q2, largest, k, v, plan, base, head, rows, first, last, step, length, stride_l, factor,
    H: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    NB: tl.constexpr, CAUSAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ONLINE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The softmax over all branches before its division: (sums of values, in two parts; reference; sum of exponentials)."""
    acc1 = tl.zeros((BM, D1), tl.float32)
    acc2 = acc1
    if D2 > 0:
        acc2 = tl.zeros((BM, D2), tl.float32)
    total = tl.zeros((BM, 16), tl.float32)
    ones = tl.full((BN, 16), 1.0, q1.dtype)
    zeros = tl.zeros((BM,), tl.int32)
    for branch in range(NB):
        width, shift, offset, start = _branch(plan, branch, head, first, length, H, NB)
        ratio = 1 << shift
        lane = tl.arange(0, BN) * (ratio * stride_l)
        while start <= last:
            if ((first - start - offset) & (tl.minimum(ratio, step) - 1)) == 0:  # the branch covers rows here
                real, inside, whole = _segment(rows, first, last, step, length, start, width, shift, offset, R, S)
                full = tl.where(whole, real // BN * BN, 0)
                if CAUSAL:
                    real = tl.minimum(real, ((last - start - offset) >> shift) + 1)
                    full = tl.where(whole, tl.minimum(full, (((first - start - offset) >> shift) + 1) // BN * BN), 0)
                else:
                    zeros += tl.where(inside, ((width + ratio - 1) >> shift) - real, 0)
                key = start + offset
                key_base = base + key.to(tl.int64) * stride_l
                key_base_step = (BN * ratio * stride_l).to(tl.int64)
                acc1, acc2, largest, total = _forward_keys(
                    q1, q2, acc1, acc2, largest, total, ones, k, v, lane, key_base, key_base_step, 0, full, key, ratio,
                    real, rows, inside, factor, D, D1, D2, BN, False, CAUSAL, ONLINE, PRECISION,
                )  # fmt: skip
                if full < real:
                    acc1, acc2, largest, total = _forward_keys(
                        q1, q2, acc1, acc2, largest, total, ones, k, v, lane, key_base, key_base_step, full, real, key,
                        ratio, real, rows, inside, factor, D, D1, D2, BN, True, CAUSAL, ONLINE, PRECISION,
                    )  # fmt: skip
            start += width
    total = tl.sum(total, 1) / 16
    if not CAUSAL:  # at the end: scaling the accumulators within the loops would serialise their matrix instructions
        raised = largest
        if ONLINE:
            raised = tl.where(zeros > 0, tl.maximum(largest, 0.0), largest)
            shrink = tl.exp2(largest - raised)
            total = total * shrink
            acc1 = acc1 * shrink[:, None]
            acc2 = acc2 * shrink[:, None]
        total += tl.where(zeros > 0, zeros * tl.exp2(-raised), 0.0)
        largest = raised
    return acc1, acc2, largest, total


@triton.jit
def _forward(
    q, k, v, out, lse, plan, cu_seqlens, sequences, tokens, stride_l, stride_h, scale,
    H: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    NB: tl.constexpr, LARGEST: tl.constexpr, CAUSAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    begin, length, first, step = _place(cu_seqlens, sequences, plan, head, H, R, S, NB, LARGEST, BM)
    if first >= length:
        return
    rows = first + step * tl.arange(0, BM)
    valid = rows < length
    last = tl.minimum(first + step * (BM - 1), length - 1)
    base = begin.to(tl.int64) * stride_l + head * stride_h
    row_offsets = rows.to(tl.int64) * stride_l
    factor = scale * LOG2_E
    q1 = _load(q + base, row_offsets, valid, D, 0, D1, True)
    k1 = _load(k + base, row_offsets, valid, D, 0, D1, True)
    own = tl.sum(q1.to(tl.float32) * k1.to(tl.float32), 1)
    q2 = q1
    if D2 > 0:
        q2 = _load(q + base, row_offsets, valid, D, D1, D2, True)
        k2 = _load(k + base, row_offsets, valid, D, D1, D2, True)
        own += tl.sum(q2.to(tl.float32) * k2.to(tl.float32), 1)
    # A token sees its own key. Its logit is a good enough reference for the exponentials, unless another one is larger by
    # more than 41 (2 ** 60): then once more, with the running maximum. Shares of float16 are too narrow for that.
    acc1, acc2, largest, total = _forward_branches(
        q1, q2, own * factor, k, v, plan, base, head, rows, first, last, step, length, stride_l, factor, H, D, D1, D2,
        R, S, NB, CAUSAL, BM, BN, q.dtype.element_ty == tl.float16, PRECISION,
    )  # fmt: skip
    if q.dtype.element_ty != tl.float16:  # noqa: SIM102 (known when compiled: the other only when run)
        if tl.max(tl.where(valid & ~(total < 1.0e18), 1, 0), 0) > 0:
            acc1, acc2, largest, total = _forward_branches(
                q1, q2, own * factor, k, v, plan, base, head, rows, first, last, step, length, stride_l, factor, H, D,
                D1, D2, R, S, NB, CAUSAL, BM, BN, True, PRECISION,
            )  # fmt: skip
    covered = total > 0
    inverse = tl.where(covered, 1.0 / tl.where(covered, total, 1.0), 0.0)
    # +inf where nothing covers the token: the backward's exp(logit - lse) is then 0.
    log_sum = tl.where(covered, largest + tl.log2(tl.where(covered, total, 1.0)), float("inf"))
    out_offsets = rows.to(tl.int64) * (H * D)
    out_base = (begin.to(tl.int64) * H + head) * D
    _store(out + out_base, out_offsets, valid, acc1 * inverse[:, None], D, 0, D1)
    if D2 > 0:
        _store(out + out_base, out_offsets, valid, acc2 * inverse[:, None], D, D1, D2)
    tl.store(lse + head.to(tl.int64) * tokens + begin + rows, log_sum, mask=valid)


@triton.jit
def _store_stats(stats, rows, valid, minus_log_sum, minus_inner):
    """Two float32 a row as columns 0..2 and 3..5 of a matrix with 16, each the sum of three numbers of its dtype.

    A product with a row of ones adds them to the logits and their gradients in the matrix units, exactly enough: 24 bits.
    """
    columns = tl.arange(0, 16)[None, :]
    value = tl.where(columns < 3, minus_log_sum[:, None], minus_inner[:, None])
    high = value.to(stats.dtype.element_ty)
    value -= high.to(tl.float32)
    middle = value.to(stats.dtype.element_ty)
    low = (value - middle.to(tl.float32)).to(stats.dtype.element_ty)
    part = tl.where(columns % 3 == 0, high, tl.where(columns % 3 == 1, middle, low))
    tl.store(stats + rows[:, None] * 16 + columns, tl.where(columns < 6, part, 0.0), mask=valid[:, None])


@triton.jit
def _backward_q_keys(
    q1, q2, g1, g2, acc1, acc2, log_sum, inner, k, v, lane, base, base_step, low, high, key, key_step, real, rows, inside,
    factor,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    for j in range(low, high, BN):
        there = j + tl.arange(0, BN) < real
        where = base + (j // BN) * base_step
        k1 = _load(k + where, lane, there, D, 0, D1, MASK)
        v1 = _load(v + where, lane, there, D, 0, D1, MASK)
        logits = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
        grad_share = tl.dot(g1, tl.trans(v1), input_precision=PRECISION)
        if D2 > 0:
            k2 = _load(k + where, lane, there, D, D1, D2, MASK)
            v2 = _load(v + where, lane, there, D, D1, D2, MASK)
            logits = tl.dot(q2, tl.trans(k2), logits, input_precision=PRECISION)
            grad_share = tl.dot(g2, tl.trans(v2), grad_share, input_precision=PRECISION)
        share = tl.exp2(logits * factor - log_sum[:, None])
        if MASK:
            seen = inside[:, None] & there[None, :]
            if CAUSAL:
                keys = key + (j + tl.arange(0, BN)) * key_step
                seen = seen & (keys[None, :] <= rows[:, None])
            share = tl.where(seen, share, 0.0)
        grad_logits = (share * (grad_share - inner[:, None])).to(q1.dtype)
        acc1 = tl.dot(grad_logits, k1, acc1, input_precision=PRECISION)
        if D2 > 0:
            acc2 = tl.dot(grad_logits, k2, acc2, input_precision=PRECISION)
    return acc1, acc2


@triton.jit
def _backward_q(
    q, k, v, out, grad, lse, stats, grad_q, plan, cu_seqlens, sequences, tokens, stride_l, stride_h, scale,
    H: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    NB: tl.constexpr, LARGEST: tl.constexpr, CAUSAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    begin, length, first, step = _place(cu_seqlens, sequences, plan, head, H, R, S, NB, LARGEST, BM)
    if first >= length:
        return
    rows = first + step * tl.arange(0, BM)
    valid = rows < length
    last = tl.minimum(first + step * (BM - 1), length - 1)
    base = begin.to(tl.int64) * stride_l + head * stride_h
    row_offsets = rows.to(tl.int64) * stride_l
    out_base = (begin.to(tl.int64) * H + head) * D
    out_offsets = rows.to(tl.int64) * (H * D)
    q1 = _load(q + base, row_offsets, valid, D, 0, D1, True)
    g1 = _load(grad + out_base, out_offsets, valid, D, 0, D1, True)
    o1 = _load(out + out_base, out_offsets, valid, D, 0, D1, True)
    inner = tl.sum(g1.to(tl.float32) * o1.to(tl.float32), 1)
    acc1 = tl.zeros((BM, D1), tl.float32)
    q2 = q1
    g2 = g1
    acc2 = acc1
    if D2 > 0:
        q2 = _load(q + base, row_offsets, valid, D, D1, D2, True)
        g2 = _load(grad + out_base, out_offsets, valid, D, D1, D2, True)
        o2 = _load(out + out_base, out_offsets, valid, D, D1, D2, True)
        inner += tl.sum(g2.to(tl.float32) * o2.to(tl.float32), 1)
        acc2 = tl.zeros((BM, D2), tl.float32)
    log_sum = tl.load(lse + head.to(tl.int64) * tokens + begin + rows, mask=valid, other=float("inf"))
    factor = scale * LOG2_E
    _store_stats(stats, (begin + rows).to(tl.int64) * H + head, valid, tl.maximum(-log_sum / factor, -1.0e30), -inner)
    for branch in range(NB):
        width, shift, offset, start = _branch(plan, branch, head, first, length, H, NB)
        ratio = 1 << shift
        lane = tl.arange(0, BN) * (ratio * stride_l)
        while start <= last:
            if ((first - start - offset) & (tl.minimum(ratio, step) - 1)) == 0:  # the branch covers rows here
                real, inside, whole = _segment(rows, first, last, step, length, start, width, shift, offset, R, S)
                full = tl.where(whole, real // BN * BN, 0)
                if CAUSAL:
                    real = tl.minimum(real, ((last - start - offset) >> shift) + 1)
                    full = tl.where(whole, tl.minimum(full, (((first - start - offset) >> shift) + 1) // BN * BN), 0)
                key = start + offset
                key_base = base + key.to(tl.int64) * stride_l
                key_base_step = (BN * ratio * stride_l).to(tl.int64)
                acc1, acc2 = _backward_q_keys(
                    q1, q2, g1, g2, acc1, acc2, log_sum, inner, k, v, lane, key_base, key_base_step, 0, full, key,
                    ratio, real, rows, inside, factor, D, D1, D2, BN, False, CAUSAL, PRECISION,
                )  # fmt: skip
                if full < real:
                    acc1, acc2 = _backward_q_keys(
                        q1, q2, g1, g2, acc1, acc2, log_sum, inner, k, v, lane, key_base, key_base_step, full, real,
                        key, ratio, real, rows, inside, factor, D, D1, D2, BN, True, CAUSAL, PRECISION,
                    )  # fmt: skip
            start += width
    _store(grad_q + out_base, out_offsets, valid, acc1 * scale, D, 0, D1)
    if D2 > 0:
        _store(grad_q + out_base, out_offsets, valid, acc2 * scale, D, D1, D2)


@triton.jit
def _backward_kv_queries(
    k1, k2, v1, v2, acc_k1, acc_k2, acc_v1, acc_v2, ones_log_sum, ones_inner, q, grad, stats, lane, base, base_step,
    grad_lane, grad_base, grad_base_step, stat_lane, stat_base, stat_base_step, low, high, query, query_step, real, rows,
    inside, factor,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    for j in range(low, high, BN):
        slot = j + tl.arange(0, BN)
        there = slot < real
        where = base + (j // BN) * base_step
        grad_where = grad_base + (j // BN) * grad_base_step
        stat = _load(stats + stat_base + (j // BN) * stat_base_step, stat_lane, there, 16, 0, 16, MASK)
        q1 = _load(q + where, lane, there, D, 0, D1, MASK)
        g1 = _load(grad + grad_where, grad_lane, there, D, 0, D1, MASK)
        logits = tl.dot(ones_log_sum, tl.trans(stat), input_precision=PRECISION)
        logits = tl.dot(k1, tl.trans(q1), logits, input_precision=PRECISION)
        grad_share = tl.dot(ones_inner, tl.trans(stat), input_precision=PRECISION)
        grad_share = tl.dot(v1, tl.trans(g1), grad_share, input_precision=PRECISION)
        if D2 > 0:
            q2 = _load(q + where, lane, there, D, D1, D2, MASK)
            g2 = _load(grad + grad_where, grad_lane, there, D, D1, D2, MASK)
            logits = tl.dot(k2, tl.trans(q2), logits, input_precision=PRECISION)
            grad_share = tl.dot(v2, tl.trans(g2), grad_share, input_precision=PRECISION)
        share = tl.exp2(logits * factor)
        if MASK:
            seen = inside[:, None] & there[None, :]
            if CAUSAL:
                queries = query + slot * query_step
                seen = seen & (queries[None, :] >= rows[:, None])
            share = tl.where(seen, share, 0.0)
        grad_logits = (share * grad_share).to(k1.dtype)
        share = share.to(k1.dtype)
        acc_v1 = tl.dot(share, g1, acc_v1, input_precision=PRECISION)
        acc_k1 = tl.dot(grad_logits, q1, acc_k1, input_precision=PRECISION)
        if D2 > 0:
            acc_v2 = tl.dot(share, g2, acc_v2, input_precision=PRECISION)
            acc_k2 = tl.dot(grad_logits, q2, acc_k2, input_precision=PRECISION)
    return acc_k1, acc_k2, acc_v1, acc_v2


@triton.jit
def _backward_kv(
    q, k, v, grad, stats, grad_k, grad_v, plan, cu_seqlens, sequences, tokens, stride_l, stride_h, scale,
    H: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    NB: tl.constexpr, LARGEST: tl.constexpr, CAUSAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The queries of a segment are the positions of its keys: the loops are those of the forward, with rows for keys."""
    head = tl.program_id(1)
    begin, length, first, step = _place(cu_seqlens, sequences, plan, head, H, R, S, NB, LARGEST, BM)
    if first >= length:
        return
    rows = first + step * tl.arange(0, BM)
    valid = rows < length
    last = tl.minimum(first + step * (BM - 1), length - 1)
    base = begin.to(tl.int64) * stride_l + head * stride_h
    row_offsets = rows.to(tl.int64) * stride_l
    out_base = (begin.to(tl.int64) * H + head) * D
    out_offsets = rows.to(tl.int64) * (H * D)
    k1 = _load(k + base, row_offsets, valid, D, 0, D1, True)
    v1 = _load(v + base, row_offsets, valid, D, 0, D1, True)
    acc_k1 = tl.zeros((BM, D1), tl.float32)
    acc_v1 = tl.zeros((BM, D1), tl.float32)
    k2 = k1
    v2 = v1
    acc_k2 = acc_k1
    acc_v2 = acc_v1
    if D2 > 0:
        k2 = _load(k + base, row_offsets, valid, D, D1, D2, True)
        v2 = _load(v + base, row_offsets, valid, D, D1, D2, True)
        acc_k2 = tl.zeros((BM, D2), tl.float32)
        acc_v2 = tl.zeros((BM, D2), tl.float32)
    columns = tl.arange(0, 16)[None, :]
    nought = tl.zeros((BM, 16), tl.int32)
    ones_log_sum = (columns + nought < 3).to(stats.dtype.element_ty)
    ones_inner = ((columns + nought >= 3) & (columns + nought < 6)).to(stats.dtype.element_ty)
    factor = scale * LOG2_E
    for branch in range(NB):
        width, shift, offset, start = _branch(plan, branch, head, first, length, H, NB)
        ratio = 1 << shift
        lane = tl.arange(0, BN) * (ratio * stride_l)
        grad_lane = tl.arange(0, BN) * (ratio * H * D)
        stat_lane = tl.arange(0, BN) * (ratio * H * 16)
        while start <= last:
            if ((first - start - offset) & (tl.minimum(ratio, step) - 1)) == 0:  # the branch covers rows here
                real, inside, whole = _segment(rows, first, last, step, length, start, width, shift, offset, R, S)
                query = start + offset
                query_base = base + query.to(tl.int64) * stride_l
                query_base_step = (BN * ratio * stride_l).to(tl.int64)
                grad_base = out_base + query.to(tl.int64) * (H * D)
                grad_base_step = (BN * ratio).to(tl.int64) * (H * D)
                stat_base = ((begin + query).to(tl.int64) * H + head) * 16
                stat_base_step = (BN * ratio).to(tl.int64) * (H * 16)
                low = 0
                full = tl.where(whole, real // BN * BN, 0)
                if CAUSAL:  # masked up to the last row, then whole
                    low = (tl.maximum(first - start - offset, 0) >> shift) // BN * BN
                    seam = tl.minimum((((last - start - offset) >> shift) + BN) // BN * BN, full)
                    acc_k1, acc_k2, acc_v1, acc_v2 = _backward_kv_queries(
                        k1, k2, v1, v2, acc_k1, acc_k2, acc_v1, acc_v2, ones_log_sum, ones_inner, q, grad, stats, lane,
                        query_base, query_base_step, grad_lane, grad_base, grad_base_step, stat_lane, stat_base,
                        stat_base_step, low, seam, query, ratio, real, rows, inside, factor, D, D1, D2, BN, True,
                        CAUSAL, PRECISION,
                    )  # fmt: skip
                    low = tl.maximum(low, seam)
                acc_k1, acc_k2, acc_v1, acc_v2 = _backward_kv_queries(
                    k1, k2, v1, v2, acc_k1, acc_k2, acc_v1, acc_v2, ones_log_sum, ones_inner, q, grad, stats, lane,
                    query_base, query_base_step, grad_lane, grad_base, grad_base_step, stat_lane, stat_base,
                    stat_base_step, low, full, query, ratio, real, rows, inside, factor, D, D1, D2, BN, False, CAUSAL,
                    PRECISION,
                )  # fmt: skip
                if tl.maximum(low, full) < real:
                    acc_k1, acc_k2, acc_v1, acc_v2 = _backward_kv_queries(
                        k1, k2, v1, v2, acc_k1, acc_k2, acc_v1, acc_v2, ones_log_sum, ones_inner, q, grad, stats, lane,
                        query_base, query_base_step, grad_lane, grad_base, grad_base_step, stat_lane, stat_base,
                        stat_base_step, tl.maximum(low, full), real, query, ratio, real, rows, inside, factor, D, D1,
                        D2, BN, True, CAUSAL, PRECISION,
                    )  # fmt: skip
            start += width
    _store(grad_k + out_base, out_offsets, valid, acc_k1 * scale, D, 0, D1)
    _store(grad_v + out_base, out_offsets, valid, acc_v1, D, 0, D1)
    if D2 > 0:
        _store(grad_k + out_base, out_offsets, valid, acc_k2 * scale, D, D1, D2)
        _store(grad_v + out_base, out_offsets, valid, acc_v2, D, D1, D2)


def _split(dim: int) -> tuple[int, int]:
    """A head dimension as one or two powers of two of at least 16: 48 is 32 + 16, without padding."""
    first = 1 << (dim.bit_length() - 1)
    rest = dim - first
    if first >= 16 and (rest == 0 or (rest >= 16 and rest & (rest - 1) == 0)):
        return first, rest
    return max(16, triton.next_power_of_2(dim)), 0


@lru_cache(maxsize=64)
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
    "forward": {"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 3, "maxnreg": 128},
    "backward_q": {"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 3, "maxnreg": 128},
    "backward_kv": {"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 3, "maxnreg": 168},
}
"""The fastest of some 40 tried for each on an H200, at 10,000 and 70,000 tokens and head dimension 48. Fewer registers let
more programs run side by side on a multiprocessor: while one waits for its matrix products, another takes exponentials."""
FLOAT32_BLOCKS = {"BM": 64, "BN": 32, "num_warps": 4, "num_stages": 2}
WIDE_BLOCKS = {"BM": 64, "BN": 32, "num_warps": 4, "num_stages": 2}
"""For head dimensions over 64."""


def _settings(
    q: Tensor, cu_seqlens: Tensor, kernel: str, segment_lengths: Sequence[int], ratios: Sequence[int], causal: bool
) -> Any:
    first, rest = _split(q.shape[2])
    largest = max(ratios)
    stride = max(1, largest // 2)
    blocks = FLOAT32_BLOCKS if q.dtype == torch.float32 else WIDE_BLOCKS if q.shape[2] > 64 else BLOCKS[kernel]
    sequences = len(cu_seqlens) - 1
    pairs = q.shape[0] // (2 * blocks["BM"] * stride) + sequences
    constants = {
        "H": q.shape[1], "D": q.shape[2], "D1": first, "D2": rest, "R": largest, "S": stride, "NB": len(ratios),
        "LARGEST": list(ratios).index(largest), "CAUSAL": causal,
        "PRECISION": "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32", **blocks,
    }  # fmt: skip
    plan = _plan(
        tuple(min(length, 2 ** (q.shape[0] - 1).bit_length()) for length in segment_lengths),
        tuple(ratios),
        q.shape[1],
        stride,
        q.device,
    )
    return (2 * pairs, q.shape[1], stride), constants, plan


def _alike(*tensors: Tensor) -> list[Tensor]:
    """The kernels read q, k and v with one set of strides, and rows that are contiguous."""
    if all(x.stride() == tensors[0].stride() for x in tensors) and tensors[0].stride(2) == 1:
        return list(tensors)
    return [x.contiguous() for x in tensors]


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
    q, k, v = _alike(q, k, v)
    tokens, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, tokens), dtype=torch.float32, device=q.device)
    grid, constants, plan = _settings(q, cu_seqlens, "forward", segment_lengths, dilated_ratios, is_causal)
    _forward[grid](
        q,
        k,
        v,
        out,
        lse,
        plan,
        cu_seqlens,
        len(cu_seqlens) - 1,
        tokens,
        q.stride(0),
        q.stride(1),
        scale,
        **constants,
    )
    return out, lse


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
    q, k, v = _alike(q, k, v)
    grad = grad.contiguous()
    dtype = torch.float32 if q.dtype == torch.float32 else torch.bfloat16  # of the range of float32 in any case
    stats = torch.empty((*q.shape[:2], 16), dtype=dtype, device=q.device)
    grad_q, grad_k, grad_v = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    shape = (cu_seqlens, len(cu_seqlens) - 1, q.shape[0], q.stride(0), q.stride(1), scale)
    grid, constants, plan = _settings(q, cu_seqlens, "backward_q", segment_lengths, dilated_ratios, is_causal)
    _backward_q[grid](q, k, v, out, grad, lse, stats, grad_q, plan, *shape, **constants)
    grid, constants, plan = _settings(q, cu_seqlens, "backward_kv", segment_lengths, dilated_ratios, is_causal)
    _backward_kv[grid](q, k, v, grad, stats, grad_k, grad_v, plan, *shape, **constants)
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


class _Attention(torch.autograd.Function):
    """The op without its dispatcher, which takes longer than the kernels on short sequences."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _attend(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*_attend_backward(grad, *ctx.saved_tensors, *ctx.settings), None, None, None, None, None)


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
    """See `dilated_attention`, on packed sequences. Memory: the output and a float32 per token and head."""
    inputs = (q, k, v, cu_seqlens, list(segment_lengths), list(dilated_ratios), is_causal, scale)
    output: Tensor
    if torch.compiler.is_compiling():
        output, _ = _op(*inputs)
    elif torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        output, _ = _Attention.apply(*inputs)
    else:
        output, _ = _attend(*inputs)
    return output
