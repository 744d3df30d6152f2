"""LongNet: a transformer encoder with dilated attention (https://arxiv.org/abs/2307.02486), as GigaPath uses it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import LongslideError
from .attention_pattern import Pattern, attention
from .dilated_attention import dilated_self_attention, has_kernels
from .dilated_attention.parallel import SequenceShards, parallel_dilated_self_attention
from .norm_linear import norm_linear


class LongNet(nn.Module):
    """A LongNet encoder over sequences of one length: a plain module in the place of a transformer encoder.

    It has no embedding and no positions: give it tokens that know their places.

    Args:
        width: Width of the tokens; a multiple of `heads`.
        layers: Layers.
        heads: Attention heads.
        segment_lengths: Tokens of a segment, for each branch of the attention.
        dilated_ratios: Every how many-th token takes part, for each branch.
        ffn_width: Width of the feed-forward networks; four times `width` by default.
        dropout: Share of values dropped after each half of a layer.
        drop_path: Share of sequences for which the last layer's halves are left out in training; less before it.
    """

    def __init__(
        self,
        width: int,
        layers: int = 4,
        heads: int = 8,
        segment_lengths: Sequence[int] = (1024, 4096, 16384, 65536),
        dilated_ratios: Sequence[int] = (1, 2, 4, 8),
        ffn_width: int | None = None,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if width % heads or len(segment_lengths) != len(dilated_ratios):
            raise LongslideError(
                f"width {width} must be a multiple of heads {heads}, and {list(segment_lengths)} and {list(dilated_ratios)} "
                "be one segment length and one ratio for each branch"
            )
        rates = [drop_path * i / max(1, layers - 1) for i in range(layers)]
        self.layers = nn.ModuleList(
            LongNetLayer(width, heads, ffn_width or 4 * width, segment_lengths, dilated_ratios, dropout, rate)
            for rate in rates
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Encode sequences.

        Args:
            x: `(B, L, width)` tokens.

        Returns:
            `(B, L, width)`.
        """
        batch, length, width = x.shape
        cu_seqlens = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=x.device)
        tokens, update = x.reshape(batch * length, width), None
        for layer in self.layers:
            tokens, update = layer(tokens, cu_seqlens, update=update)
        if update is not None:
            tokens = tokens + update
        normed: Tensor = self.norm(tokens)
        return normed.view(batch, length, width)


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
        pattern: Which keys a query sees; see `attention`.
        pattern_settings: The settings of the pattern, as `attention` takes them.
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
        pattern_settings: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.segment_lengths = tuple(segment_lengths)
        self.dilated_ratios = tuple(dilated_ratios)
        self.pattern = pattern
        self.pattern_settings = dict(pattern_settings or {})
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        if pattern == "learned":
            self.gate = nn.Linear(width, heads)
        self.attention_inner_norm = nn.LayerNorm(width)
        self.attention_out = nn.Linear(width, width)
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn_in = nn.Linear(width, ffn_width)
        self.ffn_inner_norm = nn.LayerNorm(ffn_width)
        self.ffn_out = nn.Linear(ffn_width, width)
        self.dropout = nn.Dropout(dropout)
        self.drop_path = drop_path

    def forward(
        self, x: Tensor, cu_seqlens: Tensor, shards: SequenceShards | None = None, update: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Sequences end to end, each attending within itself. Its last sum is left to the norm that comes next: a pass over
        the tokens less.

        Args:
            x: `(T, width)` tokens.
            cu_seqlens: `(B + 1,)` int32: where each sequence begins, and T.
            shards: How the sequences are spread over ranks, of which this one holds T tokens.
            update: `(T, width)` to be added to the tokens first, as the layer before gives it.

        Returns:
            `(T, width)` tokens, and `(T, width)` to be added to them.
        """
        if shards is None and self.pattern == "dilated" and has_kernels(x) and not torch.compiler.is_compiling():
            found = self._by_steps(x, cu_seqlens, update)
            if found is not None:
                return found
        qkv, x = self.project(x, update)
        gate = None
        if self.pattern == "learned":
            gate = norm_linear(x, self.attention_norm, self.gate)[0].sigmoid()
        attended = self._attend(qkv, gate, cu_seqlens, shards).flatten(1)
        attended, _ = norm_linear(attended, self.attention_inner_norm, self.attention_out)
        attended = self._drop(attended, cu_seqlens, shards)
        hidden, x = norm_linear(attended, self.ffn_norm, self.ffn_in, residual=x)
        hidden, _ = norm_linear(hidden, self.ffn_inner_norm, self.ffn_out, gelu=True)
        return x, self._drop(hidden, cu_seqlens, shards)

    def _by_steps(self, x: Tensor, cu_seqlens: Tensor, update: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """`forward` on a GPU, in as few steps of autograd as dropout allows; None where the kernels do not fit."""
        from .layer_steps import layer_step, takes_steps  # imports triton, which not every machine has

        attention = (self.heads, self.segment_lengths, self.dilated_ratios)
        first = (self.attention_norm, self.qkv, self.attention_inner_norm, self.attention_out, attention)
        if not takes_steps(x, first[1].weight, attention):
            return None
        second = (self.ffn_norm, self.ffn_in, self.ffn_inner_norm, self.ffn_out, None)
        summands: tuple[Tensor, Tensor | None] = (x, None) if update is None else (update, x)
        if not self.training or (self.drop_path == 0 and self.dropout.p == 0):
            hidden, x = layer_step(*summands, cu_seqlens, first, second)
            return x, hidden
        attended, x = layer_step(*summands, cu_seqlens, first)
        hidden, x = layer_step(self._drop(attended, cu_seqlens, None), x, cu_seqlens, second)
        return x, self._drop(hidden, cu_seqlens, None)

    def project(self, x: Tensor, update: Tensor | None) -> tuple[Tensor, Tensor]:
        """Queries, keys and values `(T, 3, heads, width / heads)` of tokens as `forward` takes them, and the tokens' sum."""
        if update is None:
            qkv, _ = norm_linear(x, self.attention_norm, self.qkv)
        else:
            qkv, x = norm_linear(update, self.attention_norm, self.qkv, residual=x)
        return qkv.view(len(x), 3, self.heads, x.shape[1] // self.heads), x

    def _attend(self, qkv: Tensor, gate: Tensor | None, cu_seqlens: Tensor, shards: SequenceShards | None) -> Tensor:
        lengths, ratios = self.segment_lengths, self.dilated_ratios
        if shards is not None:
            return parallel_dilated_self_attention(qkv, lengths, ratios, cu_seqlens, shards)
        if self.pattern == "dilated":
            return dilated_self_attention(qkv, lengths, ratios, cu_seqlens)
        q, k, v = qkv.unbind(1)
        settings: Any = self.pattern_settings
        return attention(q, k, v, self.pattern, gate=gate, cu_seqlens=cu_seqlens, **settings)

    def _drop(self, x: Tensor, cu_seqlens: Tensor, shards: SequenceShards | None) -> Tensor:
        """In training, some of the values, and all of some sequences."""
        if not self.training:
            return x
        if self.dropout.p > 0:
            x = self.dropout(x)
        if self.drop_path == 0:
            return x
        kept = (torch.rand(len(cu_seqlens) - 1, device=x.device) >= self.drop_path).to(x.dtype) / (1 - self.drop_path)
        if shards is not None:
            kept = shards.first(kept)  # the half is left out on all ranks or on none
        if len(kept) == 1:
            return x * kept
        rows = torch.arange(len(x), dtype=cu_seqlens.dtype, device=x.device)
        sequence = torch.searchsorted(cu_seqlens[1:], rows, right=True).clamp(
            max=len(kept) - 1
        )  # rows may lie past the end
        return x * kept[sequence][:, None]
