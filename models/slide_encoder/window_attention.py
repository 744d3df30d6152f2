"""Attention to the neighbours, in plain PyTorch: blocks of queries, each with the keys around it."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from .gathered_attention import KeysOf, gathered_attention

_BLOCK = 64
"""Queries that share the keys of their neighbourhood."""


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool, window: int, scale: float, everywhere: int = 0
) -> tuple[Tensor, Tensor]:
    """Attention to the keys at most `window` tokens away, and to the first `everywhere` keys.

    Args:
        q: `(R, L, D)` queries: rows (of a batch and its heads), tokens, head dimension.
        k: Keys, shaped like `q`.
        v: Values, shaped like `q`.
        is_causal: Whether later keys are hidden.
        window: Tokens seen on either side, besides the token itself.
        scale: Factor of the logits.
        everywhere: First keys, which all queries see.

    Returns:
        As `gathered_attention`: `(R, L, D)` outputs and `(R, L)` log-sum-exps.
    """
    rows, length, dim = q.shape
    blocks = -(-length // _BLOCK)
    padded = pad(q, (0, 0, 0, blocks * _BLOCK - length)).view(rows, blocks, _BLOCK, dim)
    keys_of = _near_keys(length, is_causal, min(window, length - 1), everywhere, q.device)
    output, log_sum = gathered_attention(padded, k, v, keys_of, scale)
    return output.flatten(1, 2)[:, :length], log_sum.flatten(1, 2)[:, :length]


def _near_keys(length: int, is_causal: bool, window: int, everywhere: int, device: torch.device) -> KeysOf:
    """The first keys, then the neighbourhood of a block of queries."""

    def keys_of(first: int, end: int) -> tuple[Tensor, Tensor]:
        begin = torch.arange(first, end, device=device)[:, None] * _BLOCK
        query = (begin + torch.arange(_BLOCK, device=device))[:, :, None]
        around = begin + torch.arange(-window, _BLOCK + (0 if is_causal else window), device=device)
        key = torch.cat([torch.arange(everywhere, device=device).expand(end - first, -1), around], 1)[:, None]
        near = (key >= everywhere) & (key < length) & ((query - key).abs() <= window)
        seen = near | (torch.arange(key.shape[-1], device=device) < everywhere)
        return key[:, 0].clamp(0, length - 1)[None], seen & (query >= key) if is_causal else seen

    return keys_of
