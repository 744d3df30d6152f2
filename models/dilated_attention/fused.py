"""Dilated attention in Triton: all branches in one running softmax, forward and backward, nothing gathered or padded.

Tokens are taken in residue classes of the largest ratio: within a segment a branch covers either every token of a class
or none, so a block of one class streams exactly the keys of the branches that cover it, by strided reads, and no branch
has an output of its own. Zero-key slots are added to the denominator by arithmetic. A block that straddles a segment's
border goes through the keys of both segments, each for its own rows. No atomics: results are the same in every run.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


def eligible(q: Tensor, dilated_ratios: Sequence[int]) -> bool:
    """Whether the kernels take these tensors and branches: every ratio divides the largest, head dimension up to 128."""
    largest = max(dilated_ratios)
    return (
        q.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and q.shape[-1] <= 128
        and largest <= 64
        and all(largest % ratio == 0 for ratio in dilated_ratios)
    )


@triton.jit
def _load(pointer, rows, stride, mask, D: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr):
    """(rows, WIDTH) of columns START.. of a matrix with D columns."""
    columns = START + tl.arange(0, WIDTH)
    offsets = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    if START + WIDTH > D:
        return tl.load(pointer + offsets, mask=mask[:, None] & (columns < D)[None, :], other=0.0)
    return tl.load(pointer + offsets, mask=mask[:, None], other=0.0)


@triton.jit
def _store(pointer, rows, stride, mask, value, D: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr):
    columns = START + tl.arange(0, WIDTH)
    offsets = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    value = value.to(pointer.dtype.element_ty)
    if START + WIDTH > D:
        tl.store(pointer + offsets, value, mask=mask[:, None] & (columns < D)[None, :])
    else:
        tl.store(pointer + offsets, value, mask=mask[:, None])


@triton.jit
def _forward(
    q, k, v, out, lse, branches, length, stride_b, stride_l, stride_h, scale,
    H: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, R: tl.constexpr, NB: tl.constexpr,
    CAUSAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block, head, batch = tl.program_id(0), tl.program_id(1) // R, tl.program_id(2)
    residue = tl.program_id(1) % R
    rows = residue + R * (block * BM + tl.arange(0, BM))
    valid = rows < length
    first = residue + R * block * BM
    if first >= length:
        return
    last = tl.minimum(first + R * (BM - 1), length - 1)
    base = batch.to(tl.int64) * stride_b + head * stride_h
    q1 = _load(q + base, rows, stride_l, valid, D, 0, D1)
    acc1 = tl.zeros((BM, D1), tl.float32)
    if D2 > 0:
        q2 = _load(q + base, rows, stride_l, valid, D, D1, D2)
        acc2 = tl.zeros((BM, D2), tl.float32)
    largest = tl.full((BM,), -1.0e30, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    factor = scale * LOG2_E
    for branch in range(NB):
        width = tl.minimum(tl.load(branches + 2 * branch), length)
        ratio = tl.load(branches + 2 * branch + 1)
        offset = head // ((H + ratio - 1) // ratio)
        slots = (width + ratio - 1) // ratio
        for segment in range(first // width, last // width + 1):
            start = segment * width
            if (residue + 2 * ratio - start % ratio - offset) % ratio == 0:  # the branch covers this class here
                inside = (rows >= start) & (rows < start + width)
                real = (tl.minimum(width, length - start) - offset + ratio - 1) // ratio
                if CAUSAL:
                    real = tl.minimum(real, (last - start - offset) // ratio + 1)
                else:
                    zeros = slots - real
                    if zeros > 0:
                        raised = tl.where(inside, tl.maximum(largest, 0.0), largest)
                        shrink = tl.exp2(largest - raised)
                        total = total * shrink + tl.where(inside, zeros * tl.exp2(-raised), 0.0)
                        acc1 = acc1 * shrink[:, None]
                        if D2 > 0:
                            acc2 = acc2 * shrink[:, None]
                        largest = raised
                whole = (first >= start) & (last < start + width)
                for j in range(0, real, BN):
                    slot = j + tl.arange(0, BN)
                    keys = start + offset + ratio * slot
                    there = slot < real
                    k1 = _load(k + base, keys, stride_l, there, D, 0, D1)
                    logits = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
                    if D2 > 0:
                        k2 = _load(k + base, keys, stride_l, there, D, D1, D2)
                        logits = tl.dot(q2, tl.trans(k2), logits, input_precision=PRECISION)
                    logits = logits * factor
                    if CAUSAL:
                        seen = inside[:, None] & there[None, :] & (keys[None, :] <= rows[:, None])
                        logits = tl.where(seen, logits, -float("inf"))
                    elif (j + BN > real) | (whole == 0):
                        logits = tl.where(inside[:, None] & there[None, :], logits, -float("inf"))
                    raised = tl.maximum(largest, tl.max(logits, 1))
                    shrink = tl.exp2(largest - raised)
                    share = tl.exp2(logits - raised[:, None])
                    total = total * shrink + tl.sum(share, 1)
                    largest = raised
                    share = share.to(q.dtype.element_ty)
                    v1 = _load(v + base, keys, stride_l, there, D, 0, D1)
                    acc1 = tl.dot(share, v1, acc1 * shrink[:, None], input_precision=PRECISION)
                    if D2 > 0:
                        v2 = _load(v + base, keys, stride_l, there, D, D1, D2)
                        acc2 = tl.dot(share, v2, acc2 * shrink[:, None], input_precision=PRECISION)
    covered = total > 0
    inverse = tl.where(covered, 1.0 / tl.where(covered, total, 1.0), 0.0)
    # +inf where nothing covers the token: the backward's exp(logit - lse) is then 0.
    log_sum = tl.where(covered, largest + tl.log2(tl.where(covered, total, 1.0)), float("inf"))
    out_base = (batch.to(tl.int64) * length * H + head) * D
    _store(out + out_base, rows, H * D, valid, acc1 * inverse[:, None], D, 0, D1)
    if D2 > 0:
        _store(out + out_base, rows, H * D, valid, acc2 * inverse[:, None], D, D1, D2)
    tl.store(lse + (batch * H + head).to(tl.int64) * length + rows, log_sum, mask=valid)


@triton.jit
def _backward_q(
    q, k, v, out, grad, lse, delta, grad_q, branches, length, stride_b, stride_l, stride_h, scale,
    H: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, R: tl.constexpr, NB: tl.constexpr,
    CAUSAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block, head, batch = tl.program_id(0), tl.program_id(1) // R, tl.program_id(2)
    residue = tl.program_id(1) % R
    rows = residue + R * (block * BM + tl.arange(0, BM))
    valid = rows < length
    first = residue + R * block * BM
    if first >= length:
        return
    last = tl.minimum(first + R * (BM - 1), length - 1)
    base = batch.to(tl.int64) * stride_b + head * stride_h
    out_base = (batch.to(tl.int64) * length * H + head) * D
    row_base = (batch * H + head).to(tl.int64) * length
    q1 = _load(q + base, rows, stride_l, valid, D, 0, D1)
    g1 = _load(grad + out_base, rows, H * D, valid, D, 0, D1)
    o1 = _load(out + out_base, rows, H * D, valid, D, 0, D1)
    inner = tl.sum(g1.to(tl.float32) * o1.to(tl.float32), 1)
    acc1 = tl.zeros((BM, D1), tl.float32)
    if D2 > 0:
        q2 = _load(q + base, rows, stride_l, valid, D, D1, D2)
        g2 = _load(grad + out_base, rows, H * D, valid, D, D1, D2)
        o2 = _load(out + out_base, rows, H * D, valid, D, D1, D2)
        inner += tl.sum(g2.to(tl.float32) * o2.to(tl.float32), 1)
        acc2 = tl.zeros((BM, D2), tl.float32)
    tl.store(delta + row_base + rows, inner, mask=valid)
    log_sum = tl.load(lse + row_base + rows, mask=valid, other=float("inf"))
    factor = scale * LOG2_E
    for branch in range(NB):
        width = tl.minimum(tl.load(branches + 2 * branch), length)
        ratio = tl.load(branches + 2 * branch + 1)
        offset = head // ((H + ratio - 1) // ratio)
        for segment in range(first // width, last // width + 1):
            start = segment * width
            if (residue + 2 * ratio - start % ratio - offset) % ratio == 0:  # the branch covers this class here
                inside = (rows >= start) & (rows < start + width)
                real = (tl.minimum(width, length - start) - offset + ratio - 1) // ratio
                if CAUSAL:
                    real = tl.minimum(real, (last - start - offset) // ratio + 1)
                whole = (first >= start) & (last < start + width)
                for j in range(0, real, BN):
                    slot = j + tl.arange(0, BN)
                    keys = start + offset + ratio * slot
                    there = slot < real
                    k1 = _load(k + base, keys, stride_l, there, D, 0, D1)
                    v1 = _load(v + base, keys, stride_l, there, D, 0, D1)
                    logits = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
                    grad_share = tl.dot(g1, tl.trans(v1), input_precision=PRECISION)
                    if D2 > 0:
                        k2 = _load(k + base, keys, stride_l, there, D, D1, D2)
                        v2 = _load(v + base, keys, stride_l, there, D, D1, D2)
                        logits = tl.dot(q2, tl.trans(k2), logits, input_precision=PRECISION)
                        grad_share = tl.dot(g2, tl.trans(v2), grad_share, input_precision=PRECISION)
                    share = tl.exp2(logits * factor - log_sum[:, None])
                    if CAUSAL:
                        seen = inside[:, None] & there[None, :] & (keys[None, :] <= rows[:, None])
                        share = tl.where(seen, share, 0.0)
                    elif (j + BN > real) | (whole == 0):
                        share = tl.where(inside[:, None] & there[None, :], share, 0.0)
                    grad_logits = (share * (grad_share - inner[:, None])).to(q.dtype.element_ty)
                    acc1 = tl.dot(grad_logits, k1, acc1, input_precision=PRECISION)
                    if D2 > 0:
                        acc2 = tl.dot(grad_logits, k2, acc2, input_precision=PRECISION)
    _store(grad_q + out_base, rows, H * D, valid, acc1 * scale, D, 0, D1)
    if D2 > 0:
        _store(grad_q + out_base, rows, H * D, valid, acc2 * scale, D, D1, D2)


@triton.jit
def _backward_kv(
    q, k, v, grad, lse, delta, grad_k, grad_v, branches, length, stride_b, stride_l, stride_h, scale,
    H: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, R: tl.constexpr, NB: tl.constexpr,
    CAUSAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The queries of a segment are the positions of its keys: the loops are those of the forward, with rows for keys."""
    block, head, batch = tl.program_id(0), tl.program_id(1) // R, tl.program_id(2)
    residue = tl.program_id(1) % R
    rows = residue + R * (block * BM + tl.arange(0, BM))
    valid = rows < length
    first = residue + R * block * BM
    if first >= length:
        return
    last = tl.minimum(first + R * (BM - 1), length - 1)
    base = batch.to(tl.int64) * stride_b + head * stride_h
    out_base = (batch.to(tl.int64) * length * H + head) * D
    row_base = (batch * H + head).to(tl.int64) * length
    k1 = _load(k + base, rows, stride_l, valid, D, 0, D1)
    v1 = _load(v + base, rows, stride_l, valid, D, 0, D1)
    acc_k1 = tl.zeros((BM, D1), tl.float32)
    acc_v1 = tl.zeros((BM, D1), tl.float32)
    if D2 > 0:
        k2 = _load(k + base, rows, stride_l, valid, D, D1, D2)
        v2 = _load(v + base, rows, stride_l, valid, D, D1, D2)
        acc_k2 = tl.zeros((BM, D2), tl.float32)
        acc_v2 = tl.zeros((BM, D2), tl.float32)
    factor = scale * LOG2_E
    for branch in range(NB):
        width = tl.minimum(tl.load(branches + 2 * branch), length)
        ratio = tl.load(branches + 2 * branch + 1)
        offset = head // ((H + ratio - 1) // ratio)
        for segment in range(first // width, last // width + 1):
            start = segment * width
            if (residue + 2 * ratio - start % ratio - offset) % ratio == 0:  # the branch covers this class here
                inside = (rows >= start) & (rows < start + width)
                real = (tl.minimum(width, length - start) - offset + ratio - 1) // ratio
                whole = (first >= start) & (last < start + width)
                begin = 0
                if CAUSAL:
                    begin = tl.maximum(first - start - offset, 0) // ratio // BN * BN
                for j in range(begin, real, BN):
                    slot = j + tl.arange(0, BN)
                    queries = start + offset + ratio * slot
                    there = slot < real
                    q1 = _load(q + base, queries, stride_l, there, D, 0, D1)
                    g1 = _load(grad + out_base, queries, H * D, there, D, 0, D1)
                    log_sum = tl.load(lse + row_base + queries, mask=there, other=float("inf"))
                    inner = tl.load(delta + row_base + queries, mask=there, other=0.0)
                    logits = tl.dot(k1, tl.trans(q1), input_precision=PRECISION)
                    grad_share = tl.dot(v1, tl.trans(g1), input_precision=PRECISION)
                    if D2 > 0:
                        q2 = _load(q + base, queries, stride_l, there, D, D1, D2)
                        g2 = _load(grad + out_base, queries, H * D, there, D, D1, D2)
                        logits = tl.dot(k2, tl.trans(q2), logits, input_precision=PRECISION)
                        grad_share = tl.dot(v2, tl.trans(g2), grad_share, input_precision=PRECISION)
                    share = tl.exp2(logits * factor - log_sum[None, :])
                    if CAUSAL:
                        seen = inside[:, None] & there[None, :] & (queries[None, :] >= rows[:, None])
                        share = tl.where(seen, share, 0.0)
                    elif whole == 0:
                        share = tl.where(inside[:, None], share, 0.0)
                    grad_logits = (share * (grad_share - inner[None, :])).to(q.dtype.element_ty)
                    share = share.to(q.dtype.element_ty)
                    acc_v1 = tl.dot(share, g1, acc_v1, input_precision=PRECISION)
                    acc_k1 = tl.dot(grad_logits, q1, acc_k1, input_precision=PRECISION)
                    if D2 > 0:
                        acc_v2 = tl.dot(share, g2, acc_v2, input_precision=PRECISION)
                        acc_k2 = tl.dot(grad_logits, q2, acc_k2, input_precision=PRECISION)
    _store(grad_k + out_base, rows, H * D, valid, acc_k1 * scale, D, 0, D1)
    _store(grad_v + out_base, rows, H * D, valid, acc_v1, D, 0, D1)
    if D2 > 0:
        _store(grad_k + out_base, rows, H * D, valid, acc_k2 * scale, D, D1, D2)
        _store(grad_v + out_base, rows, H * D, valid, acc_v2, D, D1, D2)


def _split(dim: int) -> tuple[int, int]:
    """A head dimension as one or two powers of two of at least 16: 48 is 32 + 16, without padding."""
    first = 1 << (dim.bit_length() - 1)
    rest = dim - first
    if first >= 16 and (rest == 0 or (rest >= 16 and rest & (rest - 1) == 0)):
        return first, rest
    return max(16, triton.next_power_of_2(dim)), 0


@lru_cache(maxsize=64)
def _branches(segment_lengths: tuple[int, ...], dilated_ratios: tuple[int, ...], device: torch.device) -> Tensor:
    pairs = [list(pair) for pair in zip(segment_lengths, dilated_ratios, strict=True)]
    return torch.tensor(pairs, dtype=torch.int32, device=device)


BLOCKS: dict[str, dict[str, int]] = {
    "forward": {"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 3},
    "backward_q": {"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 3},
    "backward_kv": {"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 3},
}
"""The fastest of those tried on an H200 at 70,000 tokens; 64 tokens of 16 classes span one segment of 1,024."""


def _settings(q: Tensor, kernel: str, segment_lengths: Sequence[int], ratios: Sequence[int], causal: bool) -> Any:
    first, rest = _split(q.shape[3])
    largest = max(ratios)
    blocks = BLOCKS[kernel]
    grid = (triton.cdiv(triton.cdiv(q.shape[1], largest), blocks["BM"]), q.shape[2] * largest, q.shape[0])
    constants = {
        "H": q.shape[2], "D": q.shape[3], "D1": first, "D2": rest, "R": largest, "NB": len(ratios),
        "CAUSAL": causal, "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32", **blocks,
    }  # fmt: skip
    return grid, constants, _branches(tuple(segment_lengths), tuple(ratios), q.device)


def _alike(*tensors: Tensor) -> list[Tensor]:
    """The kernels read q, k and v with one set of strides, and rows that are contiguous."""
    if all(x.stride() == tensors[0].stride() for x in tensors) and tensors[0].stride(3) == 1:
        return list(tensors)
    return [x.contiguous() for x in tensors]


@torch.library.custom_op("longslide::dilated_attention", mutates_args=())
def _op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: list[int],
    dilated_ratios: list[int],
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output (B, L, H, D) and base-2 log-sum-exp (B, H, L), +inf where no branch covers a token."""
    q, k, v = _alike(q, k, v)
    batch, length, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, length), dtype=torch.float32, device=q.device)
    grid, constants, branches = _settings(q, "forward", segment_lengths, dilated_ratios, is_causal)
    _forward[grid](q, k, v, out, lse, branches, length, q.stride(0), q.stride(1), q.stride(2), scale, **constants)
    return out, lse


@_op.register_fake
def _op_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: list[int],
    dilated_ratios: list[int],
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    return q.new_empty(q.shape), lse


@torch.library.custom_op("longslide::dilated_attention_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    segment_lengths: list[int],
    dilated_ratios: list[int],
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _alike(q, k, v)
    grad = grad.contiguous()
    delta = torch.empty_like(lse)
    grad_q, grad_k, grad_v = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    shape = (q.shape[1], q.stride(0), q.stride(1), q.stride(2), scale)
    grid, constants, branches = _settings(q, "backward_q", segment_lengths, dilated_ratios, is_causal)
    _backward_q[grid](q, k, v, out, grad, lse, delta, grad_q, branches, *shape, **constants)
    grid, constants, branches = _settings(q, "backward_kv", segment_lengths, dilated_ratios, is_causal)
    _backward_kv[grid](q, k, v, grad, lse, delta, grad_k, grad_v, branches, *shape, **constants)
    return grad_q, grad_k, grad_v


@_backward_op.register_fake
def _backward_op_fake(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    segment_lengths: list[int],
    dilated_ratios: list[int],
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.settings = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return (*_backward_op(grad, *ctx.saved_tensors, *ctx.settings), None, None, None, None)


_op.register_autograd(_differentiate, setup_context=_save)


def fused_dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: Sequence[int],
    dilated_ratios: Sequence[int],
    is_causal: bool,
    scale: float,
) -> Tensor:
    """See `dilated_attention`. Memory: the output and a float32 per token and head."""
    output: Tensor = _op(q, k, v, list(segment_lengths), list(dilated_ratios), is_causal, scale)[0]
    return output
