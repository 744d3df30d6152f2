"""Dilated attention (LongNet, https://arxiv.org/abs/2307.02486): linear in the number of tokens."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Literal

from torch import Tensor

from .gather import gather_dilated_attention
from .naive import naive_dilated_attention

BACKENDS = ("naive", "gather", "fused")


def _backend(q: Tensor, dilated_ratios: Sequence[int], backend: str) -> Callable[..., Tensor]:
    if backend == "naive":
        return naive_dilated_attention
    if backend == "gather" or (backend == "auto" and (not q.is_cuda or find_spec("triton") is None)):
        return gather_dilated_attention
    from .fused import eligible, fused_dilated_attention  # imports triton, which not every machine has

    if eligible(q, dilated_ratios):
        return fused_dilated_attention
    if backend == "fused":
        raise ValueError(
            f"the fused kernels do not take {q.dtype}, head dimension {q.shape[-1]}, ratios {dilated_ratios}"
        )
    return gather_dilated_attention


def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: Sequence[int],
    dilated_ratios: Sequence[int],
    is_causal: bool = False,
    *,
    scale: float | None = None,
    backend: Literal["auto", "naive", "gather", "fused"] = "auto",
) -> Tensor:
    """Attention of each token to a few of the others: dense nearby, sparser farther away.

    A branch cuts the sequence into segments and keeps every `ratio`-th token of each, from an offset that depends on the
    head; these attend to one another. One softmax runs over the keys of all branches. Slots of a segment past the end of
    the sequence (or left over by the offset) are zero keys that take part with logit 0, as the published GigaPath weights
    were trained (https://doi.org/10.1038/s41586-024-07441-w). The gradient is the true one of this function.

    Args:
        q: `(B, L, H, D)` queries: batch, tokens, heads, head dimension; any floating dtype.
        k: `(B, L, H, D)` keys.
        v: `(B, L, H, D)` values.
        segment_lengths: Tokens of a segment, for each branch.
        dilated_ratios: Every how many-th token takes part, for each branch.
        is_causal: Whether key slot j of a segment is visible to query slot i only when j <= i.
        scale: Factor of the logits; `D ** -0.5` by default.
        backend: `naive` for the readable version, `gather` for plain PyTorch, `fused` for Triton kernels; `auto` takes
            `fused` on a GPU where it fits (ratios that divide the largest one, no float64), else `gather`.

    Returns:
        `(B, L, H, D)`, of the dtype of `q`; zero where no branch covers a token and head.

    Raises:
        ValueError: Shapes, segment lengths or ratios do not fit.
    """
    if q.ndim != 4 or q.shape != k.shape or q.shape != v.shape or 0 in q.shape:
        raise ValueError(
            f"q, k and v must be (B, L, H, D) alike, not {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
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
    function = _backend(q, ratios, backend)
    return function(q, k, v, segments, ratios, is_causal, q.shape[-1] ** -0.5 if scale is None else scale)
