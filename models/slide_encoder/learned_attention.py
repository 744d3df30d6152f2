"""Attention to blocks of keys that the model learns to choose: block top-k, trained with it.

The two stages are those of VSA (https://arxiv.org/abs/2505.13389), the form for sequences without a direction of native
sparse attention (https://arxiv.org/abs/2502.11089): attention between the means of blocks chooses, attention to the keys of
the chosen blocks follows. The choice itself has no gradient. What the means attend to is part of the output too, by a
learned gate: so training raises the scores of blocks that matter, and they are chosen. Training and inference choose alike.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from .gathered_attention import as_rows, gathered_attention

_SCORES = 2**24
"""Scores of blocks that are compared at a time."""


def learned_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_causal: bool,
    block_size: int,
    chosen_blocks: int,
    gate: Tensor | None,
    scale: float,
) -> Tensor:
    """See `attention`; of sequences of one length.

    Args:
        q: `(R, L, D)` queries: rows (of a batch and its heads), tokens, head dimension.
        k: Keys, shaped like `q`.
        v: Values, shaped like `q`.
        is_causal: Whether later keys are hidden.
        block_size: Tokens of a block.
        chosen_blocks: Blocks that each block of queries sees besides itself.
        gate: `(R, L, 1)` factor of what the means of all blocks say; None leaves them out.
        scale: Factor of the logits.

    Returns:
        `(R, L, D)` float32 (float64 of float64).
    """
    length, dim = q.shape[1:]
    blocks = -(-length // block_size)
    own = torch.arange(blocks, device=q.device)
    within = torch.arange(block_size, device=q.device)
    mean_q, mean_k = _block_queries(q, block_size, is_causal), _block_means(k, block_size)
    chosen, valid = _choose(mean_q, mean_k, chosen_blocks, is_causal)

    def keys_of(first: int, end: int) -> tuple[Tensor, Tensor]:
        here = own[first:end]
        block = torch.cat([here[None, :, None].expand(len(chosen), -1, 1), chosen[:, first:end]], 2)
        key = (block[..., None] * block_size + within).flatten(2)
        some = pad(valid[:, first:end], (1, 0), value=True).repeat_interleave(block_size, 2)
        seen = (some & (key < length))[:, :, None]
        if is_causal:
            query = here[:, None] * block_size + within
            seen = seen & (query[:, :, None] >= key[:, :, None])
        return key.clamp(max=length - 1), seen

    padded = pad(q, (0, 0, 0, blocks * block_size - length)).view(-1, blocks, block_size, dim)
    output = gathered_attention(padded, k, v, keys_of, scale)[0].flatten(1, 2)[:, :length]
    if gate is not None:
        coarse = _coarse(mean_q, mean_k, _block_means(v, block_size), is_causal, scale)
        output = output + gate * coarse.repeat_interleave(block_size, 1)[:, :length]
    return output


def choose_blocks(
    q: Tensor, k: Tensor, block_size: int, chosen_blocks: int, is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Which blocks of keys each block of queries chooses: those whose mean key fits its mean query best.

    Args:
        q: `(B, L, H, D)` queries.
        k: Keys, shaped like `q`.
        block_size: Tokens of a block.
        chosen_blocks: Blocks that each block of queries sees besides itself.
        is_causal: Whether later blocks are hidden.

    Returns:
        `(B, H, blocks, chosen)` int64 numbers of blocks, best first, and bool, whether it is one: not where `is_causal`
        leaves fewer. `chosen` is at most the number of the other blocks.
    """
    mean_q, mean_k = _block_queries(as_rows(q), block_size, is_causal), _block_means(as_rows(k), block_size)
    chosen, valid = _choose(mean_q, mean_k, chosen_blocks, is_causal)
    batch, _, heads, _ = q.shape
    return chosen.view(batch, heads, *chosen.shape[1:]), valid.view(batch, heads, *valid.shape[1:])


def _block_queries(q: Tensor, block_size: int, is_causal: bool) -> Tensor:
    """What a block of queries asks as one: their mean, or if causal its first, since no query may know of later ones."""
    if is_causal:
        return q[:, ::block_size].to(torch.promote_types(q.dtype, torch.float32))
    return _block_means(q, block_size)


def _block_means(x: Tensor, block_size: int) -> Tensor:
    """(R, L, D) -> (R, blocks, D) in float32 or finer; the last block's mean is that of the tokens it has."""
    length = x.shape[1]
    blocks = -(-length // block_size)
    x = pad(x.to(torch.promote_types(x.dtype, torch.float32)), (0, 0, 0, blocks * block_size - length))
    sizes = (length - torch.arange(blocks, device=x.device) * block_size).clamp(max=block_size)
    return x.view(len(x), blocks, block_size, -1).sum(2) / sizes[:, None]


@torch.no_grad()
def _choose(mean_q: Tensor, mean_k: Tensor, count: int, is_causal: bool) -> tuple[Tensor, Tensor]:
    rows, blocks = mean_q.shape[:2]
    count = min(count, blocks - 1)
    number = torch.arange(blocks, device=mean_q.device)
    some = max(1, _SCORES // (rows * blocks))
    chosen, valid = [], []
    with torch.autocast(mean_q.device.type, enabled=False):
        for here in torch.split(number, some):
            hidden = number >= here[:, None] if is_causal else number == here[:, None]
            scores = (mean_q[:, here] @ mean_k.mT).masked_fill(hidden, -torch.inf)
            best = scores.topk(count, dim=-1)
            chosen.append(best.indices)
            valid.append(best.values > -torch.inf)
    return torch.cat(chosen, 1), torch.cat(valid, 1)


def _coarse(mean_q: Tensor, mean_k: Tensor, mean_v: Tensor, is_causal: bool, scale: float) -> Tensor:
    """Attention between blocks, `(R, blocks, D)`; a causal one sees those before it, the first one nothing."""
    with torch.autocast(mean_q.device.type, enabled=False):
        if not is_causal:
            return scaled_dot_product_attention(mean_q, mean_k, mean_v, scale=scale)
        if mean_q.shape[1] == 1:
            return torch.zeros_like(mean_v)
        before = scaled_dot_product_attention(
            mean_q[:, 1:], mean_k[:, :-1], mean_v[:, :-1], is_causal=True, scale=scale
        )
        return pad(before, (0, 0, 1, 0))
