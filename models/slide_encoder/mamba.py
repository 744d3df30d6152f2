"""COBRA: gated attention over tiles that went through Mamba-2 layers (https://arxiv.org/abs/2411.13623)."""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, pad, rms_norm, silu, softplus
from torch.utils.checkpoint import checkpoint as recompute

from .gated_attention import GatedAttention, GatedSlideEncoder, gated_names
from .spec import PublishedSpec

BLOCK = 256
"""Tokens of a block: within it all pairs are computed, from block to block a state is handed on."""


def state_space_scan(x: Tensor, log_decay: Tensor, into: Tensor, out: Tensor) -> Tensor:
    """The recurrence `S_t = exp(log_decay_t) S_{t-1} + x_t into_t'`, `y_t = S_t out_t`, in blocks.

    As listing 1 of https://arxiv.org/abs/2405.21060; its time and memory grow with the number of tokens.

    Args:
        x: `(T, heads, D)` inputs.
        log_decay: `(T, heads)`, at most 0.
        into: `(T, states)` how much of an input each state takes, of all heads alike.
        out: `(T, states)` how much of each state an output takes.

    Returns:
        `(T, heads, D)`.
    """
    state = x.new_zeros(*x.shape[1:], into.shape[1])
    outputs = []
    for values, decay, taken, read in zip(*(torch.split(t, BLOCK) for t in (x, log_decay, into, out)), strict=True):
        total = decay.cumsum(0)  # from the beginning of the block
        between = total[:, None] - total[None]  # (t, s, heads): from s until t, where s comes first
        later = torch.ones(len(values), len(values), dtype=torch.bool, device=x.device).triu(1)
        between = between.masked_fill(later[:, :, None], -torch.inf).exp()
        y = torch.einsum("ts,tsh,shd->thd", read @ taken.mT, between, values)
        outputs.append(y + torch.einsum("tn,th,hdn->thd", read, total.exp(), state))
        left = (total[-1] - total).exp()
        state = total[-1].exp()[:, None, None] * state + torch.einsum("sn,sh,shd->hdn", taken, left, values)
    return torch.cat(outputs)


