"""MOOZY's case transformer: the slide embeddings of a patient to one vector (https://arxiv.org/abs/2603.27048)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from ...errors import LongslideError
from ..checkpoint_file import digest
from ..slide_encoder.checkpoint import load_published, weights_file
from ..slide_encoder.spec import load_slide_encoder_spec
from .base import Aggregator, split_bags


class CaseLayer(nn.Module):
    """Attention and a feed-forward network, each after a layer norm, and scaled before the residual.

    Args:
        width: Width of the tokens.
        heads: Attention heads.
        ffn_width: Width of the feed-forward network.
        dropout: Share of values of the feed-forward network dropped in training.
    """

    def __init__(self, width: int, heads: int, ffn_width: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.attention_gain = nn.Parameter(torch.full((width,), 1e-5))
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn_in = nn.Linear(width, ffn_width)
        self.ffn_out = nn.Linear(ffn_width, width)
        self.ffn_gain = nn.Parameter(torch.full((width,), 1e-5))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, width) -> the same."""
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(1, (3, self.heads, -1)).permute(1, 2, 0, 3)
        attended = scaled_dot_product_attention(q[None], k[None], v[None])[0].transpose(0, 1).flatten(1)
        x = x + self.attention_gain * self.attention_out(attended)
        hidden = self.dropout(gelu(self.ffn_in(self.ffn_norm(x))))
        output: Tensor = x + self.ffn_gain * self.dropout(self.ffn_out(hidden))
        return output


class MOOZYCase(Aggregator):
    """MOOZY's case transformer on MOOZY's slide embeddings, frozen or to fine-tune; for bags of patients.

    Args:
        feature_dim: Length of a slide embedding.
        layers: Layers.
        heads: Attention heads.
        ffn_width: Width of the feed-forward networks.
        dropout: Share of values of the feed-forward networks dropped in training.
        frozen: Whether it stays as it is and only the head is trained.
        checkpoint: Weights as published (`moozy.pt`), or the word `random`; none takes the published weights from the hub.
        architecture: What `architecture()` of the trained module said: to build it again, without weights.

    Raises:
        LongslideError: The weights are unavailable, or do not fit the slide embeddings.
    """

    reads_slide_embedding = True
    learning_rate = 1e-4

    PUBLISHED: Mapping[str, str] = {
        "case_token": "case_token",
        "blocks.{i}.norm1": "blocks.{i}.attention_norm",
        "blocks.{i}.q_proj": "blocks.{i}.qkv[0]",
        "blocks.{i}.k_proj": "blocks.{i}.qkv[1]",
        "blocks.{i}.v_proj": "blocks.{i}.qkv[2]",
        "blocks.{i}.out_proj": "blocks.{i}.attention_out",
        "blocks.{i}.ls_attn.gamma": "blocks.{i}.attention_gain",
        "blocks.{i}.norm2": "blocks.{i}.ffn_norm",
        "blocks.{i}.fc1": "blocks.{i}.ffn_in",
        "blocks.{i}.fc2": "blocks.{i}.ffn_out",
        "blocks.{i}.ls_mlp.gamma": "blocks.{i}.ffn_gain",
        "norm": "norm",
    }
    ROOT: str = ""
    LEFT_OUT: tuple[str, ...] = ()
    SHARED: Mapping[str, str] = {}

    def __init__(
        self,
        feature_dim: int,
        layers: int = 3,
        heads: int = 12,
        ffn_width: int = 3072,
        dropout: float = 0.1,
        frozen: bool = False,
        checkpoint: str | None = None,
        architecture: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if feature_dim % heads:
            raise LongslideError(f"slide embeddings of length {feature_dim} do not divide into {heads} heads of MOOZY")
        self.width = feature_dim
        self.frozen = frozen
        self.case_token = nn.Parameter(torch.randn(1, 1, feature_dim) * 0.02)
        self.blocks = nn.ModuleList(CaseLayer(feature_dim, heads, ffn_width, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(feature_dim)
        spec = load_slide_encoder_spec("moozy")
        self.described = {"weights": "random", "tile_encoder": ""}
        if architecture is not None:
            self.described = dict(architecture)
        elif checkpoint != "random":
            file, source = weights_file(spec, checkpoint)
            load_published(self, file, f"{source}: does not fit MOOZY's case transformer", under="case_transformer")
            self.described = {"weights": f"{source} {digest(file)}", "tile_encoder": spec.tile_encoder}
        if frozen:
            self.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> "MOOZYCase":
        """Training or evaluation mode; a frozen one stays in evaluation mode."""
        super().train(mode and not self.frozen)
        return self

    def architecture(self) -> dict[str, Any]:
        """Where its first weights came from, and which tile encoder they read by way of the slide encoder."""
        return dict(self.described)

    def use_features_of(self, tile_encoder: str) -> None:
        """See `Aggregator.use_features_of`."""
        wanted = self.described["tile_encoder"]
        if wanted and wanted != tile_encoder:
            raise LongslideError(
                f"MOOZY's case transformer reads slide embeddings of MOOZY, which reads tile encoder {wanted!r}, but these "
                f"features are of {tile_encoder!r}; embed the slides with that one and --slide-encoder moozy"
            )

    def forward(self, tile_features: Tensor, grid_cells: Tensor, cu_seqlens: Tensor) -> Tensor:
        """See `Aggregator.forward`; a bag's rows are the slide embeddings of a patient."""
        slides = tile_features.to(self.case_token.dtype)
        return torch.stack([self._one(bag) for bag in split_bags(slides, cu_seqlens)])

    def _one(self, slides: Tensor) -> Tensor:
        x = torch.cat([self.case_token[0], slides])
        for block in self.blocks:
            x = block(x)
        case: Tensor = self.norm(x[0])
        return case
