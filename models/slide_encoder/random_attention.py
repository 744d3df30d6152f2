"""Attention to random keys, to the neighbours and to global tokens, as in BigBird (https://arxiv.org/abs/2007.14062)."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .gathered_attention import gathered_attention, mixed
from .window_attention import window_attention


def random_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    is_causal: bool,
    random_keys: int,
    window: int,
    global_tokens: int,
    seed: int,
    scale: float,
) -> Tensor:
    """See `attention`; of sequences of one length, which see keys of the same numbers.

    Args:
        q: `(R, L, D)` queries: rows (of a batch and its heads), tokens, head dimension.
        k: Keys, shaped like `q`.
        v: Values, shaped like `q`.
        heads: Heads, whose rows follow one another; each has keys of its own.
        is_causal: Whether later keys are hidden.
        random_keys: Random keys of each query.
        window: Tokens seen on either side, besides the token itself.
        global_tokens: First tokens, which all see and which see all.
        seed: Which random keys.
        scale: Factor of the logits.

    Returns:
        The shape and dtype of `q`.
    """
    length = q.shape[1]
    batch = len(q) // heads
    everywhere = min(global_tokens, length)
    device = q.device

    def far_keys(first: int, end: int) -> tuple[Tensor, Tensor]:
        """The random keys, but those that are global or near too: a key counts once."""
        query = torch.arange(first, end, device=device)
        key, seen = random_key_positions(query, heads, length, random_keys, seed, is_causal)
        seen = seen & ((query[:, None] - key).abs() > window) & (key >= everywhere)
        return key.repeat(batch, 1, 1), seen.repeat(batch, 1, 1)[:, :, None]

    near = window_attention(q, k, v, is_causal, window, scale, everywhere)
    far, far_sum = gathered_attention(q[:, :, None], k, v, far_keys, scale)
    output = mixed([near, (far.squeeze(2), far_sum.squeeze(2))]).to(q.dtype)
    if everywhere:
        first_q = q[:, :everywhere].contiguous()
        every = scaled_dot_product_attention(first_q, k, v, is_causal=is_causal, scale=scale)
        output = torch.cat([every, output[:, everywhere:]], 1)
    return output


def random_key_positions(
    queries: Tensor, heads: int, tokens: int, count: int, seed: int, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """The random keys of some queries: one from each of `count` equal parts of the sequence, or of what has gone before.

    So no key is drawn twice, and each is as likely as any other. They come from a hash of seed, head, query and number, not
    from a generator: the same on every device, for any of the queries alone, and nothing is kept.

    Args:
        queries: `(Q,)` int64 positions.
        heads: Attention heads, each with keys of its own.
        tokens: Tokens of the sequence.
        count: Keys of each query.
        seed: Which ones.
        is_causal: Whether none lies after its query.

    Returns:
        `(heads, Q, count)` int64 positions, and bool, whether it is one: not where there are fewer tokens than `count`.
    """
    device = queries.device
    among = (queries + 1 if is_causal else torch.full_like(queries, tokens))[None, :, None]
    number = torch.arange(count, device=device)
    begin, end = number * among // count, (number + 1) * among // count
    mixed_up = (
        _hash(_hash(torch.arange(heads, device=device), seed)[:, None] + queries)[:, :, None] + number * 0x9E3779B9
    )
    position = begin + (_hash(mixed_up) * (end - begin) >> 32)
    return position, (end > begin).expand_as(position)


def _hash(x: Tensor, seed: int = 0) -> Tensor:
    """32 bits, by the finaliser of MurmurHash3."""
    mask = 0xFFFFFFFF
    x = (x + ((seed * 0x85EBCA77 + 0x165667B1) & mask)) & mask
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & mask
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & mask
    return x ^ (x >> 16)