class Mamba2(nn.Module):
    """A Mamba-2 layer (https://arxiv.org/abs/2405.21060), one group of states, without its residual.

    Args:
        width: Width of the tokens.
        state: Entries of the state of each channel.
        head_dim: Channels of a head.
        kernel: Tokens that the convolution sees.
    """

    def __init__(self, width: int, state: int, head_dim: int = 64, kernel: int = 4) -> None:
        super().__init__()
        inner = 2 * width
        if inner % head_dim:
            raise ValueError(f"twice the width {width} must be a multiple of {head_dim}")
        self.sizes = (inner, state, inner // head_dim)
        self.into = nn.Linear(width, 2 * inner + 2 * state + inner // head_dim, bias=False)
        self.convolution = nn.Conv1d(inner + 2 * state, inner + 2 * state, kernel, groups=inner + 2 * state)
        self.step_bias = nn.Parameter(torch.full((inner // head_dim,), -4.6))  # steps of about 0.01
        self.log_rate = nn.Parameter(torch.linspace(1, 16, inner // head_dim).log())
        self.skip = nn.Parameter(torch.ones(inner // head_dim))
        self.norm = nn.Parameter(torch.ones(inner))
        self.out = nn.Linear(inner, width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(T, width) -> the same."""
        inner, state, heads = self.sizes
        gate, mixed, step = torch.split(self.into(tokens), [inner, inner + 2 * state, heads], -1)
        kernel = self.convolution.kernel_size[0]
        mixed = silu(self.convolution(pad(mixed.T, (kernel - 1, 0))).T)
        x, into, out = torch.split(mixed, [inner, state, state], -1)
        # Sums over thousands of tokens, of numbers between 0 and 1, in float32 at least.
        precise = torch.promote_types(torch.float32, tokens.dtype)
        with torch.autocast(tokens.device.type, enabled=False):
            step = softplus(step.to(precise) + self.step_bias.to(precise))
            heads_of_x = torch.unflatten(x.to(precise), -1, (heads, -1))
            log_decay = -step * self.log_rate.to(precise).exp()
            y = state_space_scan(heads_of_x * step[..., None], log_decay, into.to(precise), out.to(precise))
            y = (y + heads_of_x * self.skip.to(precise)[:, None]).flatten(-2) * silu(gate.to(precise))
            y = rms_norm(y, (inner,), self.norm.to(precise), 1e-5)
        output: Tensor = self.out(y.to(self.out.weight.dtype))
        return output


class COBRA(GatedSlideEncoder):
    """COBRA: the mean of the tile embeddings themselves, weighted by what attends after Mamba-2 layers.

    One checkpoint reads the embeddings of several tile encoders, each by a projection of its own: those of the others are
    left out here.

    Args:
        spec: Its facts; of tile embeddings longer than `reads`, only their beginning is read.
        weights: Source and digest of the weights.
        reads: Length of what is read of a tile embedding: which of the checkpoint's projections.
        width: Width of the tokens.
        layers: Mamba-2 layers.
        heads: Attentions, each over its own part of the tokens.
        attention_width: Width of the attentions.
        state: Entries of the state of each channel.
        dropout: Share of values dropped in training.
        attention_dropout: Share of values of the attentions dropped in training.
    """

    LEFT_OUT = ("embed.*", "proj.*", "mamba_enc.norm.*")

    def __init__(
        self,
        spec: PublishedSpec,
        weights: str,
        reads: int,
        width: int = 768,
        layers: int = 1,
        heads: int = 4,
        attention_width: int = 256,
        state: int = 128,
        dropout: float = 0.2,
        attention_dropout: float = 0.25,
    ) -> None:
        super().__init__(spec, weights)
        if width % heads:
            raise ValueError(f"width {width} must be a multiple of heads {heads}")
        self.width = min(reads, spec.tile_dim)
        self.tile_norm = nn.LayerNorm(self.width)
        self.tile_projection = nn.Linear(self.width, width)
        self.token_projection = nn.Linear(width, width)
        self.into = nn.Linear(width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.layers = nn.ModuleList(Mamba2(width, state) for _ in range(layers))
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.attentions = nn.ModuleList(
            GatedAttention(width // heads, attention_width, attention_dropout) for _ in range(heads)
        )
        self.dropout = nn.Dropout(dropout)

        self.PUBLISHED = {
            f"embed.{self.width}.head.0": "tile_norm",
            f"embed.{self.width}.head.1": "tile_projection",
            f"embed.{self.width}.head.4": "token_projection",
        } | _NAMES

    def tile_weights(self, tile_features: Tensor) -> Tensor:
        """See `GatedSlideEncoder.tile_weights`."""
        x = self.tile_projection(self.tile_norm(tile_features[:, : self.width]))
        x = self.token_projection(silu(self.dropout(x)))
        x = self.dropout(gelu(self.into(x)))
        for norm, layer in zip(self.norms, self.layers, strict=True):
            normed = norm(x)
            x = x + (recompute(layer, normed, use_reentrant=False) if self.recomputes() else layer(normed))
        heads = self.norm(self.out(x)).unflatten(-1, (-1, len(self.attentions))).unbind(-1)
        scores = [attention(tokens) for attention, tokens in zip(self.attentions, heads, strict=True)]
        return torch.stack(scores).mean(0).softmax(0)

    def embed(self, tile_features: Tensor, grid_cells: Tensor) -> Tensor:
        """See `PublishedSlideEncoder.embed`."""
        return self.tile_weights(tile_features) @ tile_features[:, : self.width]


_NAMES = {
    "mamba_enc._fc1.0": "into",
    "mamba_enc.layers.{i}.0": "norms.{i}",
    "mamba_enc.layers.{i}.1.in_proj": "layers.{i}.into",
    "mamba_enc.layers.{i}.1.conv1d": "layers.{i}.convolution",
    "mamba_enc.layers.{i}.1.dt_bias": "layers.{i}.step_bias",
    "mamba_enc.layers.{i}.1.A_log": "layers.{i}.log_rate",
    "mamba_enc.layers.{i}.1.D": "layers.{i}.skip",
    "mamba_enc.layers.{i}.1.norm.weight": "layers.{i}.norm",
    "mamba_enc.layers.{i}.1.out_proj": "layers.{i}.out",
    "mamba_enc.classifier": "out",
    "norm": "norm",
    **gated_names("attentions.{i}", "attn.{i}"),
}
