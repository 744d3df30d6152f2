"""Dilated attention as one reads it in the paper: plain tensor code, for every dtype, to check the fast paths against."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def naive_dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: Sequence[int],
    dilated_ratios: Sequence[int],
    is_causal: bool,
    scale: float,
) -> Tensor:
    """See `dilated_attention`. Memory grows with the square of the segment lengths."""
    length, heads = q.shape[1:3]
    outputs, log_sums = [], []
    for segment_length, ratio in zip(segment_lengths, dilated_ratios, strict=True):
        width = min(segment_length, length)
        slots = math.ceil(width / ratio)
        output = torch.zeros_like(v)
        log_sum = q.new_full(q.shape[:3], -torch.inf)
        for head in range(heads):
            offset = head // math.ceil(heads / ratio)
            for start in range(0, length, width):
                positions = torch.arange(start, min(start + width, length), device=q.device)[offset::ratio]
                n = len(positions)
                if n == 0:
                    continue
                logits = scale * q[:, positions, head] @ k[:, positions, head].transpose(1, 2)
                if is_causal:  # slots past the end come after every query, which does not see them
                    logits = logits.masked_fill(torch.ones(n, n, device=q.device).triu(1).bool(), -torch.inf)
                else:  # slots past the end are zero keys with zero values, and are not masked
                    logits = torch.cat([logits, logits.new_zeros(len(q), n, slots - n)], dim=2)
                output[:, positions, head] = logits.softmax(2)[..., :n] @ v[:, positions, head]
                log_sum[:, positions, head] = logits.logsumexp(2)
        outputs.append(output)
        log_sums.append(log_sum)
    # Where no branch covers a token all outputs are zero, and any finite weight gives zero.
    weights = torch.stack(log_sums)
    weights = weights.masked_fill((weights == -torch.inf).all(0), 0).softmax(0)
    return (torch.stack(outputs) * weights[..., None]).sum(0)
