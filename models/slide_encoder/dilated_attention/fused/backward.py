"""The backward: gradients of the queries by a walk over keys, those of keys and values by a walk over queries.

No atomics: results are the same in every run.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...launch import Launch, launch
from ..windows import Windows
from .exchange import fetch
from .layout import LOG2_E, load, run_arrange_grad, shards_of, store_columns, sums_at, tensor_at
from .schedule import settings
from .walk import hold, place, walk, written


class BackwardQueries(NamedTuple):
    """What `take_keys` needs: queries and their gradients, log-sum-exps and inner products, where keys and values are."""

    q: Any
    grad: Any
    log_sum: Any
    inner: Any
    keys_at: Any
    values_at: Any
    factor: Any


@triton.jit
def take_keys(state, held, keys, block, low, high, MASK: tl.constexpr, z: tl.constexpr):
    """Add what slots low..high of a segment give to the gradient of the queries."""
    (acc,) = state
    for j in range(low, high, z.BN):
        exists = keys.slot < keys.count - j
        row = (j // z.BN) * keys.stride * z.DP
        k = load(held.keys_at + row, keys.lane, exists, z.DP, MASK)
        v = load(held.values_at + row, keys.lane, exists, z.DP, MASK)
        logits = tl.dot(held.q, tl.trans(k), input_precision=z.PRECISION)
        grad_share = tl.dot(held.grad, tl.trans(v), input_precision=z.PRECISION)
        exponent = logits * held.factor + keys.log_times[None, :]
        if not z.SPARE:
            exponent -= held.log_sum[:, None]
            grad_share -= held.inner[:, None]
        share = tl.exp2(exponent)
        if MASK:
            seen = keys.inside[:, None] & exists[None, :]
            if z.CAUSAL:
                seen = seen & ((keys.start + (j + keys.slot) * keys.ratio)[None, :] <= block.rows[:, None])
            share = tl.where(seen, share, 0.0)
        acc = tl.dot((share * grad_share).to(held.q.dtype), k, acc, input_precision=z.PRECISION)
    return (acc,)


@triton.jit
def backward_q(
    arranged, arranged_grad, sums, grad_q, grad_stride, plan, cu_seqlens, shards, sequences, tokens, padded, scale,
    z: tl.constexpr,
):  # fmt: skip
    """The gradient of the queries (T, H, D), rows of each program."""
    head = tl.program_id(1)
    block = place(cu_seqlens, shards, sequences, tokens, plan, head, z)
    if block.first >= block.end:
        return
    valid = block.valid
    keys_at = tensor_at(arranged, 1, head, block.origin, padded, z)
    values_at = tensor_at(arranged, 2, head, block.origin, padded, z)
    q = load(tensor_at(arranged, 0, head, block.origin, padded, z), block.own, valid, z.DP, True)
    grad = load(tensor_at(arranged_grad, 0, head, block.origin, padded, z), block.own, valid, z.DP, True)
    log_sum = tl.full((z.BM,), 0.0, tl.float32)
    inner = tl.full((z.BM,), 0.0, tl.float32)
    if not z.SPARE:
        pair = sums_at(sums, head, block.origin, padded) + 2 * block.own
        log_sum = tl.load(pair, mask=valid, other=float("inf"))
        inner = tl.load(pair + 1, mask=valid, other=0.0)
    q, none = hold(q, valid, z.BN)
    grad, nothing = hold(grad, valid, z.BN)
    acc = tl.full((z.BM, z.DP), 0.0, tl.float32) + none + nothing
    held = BackwardQueries(q, grad, log_sum, inner, keys_at, values_at, scale * LOG2_E)
    state, _ = walk(take_keys, (acc,), held, block, plan, head, z, "queries", False)
    (acc,) = state
    grad_base = block.begin.to(tl.int64) * grad_stride + head * z.D
    acc = tl.where(valid[:, None], acc * scale, 0.0)
    store_columns(
        grad_q + grad_base, block.rows.to(tl.int64) * grad_stride, written(block, z), acc, z.D, z.DP
    )  # fmt: skip


class BackwardKeys(NamedTuple):
    """What `take_queries` needs: keys and values; where queries, gradients, log-sum-exps and inner products are."""

    k: Any
    v: Any
    queries_at: Any
    grads_at: Any
    sums_at: Any
    factor: Any


@triton.jit
def take_queries(state, held, keys, block, low, high, MASK: tl.constexpr, z: tl.constexpr):
    """Add what slots low..high of a segment, here queries, give to the gradients of keys and values."""
    acc_k, acc_v = state
    for j in range(low, high, z.BN):
        exists = keys.slot < keys.count - j
        row = (j // z.BN) * keys.stride * z.DP
        q = load(held.queries_at + row, keys.lane, exists, z.DP, MASK)
        grad = load(held.grads_at + row, keys.lane, exists, z.DP, MASK)
        logits = tl.dot(held.k, tl.trans(q), input_precision=z.PRECISION)
        grad_share = tl.dot(held.v, tl.trans(grad), input_precision=z.PRECISION)
        exponent = logits * held.factor + keys.log_times[None, :]
        if not z.SPARE:
            pair = held.sums_at + 2 * (keys.lane + (j // z.BN) * keys.stride)
            exponent -= tl.load(pair, mask=exists, other=float("inf"))[None, :]
            grad_share -= tl.load(pair + 1, mask=exists, other=0.0)[None, :]
        share = tl.exp2(exponent)
        if MASK:
            seen = keys.inside[:, None] & exists[None, :]
            if z.CAUSAL:
                seen = seen & ((keys.start + (j + keys.slot) * keys.ratio)[None, :] >= block.rows[:, None])
            share = tl.where(seen, share, 0.0)
        acc_v = tl.dot(share.to(held.k.dtype), grad, acc_v, input_precision=z.PRECISION)
        acc_k = tl.dot((share * grad_share).to(held.k.dtype), q, acc_k, input_precision=z.PRECISION)
    return acc_k, acc_v


@triton.jit
def backward_kv(
    arranged, arranged_grad, sums, grad_k, grad_v, grad_stride, plan, cu_seqlens, shards, sequences, tokens, padded,
    scale, z: tl.constexpr,
):  # fmt: skip
    """The gradients of keys and values (T, H, D), rows of each program."""
    head = tl.program_id(1)
    block = place(cu_seqlens, shards, sequences, tokens, plan, head, z)
    if block.first >= block.end:
        return
    valid = block.valid
    queries_at = tensor_at(arranged, 0, head, block.origin, padded, z)
    grads_at = tensor_at(arranged_grad, 0, head, block.origin, padded, z)
    k = load(tensor_at(arranged, 1, head, block.origin, padded, z), block.own, valid, z.DP, True)
    v = load(tensor_at(arranged, 2, head, block.origin, padded, z), block.own, valid, z.DP, True)
    k, none = hold(k, valid, z.BN)
    v, nothing = hold(v, valid, z.BN)
    acc_k = tl.full((z.BM, z.DP), 0.0, tl.float32) + none
    acc_v = tl.full((z.BM, z.DP), 0.0, tl.float32) + nothing
    pairs_at = sums_at(sums, head, block.origin, padded)
    held = BackwardKeys(k, v, queries_at, grads_at, pairs_at, scale * LOG2_E)
    state, _ = walk(take_queries, (acc_k, acc_v), held, block, plan, head, z, "keys", False)
    acc_k, acc_v = state
    grad_base = block.begin.to(tl.int64) * grad_stride + head * z.D
    grad_offsets = block.rows.to(tl.int64) * grad_stride
    acc_k = tl.where(valid[:, None], acc_k * scale, 0.0)
    acc_v = tl.where(valid[:, None], acc_v, 0.0)
    store_columns(grad_k + grad_base, grad_offsets, written(block, z), acc_k, z.D, z.DP)
    store_columns(grad_v + grad_base, grad_offsets, written(block, z), acc_v, z.D, z.DP)


def run_backward(
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
    windows: Windows | None = None,
    launch: Launch = launch,
) -> None:
    """Write the gradients of q, k and v to three tensors (T, H, D) of one set of strides, heads end to end.

    With windows the other ranks' queries and gradients, which those of the keys need, are fetched while those of the
    queries are computed.
    """
    arranged_grad, sums = run_arrange_grad(grad, arranged, cu_seqlens, out, lse, ratios, scale, windows, launch)
    tensors = (arranged[0], arranged_grad, sums)[: 3 if sums.numel() else 2]
    fetched = None if windows is None else fetch(windows, *tensors)
    sizes = (
        cu_seqlens,
        shards_of(cu_seqlens, windows),
        cu_seqlens.shape[0] - 1,
        out.shape[0],
        arranged.shape[2],
        scale,
    )
    for name, kernel, outputs in (("backward_q", backward_q, grads[:1]), ("backward_kv", backward_kv, grads[1:])):
        grid, z, options, plan = settings(
            out.shape, out.dtype, cu_seqlens, name, segment_lengths, ratios, causal, windows
        )
        if kernel is backward_kv and fetched is not None:
            fetched.wait()
            fetched = None  # its memory
        arguments = (arranged, arranged_grad, sums, *outputs, grads[0].stride(0), plan, *sizes)
        launch(kernel, grid, arguments, (z,), options)
