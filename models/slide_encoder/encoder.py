"""Slide encoders of the GigaPath family: tile embeddings and their grid cells in, a slide embedding out."""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from ...errors import LongslideError
from ..checkpoint_file import digest
from ..later import Later
from .attention_pattern import check_pattern
from .checkpoint import load_published, weights_file
from .dilated_attention.parallel import SequenceShards
from .longnet import LongNetLayer
from .packed_slides import PackedSlides, pack_slides
from .positions import grid_positions
from .spec import PublishedSpec, SlideEncoderSpec, load_slide_encoder_spec

if TYPE_CHECKING:
    from .published import PublishedSlideEncoder


class SlideEncoder(nn.Module):
    """GigaPath's slide encoder (https://doi.org/10.1038/s41586-024-07441-w).

    Args:
        spec: Its facts.
        pool: What the slide embedding is: the `mean` over the tiles, or the `cls` token.
        weights: Source and digest of the weights.

    Attributes:
        later: Where set, impossible cells on a GPU are refused when this looks, at a later call or step, and not at once.
    """

    PUBLISHED: Mapping[str, str] = {
        "cls_token": "cls_token",
        "patch_embed.proj": "tile_projection",
        "encoder.layers.{i}.self_attn_layer_norm": "layers.{i}.attention_norm",
        "encoder.layers.{i}.self_attn.q_proj": "layers.{i}.qkv[0]",
        "encoder.layers.{i}.self_attn.k_proj": "layers.{i}.qkv[1]",
        "encoder.layers.{i}.self_attn.v_proj": "layers.{i}.qkv[2]",
        "encoder.layers.{i}.self_attn.gate": "layers.{i}.gate",  # of the pattern `learned`: published ones have none
        "encoder.layers.{i}.self_attn.inner_attn_ln": "layers.{i}.attention_inner_norm",
        "encoder.layers.{i}.self_attn.out_proj": "layers.{i}.attention_out",
        "encoder.layers.{i}.final_layer_norm": "layers.{i}.ffn_norm",
        "encoder.layers.{i}.ffn.fc1": "layers.{i}.ffn_in",
        "encoder.layers.{i}.ffn.ffn_layernorm": "layers.{i}.ffn_inner_norm",
        "encoder.layers.{i}.ffn.fc2": "layers.{i}.ffn_out",
        "encoder.layer_norm": "layers_norm",
        "norm": "norm",
    }
    ROOT: str = ""
    LEFT_OUT: tuple[str, ...] = ("pos_embed",)  # a table of positions that some versions saved: computed here
    SHARED: Mapping[str, str] = {}

    def __init__(self, spec: SlideEncoderSpec, pool: Literal["mean", "cls"] = "mean", weights: str = "") -> None:
        super().__init__()
        if spec.width % 4 or spec.width % spec.heads:
            raise ValueError(f"width {spec.width} must be a multiple of 4 and of heads {spec.heads}")
        if pool not in ("mean", "cls"):
            raise LongslideError(f"pool {pool!r} is none of mean, cls")
        check_pattern(spec.pattern, **spec.pattern_settings)
        self.spec = spec
        self.pool = pool
        self.weights = weights
        self.sequence_group: dist.ProcessGroup | None = None
        self.later: Later | None = None
        self.tile_projection = nn.Linear(spec.tile_dim, spec.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, spec.width))
        drop_path = [spec.drop_path * i / max(1, spec.layers - 1) for i in range(spec.layers)]
        self.layers = nn.ModuleList(
            LongNetLayer(
                spec.width,
                spec.heads,
                spec.ffn_width,
                spec.segment_lengths,
                spec.dilated_ratios,
                spec.dropout,
                rate,
                spec.pattern,
                layer_pattern_settings(spec, number),
            )
            for number, rate in enumerate(drop_path)
        )
        self.layers_norm = nn.LayerNorm(spec.width)
        self.norm = nn.LayerNorm(spec.width, eps=1e-6)
        nn.init.normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    @property
    def name(self) -> str:
        """The encoder's name."""
        return self.spec.name

    @property
    def tile_encoder(self) -> str:
        """The tile encoder whose embeddings it reads; empty if that is not known."""
        return self.spec.tile_encoder

    @property
    def width(self) -> int:
        """Length of a slide embedding."""
        return self.spec.width

    def shard_sequence(self, group: dist.ProcessGroup | None) -> None:
        """Spread the tokens of slides over the ranks of a group, or no longer.

        Each rank then gives a part of each slide's tiles, all ranks together and in the order of the ranks, and gets the
        embeddings of the whole slides. A part may be empty; whether tiles of two ranks have one cell is not checked. Every
        rank must use the embedding for its loss: the gradients are those of the sum of the ranks' losses, so that their
        average over all ranks, which DDP and FSDP take, is the gradient of the loss itself.

        Args:
            group: The ranks that share slides: a process group, such as `mesh["sequence"].get_group()`; None for none.

        Raises:
            LongslideError: The encoder's attention pattern is not `dilated`.
        """
        if group is not None and self.spec.pattern != "dilated":
            raise LongslideError(
                f"attention pattern {self.spec.pattern!r} runs on one device: only 'dilated' spreads a slide over several"
            )
        self.sequence_group = group

    def forward(self, tile_features: Tensor, grid_cells: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Embed slides: a batch of one length, or slides of any lengths packed end to end.

        Args:
            tile_features: `(B, N, tile_dim)` tile embeddings, row by row; N at least 1. Packed: `(T, tile_dim)`.
            grid_cells: `(B, N, 2)` integer (column, row) of each tile. Packed: `(T, 2)`.
            cu_seqlens: For packed slides `(B + 1,)` integer: where each slide's tiles begin, and T.

        Returns:
            `(B, width)` slide embeddings.

        Raises:
            LongslideError: Two tiles of a slide in one cell, impossible cells, an empty slide, or shapes that do not fit.
        """
        tile_features, grid_cells, slides = self.pack(tile_features, grid_cells, cu_seqlens)
        tokens = self.encode(self._embed(tile_features, grid_cells, slides), slides.cu_seqlens, slides.shards)
        embeddings = self.pool_tokens(tokens, slides)
        slides.check(self.later)
        return embeddings

    def layer_embeddings(self, tile_features: Tensor, grid_cells: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """The slide embedding after each layer, before it the one of the projected tiles.

        Args:
            tile_features: As for `forward`.
            grid_cells: As for `forward`.
            cu_seqlens: As for `forward`.

        Returns:
            `(layers + 1, B, width)`.

        Raises:
            LongslideError: As for `forward`.
        """
        tile_features, grid_cells, slides = self.pack(tile_features, grid_cells, cu_seqlens)
        x = self._embed(tile_features, grid_cells, slides)
        embeddings = [self.pool_tokens(x, slides)]
        for layer in self.layers:
            x = torch.add(*self._run(layer, x, slides.cu_seqlens, slides.shards))
            embeddings.append(self.pool_tokens(x, slides))
        slides.check(self.later)
        return torch.stack(embeddings)

    def tile_tokens(self, tile_features: Tensor, grid_cells: Tensor, cu_seqlens: Tensor) -> Tensor:
        """The tiles themselves after all layers: what the slide embedding is the mean of.

        Args:
            tile_features: Packed as for `forward`.
            grid_cells: As for `forward`.
            cu_seqlens: As for `forward`.

        Returns:
            `(T, width)`.

        Raises:
            LongslideError: As for `forward`.
        """
        if self.sequence_group is not None:
            raise LongslideError(
                "the tokens of a slide that is spread over several ranks are unavailable; embed it on one"
            )
        tile_features, grid_cells, slides = self.pack(tile_features, grid_cells, cu_seqlens)
        tokens = self.encode(self._embed(tile_features, grid_cells, slides), slides.cu_seqlens)[slides.rows_of_tiles()]
        slides.check(self.later)
        return tokens

    def encode(self, x: Tensor, cu_seqlens: Tensor, shards: SequenceShards | None = None) -> Tensor:
        """`(T, width)` tokens after all layers, of those before them."""
        update: Tensor | None = None
        for layer in self.layers:
            x, update = self._run(layer, x, cu_seqlens, shards, update)
            if self.recomputes():  # of the two only the sum is kept
                x, update = x + update, None
        normed: Tensor = self.layers_norm(x if update is None else x + update)
        return normed

    def _run(
        self,
        layer: nn.Module,
        x: Tensor,
        cu_seqlens: Tensor,
        shards: SequenceShards | None,
        update: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if self.recomputes():
            outputs: tuple[Tensor, Tensor] = recompute(layer, x, cu_seqlens, shards, update, use_reentrant=False)
        else:
            outputs = layer(x, cu_seqlens, shards, update)
        return outputs

    def recomputes(self) -> bool:
        """Whether layers are computed again in the backward."""
        return self.spec.checkpointing and torch.is_grad_enabled()

    def pack(
        self, tile_features: Tensor, grid_cells: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, PackedSlides]:
        """`(T, tile_dim)` and `(T, 2)` of all slides, or of this rank's parts of them, and where they are."""
        group = self.sequence_group
        tile_features, grid_cells, cu_seqlens, lengths = pack_slides(
            tile_features, grid_cells, cu_seqlens, self.spec, parts=group is not None
        )
        device, shards = tile_features.device, None
        if group is not None:  # the first rank has the cls tokens
            shards = SequenceShards.agree([tiles + (group.rank() == 0) for tiles in lengths], group, device)
            if min(shards.totals) == 1:
                raise LongslideError(f"no rank has a tile of slide {shards.totals.index(1) + 1} of {len(lengths)}")
        return tile_features, grid_cells, PackedSlides(lengths, cu_seqlens.to(device), grid_cells, shards)

    def _embed(self, tile_features: Tensor, grid_cells: Tensor, slides: PackedSlides) -> Tensor:
        """The tokens before the layers: each slide's cls token before its tiles."""
        x = self.project(tile_features, grid_cells)
        if len(slides.lengths) == 1:
            return self.prepend_cls(x, slides.cls_tokens)
        if slides.cls_tokens == 0:
            return self.prepend_cls(x, 0)
        return self.insert_cls(x, slides.rows_of_tiles(), slides.cu_seqlens)

    def insert_cls(self, x: Tensor, rows_of_tiles: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Several slides' tokens before the layers, from their projected tiles and the rows where these belong."""
        slides = len(cu_seqlens) - 1
        tokens = x.new_empty(len(x) + slides, self.spec.width).index_copy(0, rows_of_tiles, x)
        cls_tokens = self.cls_token[0].to(x.dtype).expand(slides, -1)
        return tokens.index_copy(0, cu_seqlens[:-1].long(), cls_tokens)

    def prepend_cls(self, x: Tensor, cls_tokens: int = 1) -> Tensor:
        """One slide's tokens before the layers, from its projected tiles; ranks without the cls token take none of it."""
        # A rank without one takes none of it rather than leaves it out: so it has a gradient, of zero, on every rank.
        return torch.cat([self.cls_token[0, :cls_tokens].to(x.dtype), x])

    def project(self, tile_features: Tensor, grid_cells: Tensor) -> Tensor:
        """`(T, width)` of tiles, with their positions added."""
        weight = self.tile_projection.weight
        x = self.tile_projection(tile_features.to(weight.dtype))
        # Under autocast x is half; positions in the dtype of the weights keep the residuals float32, as published.
        return x + grid_positions(grid_cells, self.spec.width, weight.dtype)  # type: ignore[no-any-return]

    def pool_tokens(self, x: Tensor, slides: PackedSlides) -> Tensor:
        """`(B, width)` slide embeddings of the tokens after all layers."""
        if slides.shards is not None:
            parts = torch.split(x, [tiles + slides.cls_tokens for tiles in slides.lengths])
            own = [
                part[: slides.cls_tokens] if self.pool == "cls" else part[slides.cls_tokens :] / (total - 1)
                for part, total in zip(parts, slides.shards.totals, strict=True)
            ]
            pooled = slides.shards.sum(torch.stack([tokens.sum(0) for tokens in own]))
        elif self.pool == "cls":
            pooled = x[slides.cu_seqlens[:-1].long()]
        elif x.is_cuda and len(slides.lengths) > 1 and len(x) <= FEW_TOKENS:  # two launches, not two for each slide
            row = torch.arange(len(x), device=x.device)
            tiles = (row > slides.cu_seqlens[:-1, None]) & (row < slides.cu_seqlens[1:, None])
            with torch.autocast("cuda", enabled=False):
                sums = tiles.to(_at_least_float32(x)) @ x.to(_at_least_float32(x))
            pooled = (sums / tiles.sum(1, keepdim=True)).to(x.dtype)
        else:
            parts = torch.split(x, [tiles + 1 for tiles in slides.lengths])
            pooled = torch.stack([tokens[1:].mean(0) for tokens in parts])
        normed: Tensor = self.norm(pooled)
        return normed


FEW_TOKENS = 32_768
"""Up to which several slides are pooled by one product, whose factors take memory."""


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def layer_pattern_settings(spec: SlideEncoderSpec, layer: int) -> dict[str, int]:
    """The settings of the attention pattern in one of the layers, each of which has random keys of its own."""
    settings = spec.pattern_settings
    if spec.pattern == "random":
        settings["pattern_seed"] = spec.pattern_seed * spec.layers + layer
    return settings


@overload
def create_slide_encoder(
    name: Literal["gigapath", "gigapath-flash", "gigapath-12l1536d", "gigapath-24l1024d"],
    *,
    checkpoint: str | Path | None = None,
    pool: Literal["mean", "cls"] = "mean",
    seed: int = 0,
    **overrides: Any,
) -> SlideEncoder: ...


@overload
def create_slide_encoder(
    name: str | Path,
    *,
    checkpoint: str | Path | None = None,
    pool: Literal["mean", "cls"] = "mean",
    seed: int = 0,
    **overrides: Any,
) -> "SlideEncoder | PublishedSlideEncoder": ...


def create_slide_encoder(
    name: str | Path,
    *,
    checkpoint: str | Path | None = None,
    pool: Literal["mean", "cls"] = "mean",
    seed: int = 0,
    **overrides: Any,
) -> "SlideEncoder | PublishedSlideEncoder":
    """Build a slide encoder with its weights, on the CPU, in float32 and in evaluation mode.

    Args:
        name: A slide encoder of the package (see `list_slide_encoders`), or the path of a YAML file that describes one.
        checkpoint: A weights file as published (or safetensors of the same names), or the word `random` for seeded random
            weights. None takes the published weights from the Hugging Face hub or its cache.
        pool: What the slide embedding of GigaPath's architecture is: the `mean` over the tiles, or the `cls` token.
            GigaPath's cls token was not trained. Other architectures have a pooling of their own.
        seed: Seed of random weights.
        **overrides: Keys of the spec to change, such as `tile_dim` or `dropout`.

    Returns:
        The encoder.

    Raises:
        LongslideError: No such encoder, or its weights are unavailable or do not fit.
    """
    spec = load_slide_encoder_spec(name)
    if isinstance(spec, PublishedSpec):
        from .published import create_published

        if pool != "mean":
            raise LongslideError(f"slide encoder {spec.name!r} has a pooling of its own: leave --pool {pool} out")
        facts = {key: overrides.pop(key) for key in vars(spec).keys() & overrides.keys()}
        spec = replace(spec, **{"arguments": spec.arguments | overrides} | facts)
        return create_published(spec, checkpoint, seed)
    if unknown := set(overrides) - {field.name for field in fields(spec)}:
        raise LongslideError(f"slide encoder {spec.name!r} has no {', '.join(sorted(unknown))}")
    spec = replace(spec, **overrides)
    if checkpoint == "random":
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # not torch.manual_seed: that would also seed the GPUs
            return SlideEncoder(spec, pool, f"random seed={seed}").eval()
    misfit = f"does not fit slide encoder {spec.name!r}"
    if spec.pattern == "learned":
        misfit += " with attention pattern 'learned', whose gates published weights lack: train it from scratch"
        if checkpoint is None:
            raise LongslideError(f"the published checkpoint {misfit}, with the checkpoint `random`")
    file, source = weights_file(spec, checkpoint)
    with torch.device("meta"):
        encoder = SlideEncoder(spec, pool, f"{source} {digest(file)}")
    load_published(encoder, file, f"{source}: {misfit}")
    return encoder.float().eval()
