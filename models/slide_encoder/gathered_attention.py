"""Attention of groups of queries to keys that are gathered for them: time and memory linear in what is gathered."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

KeysOf = Callable[[int, int], tuple[Tensor, Tensor]]
"""`(first group, end) -> (index, seen)`: the keys of these groups, and which of them each query sees."""

_ELEMENTS = {"cpu": 2**22, "cuda": 2**27}
"""Of what is gathered for some groups at a time: the caches of a processor, the queues of a GPU."""


def gathered_attention(q: Tensor, k: Tensor, v: Tensor, keys_of: KeysOf, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention of groups of queries, each to its own list of keys.

    Neither the lists nor what they gather are kept: some groups at a time are gathered, and again in the backward.

    Args:
        q: `(R, G, b, D)` queries: rows (of a batch and its heads), groups, queries of a group, head dimension.
        k: `(R, T, D)` keys.
        v: `(R, T, D)` values.
        keys_of: Gives for some of the groups `index`, `(R or 1, g, M)` int64 positions of keys in 0 .. T - 1, and `seen`,
            bool that broadcasts to `(R, g, b, M)`. No key may be listed twice for a query that sees it.
        scale: Factor of the logits.

    Returns:
        `(R, G, b, D)` float32 (float64 of float64) outputs, 0 for a query that sees nothing, and `(R, G, b)` the
        log-sum-exp of their logits, -inf there.
    """
    output, log_sum = _GatheredAttention.apply(q, k, v, keys_of, scale)
    return output, log_sum


def as_rows(x: Tensor) -> Tensor:
    """`(B, L, H, D)` -> `(B * H, L, D)`: a row for each sequence and head."""
    return x.transpose(1, 2).flatten(0, 1)


def mixed(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """One softmax over the keys of several parts, of each part's output `(..., D)` and log-sum-exp `(...)`."""
    weights = torch.stack([log_sum for _, log_sum in parts]).softmax(0)
    return (torch.stack([output for output, _ in parts]) * weights[..., None]).sum(0)


class _GatheredAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, keys_of: KeysOf, scale: float) -> tuple[Tensor, Tensor]:
        accurate = torch.promote_types(q.dtype, torch.float32)
        output = torch.empty(q.shape, dtype=accurate, device=q.device)
        log_sum = torch.empty(q.shape[:-1], dtype=accurate, device=q.device)
        with torch.autocast(q.device.type, enabled=False):
            values = v.flatten(0, 1)
            for some, rows, logits in _some_groups(q, k, keys_of, scale):
                sums = logits.logsumexp(-1)
                log_sum[:, some] = sums
                output[:, some] = _weights(logits, sums).to(v.dtype) @ values[rows]
        ctx.save_for_backward(q, k, v, output, log_sum)
        ctx.keys_of, ctx.scale = keys_of, scale
        return output, log_sum

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor, grad_log_sum: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, output, log_sum = ctx.saved_tensors
        grad_q = torch.empty_like(output)
        grad_k, grad_v = (torch.zeros_like(x, dtype=output.dtype).flatten(0, 1) for x in (k, v))
        keys, values = k.flatten(0, 1), v.flatten(0, 1)
        with torch.autocast(q.device.type, enabled=False):
            # A logit's gradient is its weight times what its value would change less the mean of that.
            mean = (grad_output * output).sum(-1) - grad_log_sum
            for some, rows, logits in _some_groups(q, k, ctx.keys_of, ctx.scale):
                weights = _weights(logits, log_sum[:, some])
                direction = grad_output[:, some].to(v.dtype)
                grad_logits = weights * (_products(direction, values[rows]) - mean[:, some][..., None])
                grad_logits = (grad_logits * ctx.scale).to(q.dtype)
                grad_q[:, some] = (grad_logits @ keys[rows]).to(grad_q.dtype)
                _add_rows(grad_k, rows, grad_logits.mT @ q[:, some])
                _add_rows(grad_v, rows, weights.to(v.dtype).mT @ direction)
        return grad_q.to(q.dtype), grad_k.view_as(k).to(k.dtype), grad_v.view_as(v).to(v.dtype), None, None


def _some_groups(q: Tensor, k: Tensor, keys_of: KeysOf, scale: float) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some of the groups at a time: which, the `(R, g, M)` rows of their keys, and the `(R, g, b, M)` logits."""
    rows, groups, block, dim = q.shape
    keys = k.flatten(0, 1)
    first_of_row = torch.arange(rows, device=q.device)[:, None, None] * k.shape[1]
    listed = keys_of(0, 1)[0].shape[-1]
    count = max(1, _ELEMENTS.get(q.device.type, 2**22) // (rows * listed * (2 * dim + 2 * block)))
    for start in range(0, groups, count):
        some = slice(start, min(groups, start + count))
        index, seen = keys_of(some.start, some.stop)
        index = index + first_of_row
        logits = _products(q[:, some], keys[index]) * scale
        yield some, index, logits.masked_fill(~seen, -torch.inf)


def _products(x: Tensor, y: Tensor) -> Tensor:
    """`x @ y.mT` of `(R, g, b, D)` and `(R, g, M, D)`, not rounded to half precision: exp would make per cents of that."""
    if x.element_size() > 2:
        return x @ y.mT
    if not x.is_cuda:
        return x.float() @ y.float().mT
    product: Tensor = torch.bmm(x.flatten(0, 1), y.flatten(0, 1).mT, out_dtype=torch.float32)
    return product.view(*x.shape[:-1], y.shape[-2])


def _weights(logits: Tensor, log_sum: Tensor) -> Tensor:
    """exp(logits - log_sum), 0 of a query that sees nothing."""
    return (logits - log_sum.clamp(min=torch.finfo(log_sum.dtype).min)[..., None]).exp()


def _add_rows(total: Tensor, rows: Tensor, more: Tensor) -> None:
    """Add to rows of the total, in the same order every time."""
    more = more.flatten(0, -2).to(total.dtype)
    if total.is_cuda:  # index_add_ adds in any order there, this sorts first
        total.index_put_((rows.flatten(),), more, accumulate=True)
    else:
        total.index_add_(0, rows.flatten(), more)
