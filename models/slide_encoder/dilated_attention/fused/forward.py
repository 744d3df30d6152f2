"""The forward: one softmax over the keys of all branches, whose reference is the logit of the own key where that will do."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...launch import Launch, empty, launch
from ..windows import Windows
from .exchange import fetch
from .layout import LOG2_E, load, shards_of, store_columns, tensor_at
from .schedule import settings
from .walk import hold, meets_others, place, walk, written


class Forward(NamedTuple):
    """What `take_keys` needs: the queries, where keys and values are, and how their exponentials are made.

    ONLINE: the reference of the softmax is raised to the largest logit so far; else it is taken as it is.
    """

    q: Any
    ones: Any
    keys_at: Any
    values_at: Any
    factor: Any
    ONLINE: Any


@triton.jit
def take_keys(state, held, keys, block, low, high, MASK: tl.constexpr, z: tl.constexpr):
    """Take slots low..high of a segment into (sums of values, reference, sum of exponentials)."""
    acc, largest, total = state
    for j in range(low, high, z.BN):
        exists = keys.slot < keys.count - j
        row = (j // z.BN) * keys.stride * z.DP
        k = load(held.keys_at + row, keys.lane, exists, z.DP, MASK)
        logits = tl.dot(held.q, tl.trans(k), input_precision=z.PRECISION)
        if MASK:
            seen = keys.inside[:, None] & exists[None, :]
            if z.CAUSAL:
                seen = seen & ((keys.start + (j + keys.slot) * keys.ratio)[None, :] <= block.rows[:, None])
            logits = tl.where(seen, logits, -float("inf"))
        if held.ONLINE:
            raised = tl.maximum(largest, tl.max(logits, 1) * held.factor)
            shrink = tl.exp2(largest - raised)
            largest = raised
            acc = acc * shrink[:, None]
            if not z.SPARE:
                total = total * shrink[:, None]
        exponent = logits * held.factor + keys.log_times[None, :]
        if held.ONLINE or not z.SPARE:
            exponent -= largest[:, None]
        share = tl.exp2(exponent).to(held.q.dtype)
        if not z.SPARE:
            total = tl.dot(share, held.ones, total, input_precision=z.PRECISION)
        v = load(held.values_at + row, keys.lane, exists, z.DP, MASK)
        acc = tl.dot(share, v, acc, input_precision=z.PRECISION)
    return acc, largest, total


@triton.jit
def softmax(q, reference, keys_at, values_at, block, plan, head, factor, z: tl.constexpr, ONLINE: tl.constexpr):
    """The softmax over all branches before its division: (sums of values; reference; sum of exponentials).

    Where columns are left over, the products of the queries with the keys have had the reference taken off already.
    """
    zero = -reference if z.SPARE else tl.full((z.BM,), 0.0, tl.float32)  # the exponent of a zero key
    largest = tl.full((z.BM,), 0.0, tl.float32) if z.SPARE else reference
    q, none = hold(q, block.valid, z.BN)
    acc = tl.full((z.BM, z.DP), 0.0, tl.float32) + none
    total = tl.full((z.BM, 16), 0.0, tl.float32)
    ones = tl.full((z.BN, 16), 1.0, q.dtype)
    state, zeros = walk(
        take_keys, (acc, largest, total), Forward(q, ones, keys_at, values_at, factor, ONLINE), block, plan, head, z,
        "queries", not z.CAUSAL,
    )  # fmt: skip
    acc, largest, total = state
    sums = tl.sum(total, 1) / 16
    if z.SPARE:  # the values have a column of ones
        sums = tl.sum(tl.where(tl.arange(0, z.DP)[None, :] == z.D, acc, 0.0), 1)
    if not z.CAUSAL:  # at the end: scaling the accumulators within the loops would serialise their matrix instructions
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
def forward(
    arranged, out, lse, plan, cu_seqlens, shards, sequences, tokens, padded, scale, others,
    z: tl.constexpr,
):  # fmt: skip
    """Output (T, H, D) and base-2 log-sum-exp (H, T) of the rows of each program.

    Of a sequence spread over ranks, only of blocks that may meet keys of other ranks, or of those that do not: `others`.
    """
    head = tl.program_id(1)
    block = place(cu_seqlens, shards, sequences, tokens, plan, head, z)
    idle = block.first >= block.end
    if z.SHARDED:
        idle = idle | (meets_others(plan, head, block, z) != (others != 0))
    if idle:
        return
    valid = block.valid
    keys_at = tensor_at(arranged, 1, head, block.origin, padded, z)
    values_at = tensor_at(arranged, 2, head, block.origin, padded, z)
    factor = scale * LOG2_E
    q = load(tensor_at(arranged, 0, head, block.origin, padded, z), block.own, valid, z.DP, True)
    # A token sees its own key. Its logit is a good enough reference for the exponentials, unless another one is larger by
    # more than 41 (2 ** 60): then once more, with the running maximum. Shares of float16 are too narrow for that.
    NARROW: tl.constexpr = arranged.dtype.element_ty == tl.float16
    ONE: tl.constexpr = 256 if NARROW else 1
    if z.SPARE:
        parts = tl.where(tl.arange(0, z.DP)[None, :] >= z.D, q.to(tl.float32), 0.0)
        reference = tl.sum(parts, 1) * (-ONE * factor)
    else:
        reference = tl.sum(q.to(tl.float32) * load(keys_at, block.own, valid, z.DP, True).to(tl.float32), 1) * factor
    acc, largest, total = softmax(q, reference, keys_at, values_at, block, plan, head, factor, z, NARROW)
    if not NARROW:  # noqa: SIM102 (known when compiled: the other only when run)
        if tl.max(tl.where(valid & ~(total < 1.0e18), 1, 0), 0) > 0:
            acc, largest, total = softmax(q, reference, keys_at, values_at, block, plan, head, factor, z, True)
    covered = total > 0
    inverse = tl.where(covered, 1.0 / tl.where(covered, total, 1.0), 0.0)
    # +inf where nothing covers the token: the backward's exp(logit - lse) is then 0.
    log_sum = tl.where(covered, largest + tl.log2(tl.where(covered, total, 1.0)), float("inf"))
    out_base = (block.begin.to(tl.int64) * z.H + head) * z.D
    inverse = tl.where(valid, inverse, 0.0)
    store_columns(
        out + out_base, block.rows.to(tl.int64) * (z.H * z.D), written(block, z), acc * inverse[:, None], z.D, z.DP
    )  # fmt: skip
    tl.store(lse + head.to(tl.int64) * tokens + block.begin + block.rows, log_sum, mask=valid)


def run_forward(
    arranged: Tensor,
    shape: Sequence[int],
    cu_seqlens: Tensor,
    segment_lengths: Sequence[int],
    ratios: Sequence[int],
    causal: bool,
    scale: float,
    windows: Windows | None = None,
    launch: Launch = launch,
) -> tuple[Tensor, Tensor]:
    """Output (T, H, D) and base-2 log-sum-exp (H, T), +inf where no branch covers a token.

    With windows the other ranks' keys and values are fetched, while the blocks run that do without.
    """
    out = empty(tuple(shape), arranged.dtype, arranged.device)
    lse = empty((shape[1], shape[0]), torch.float32, arranged.device)
    grid, z, options, plan = settings(
        shape, arranged.dtype, cu_seqlens, "forward", segment_lengths, ratios, causal, windows
    )
    sizes = (cu_seqlens, shards_of(cu_seqlens, windows), cu_seqlens.shape[0] - 1, shape[0], arranged.shape[2], scale)
    fetched = None if windows is None else fetch(windows, arranged[1], arranged[2])
    launch(forward, grid, (arranged, out, lse, plan, *sizes, 0), (z,), options)
    if windows is not None:
        if fetched is not None:
            fetched.wait()
        launch(forward, grid, (arranged, out, lse, plan, *sizes, 1), (z,), options)
    return out, lse
