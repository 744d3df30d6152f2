"""LongNet: a transformer encoder with dilated attention (https://arxiv.org/abs/2307.02486), as GigaPath uses it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from .dilated_attention import dilated_attention


class LongNetLayer(nn.Module):
    """Dilated attention and a feed-forward network, each normalised before and within, each with a residual.

    Args:
        width: Width of the tokens.
        heads: Attention heads.
        ffn_width: Width of the feed-forward network.
        segment_lengths: Tokens of a segment, for each branch of the attention.
        dilated_ratios: Every how many-th token takes part, for each branch.
        dropout: Share of values dropped after each half.
        drop_path: Share of sequences for which a half is left out in training.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        ffn_width: int,
        segment_lengths: Sequence[int],
        dilated_ratios: Sequence[int],
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.segment_lengths = tuple(segment_lengths)
        self.dilated_ratios = tuple(dilated_ratios)
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_inner_norm = nn.LayerNorm(width)
        self.attention_out = nn.Linear(width, width)
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn_in = nn.Linear(width, ffn_width)
        self.ffn_inner_norm = nn.LayerNorm(ffn_width)
        self.ffn_out = nn.Linear(ffn_width, width)
        self.dropout = nn.Dropout(dropout)
        self.drop_path = drop_path

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Sequences end to end, each attending within itself.

        Args:
            x: `(T, width)` tokens.
            cu_seqlens: `(B + 1,)` int32: where each sequence begins, and T.

        Returns:
            `(T, width)`.
        """
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(1, (3, self.heads, -1)).unbind(1)
        attended = dilated_attention(q, k, v, self.segment_lengths, self.dilated_ratios, cu_seqlens=cu_seqlens)
        x = x + self._drop_path(
            self.dropout(self.attention_out(self.attention_inner_norm(attended.flatten(1)))), cu_seqlens
        )
        hidden = self.ffn_inner_norm(gelu(self.ffn_in(self.ffn_norm(x))))
        return x + self._drop_path(self.dropout(self.ffn_out(hidden)), cu_seqlens)

    def _drop_path(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        if self.drop_path == 0 or not self.training:
            return x
        kept = (torch.rand(len(cu_seqlens) - 1, device=x.device) >= self.drop_path).to(x.dtype) / (1 - self.drop_path)
        return x * kept.repeat_interleave(cu_seqlens.diff(), output_size=len(x))[:, None]
