"""Dilated attention (LongNet, https://arxiv.org/abs/2307.02486): linear in the number of tokens."""

import os
from collections.abc import Sequence
from functools import cache, lru_cache
from importlib.util import find_spec
from shutil import which
from typing import Literal

import torch
from torch import Tensor

from .gather import gather_dilated_attention
from .naive import naive_dilated_attention

BACKENDS = ("naive", "gather", "fused")


def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: Sequence[int],
    dilated_ratios: Sequence[int],
    is_causal: bool = False,
    *,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    backend: Literal["auto", "naive", "gather", "fused"] = "auto",
) -> Tensor:
    """Attention of each token to a few of the others: dense nearby, sparser farther away.

    A branch cuts the sequence into segments and keeps every `ratio`-th token of each, from an offset that depends on the
    head; these attend to one another. One softmax runs over the keys of all branches. Slots of a segment past the end of
    the sequence (or left over by the offset) are zero keys that take part with logit 0, as the published GigaPath weights
    were trained (https://doi.org/10.1038/s41586-024-07441-w). The gradient is the true one of this function.

    Args:
        q: `(B, L, H, D)` queries: batch, tokens, heads, head dimension; any floating dtype. With `cu_seqlens`
            `(T, H, D)`: sequences of any lengths end to end.
        k: Keys, shaped like `q`.
        v: Values, shaped like `q`.
        segment_lengths: Tokens of a segment, for each branch.
        dilated_ratios: Every how many-th token takes part, for each branch.
        is_causal: Whether key slot j of a segment is visible to query slot i only when j <= i.
        cu_seqlens: `(B + 1,)` int32 on the device of `q`: where each packed sequence begins, and T. Each has segments of
            its own; none is empty.
        scale: Factor of the logits; `D ** -0.5` by default.
        backend: `naive` for the readable version, `gather` for plain PyTorch, `fused` for Triton kernels; `auto` takes
            `fused` on a GPU where it fits (ratios that are powers of two, no float64), else `gather`.

    Returns:
        The shape and dtype of `q`; zero where no branch covers a token and head.

    Raises:
        ValueError: Shapes, segment lengths or ratios do not fit.
    """
    if q.ndim != (4 if cu_seqlens is None else 3) or q.shape != k.shape or q.shape != v.shape or 0 in q.shape:
        raise ValueError(
            f"q, k and v must be {'(B, L, H, D)' if cu_seqlens is None else '(T, H, D)'} alike, not {tuple(q.shape)}, "
            f"{tuple(k.shape)}, {tuple(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must be of one dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    segments, ratios = [int(n) for n in segment_lengths], [int(n) for n in dilated_ratios]
    if not segments or len(segments) != len(ratios) or min(segments) < 1 or min(ratios) < 1:
        raise ValueError(
            f"segment_lengths {segments} and dilated_ratios {ratios} must be positive, one of each a branch"
        )
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend {backend!r} is none of auto, {', '.join(BACKENDS)}")
    settings = (segments, ratios, is_causal, q.shape[-1] ** -0.5 if scale is None else scale)
    if takes_kernels(q, ratios, settings[3], backend):
        from .fused import fused_dilated_attention

        if cu_seqlens is not None:
            return fused_dilated_attention(q, k, v, cu_seqlens, *settings)
        lengths = equal_lengths(len(q), q.shape[1], q.device)
        packed = fused_dilated_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), lengths, *settings)
        return packed.view(q.shape)
    function = naive_dilated_attention if backend == "naive" else gather_dilated_attention
    if cu_seqlens is None:
        return function(q, k, v, *settings)
    counts = cu_seqlens.diff().tolist()
    sequences = zip(*(torch.split(x, counts) for x in (q, k, v)), strict=True)
    return torch.cat([function(q[None], k[None], v[None], *settings)[0] for q, k, v in sequences])


def dilated_self_attention(
    qkv: Tensor, segment_lengths: Sequence[int], dilated_ratios: Sequence[int], cu_seqlens: Tensor
) -> Tensor:
    """`dilated_attention` of one projection to queries, keys and values, not causal.

    Args:
        qkv: `(T, 3, H, D)` of packed sequences.
        segment_lengths: Tokens of a segment, for each branch.
        dilated_ratios: Every how many-th token takes part, for each branch.
        cu_seqlens: `(B + 1,)` int32 on the device of `qkv`: where each sequence begins, and T.

    Returns:
        `(T, H, D)`.
    """
    if takes_kernels(qkv, dilated_ratios, qkv.shape[-1] ** -0.5, "auto"):
        from .fused import fused_dilated_self_attention

        return fused_dilated_self_attention(qkv, cu_seqlens, segment_lengths, dilated_ratios)
    q, k, v = qkv.unbind(1)
    return dilated_attention(q, k, v, segment_lengths, dilated_ratios, cu_seqlens=cu_seqlens)


@lru_cache(maxsize=64)
def equal_lengths(batch: int, length: int, device: torch.device) -> Tensor:
    """`(batch + 1,)` int32 cumulative lengths of sequences of one length."""
    with torch.inference_mode(False):  # kept for later calls, which may save it for their backward
        return torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device)


def has_kernels(x: Tensor) -> bool:
    """Whether this machine has kernels for where x is: a GPU, and a Triton that can start them."""
    return x.is_cuda and triton_runs()


@cache
def triton_runs() -> bool:
    """Whether Triton is there, and the C compiler with which it builds the launchers of its kernels."""
    compiler = os.environ.get("CC") or which("gcc") or which("clang")
    return find_spec("triton") is not None and compiler is not None


def takes_kernels(q: Tensor, dilated_ratios: Sequence[int], scale: float, backend: str) -> bool:
    """Whether a backend means the fused kernels for tensors like this one.

    Raises:
        ValueError: It does, and they do not take them.
    """
    if backend in ("naive", "gather") or (backend == "auto" and not has_kernels(q)):
        return False
    from .fused import eligible  # imports triton, which not every machine has

    fits = eligible(q.dtype, q.shape[-1], tuple(dilated_ratios), scale)
    if backend == "fused" and not fits:
        raise ValueError(
            f"the fused kernels do not take {q.dtype}, head dimension {q.shape[-1]}, ratios {dilated_ratios}, scale {scale}"
        )
    return fits
