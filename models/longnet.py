"""LongNet: a transformer encoder with dilated attention (https://arxiv.org/abs/2307.02486), as GigaPath uses it."""

from collections.abc import Sequence

from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.functional import gelu

from .attention_pattern import Pattern, attention
from .dilated_attention.parallel import SequenceShards, parallel_dilated_attention


class LongNetLayer(nn.Module):
    """Dilated attention and a feed-forward network, each normalised before and within, each with a residual.

    Args:
        width: Width of the tokens.
        heads: Attention heads.
        ffn_width: Width of the feed-forward network.
        segment_lengths: Tokens of a segment, for each branch of the attention.
        dilated_ratios: Every how many-th token takes part, for each branch.
        dropout: Share of values dropped after each half.
        drop_path: Share of samples for which a half is left out.
        pattern: Which keys a query sees; see `attention`.
        window: Tokens seen on either side, for the pattern `sliding-window`.
        period: Distance of the keys from one another, for the pattern `strided`.
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
        pattern: Pattern = "dilated",
        window: int = 0,
        period: int = 0,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.segment_lengths = tuple(segment_lengths)
        self.dilated_ratios = tuple(dilated_ratios)
        self.pattern = pattern
        self.window = window
        self.period = period
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_inner_norm = nn.LayerNorm(width)
        self.attention_out = nn.Linear(width, width)
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn_in = nn.Linear(width, ffn_width)
        self.ffn_inner_norm = nn.LayerNorm(ffn_width)
        self.ffn_out = nn.Linear(ffn_width, width)
        self.dropout = nn.Dropout(dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, shards: SequenceShards | None = None) -> Tensor:
        """(B, L, width) -> (B, L, width); with `shards` the tokens of this rank alone, all ranks together."""
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(2, (3, self.heads, -1)).unbind(2)
        attended = self._attend(q, k, v, shards).flatten(2)
        x = x + self._drop_path(self.dropout(self.attention_out(self.attention_inner_norm(attended))), shards)
        hidden = self.ffn_inner_norm(gelu(self.ffn_in(self.ffn_norm(x))))
        return x + self._drop_path(self.dropout(self.ffn_out(hidden)), shards)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, shards: SequenceShards | None) -> Tensor:
        if shards is not None:
            return parallel_dilated_attention(q, k, v, self.segment_lengths, self.dilated_ratios, shards=shards)
        return attention(
            q,
            k,
            v,
            self.pattern,
            segment_lengths=self.segment_lengths,
            dilated_ratios=self.dilated_ratios,
            window=self.window,
            period=self.period,
        )

    def _drop_path(self, x: Tensor, shards: SequenceShards | None) -> Tensor:
        rate = self.drop_path.drop_prob
        if shards is None or rate == 0 or not self.training:
            return self.drop_path(x)  # type: ignore[no-any-return]
        kept = shards.first(x.new_empty(len(x), 1, 1).bernoulli_(1 - rate))  # a half goes on all ranks
        return x * (kept / (1 - rate))
