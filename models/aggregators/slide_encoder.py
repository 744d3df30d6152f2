"""A slide encoder as an aggregator: LongNet from scratch, or a pretrained checkpoint to fine-tune."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...errors import LongslideError
from ..slide_encoder.base import from_architecture, read_pretrained
from ..slide_encoder.cuda_graphs import GraphedEncoder
from ..slide_encoder.encoder import SlideEncoder, create_slide_encoder
from ..slide_encoder.published import PublishedSlideEncoder
from ..slide_encoder.spec import Pattern, SlideEncoderSpec, load_longnet_spec
from .base import Aggregator


class SlideEncoderAggregator(Aggregator):
    """A slide encoder whose final output, or the concatenated outputs of some layers, are the bag's vector.

    Args:
        encoder: The slide encoder. Layers after the last one used are cut off.
        layers: Layers whose vectors are concatenated, 0 being the projected tiles; none for the final output.
        frozen: Whether the encoder stays as it is, without dropout too.
    """

    encoder: SlideEncoder | PublishedSlideEncoder

    def __init__(
        self, encoder: SlideEncoder | PublishedSlideEncoder, layers: tuple[int, ...] = (), frozen: bool = False
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.layers = tuple(layers)
        self.frozen = frozen
        self.width = encoder.width * max(1, len(layers))
        self.spec = asdict(encoder.spec) | {"weights": encoder.weights}
        if layers:
            assert isinstance(encoder, SlideEncoder)
            depth = len(encoder.layers)
            if any(not 0 <= layer <= depth for layer in layers):
                raise LongslideError(
                    f"slide encoder {encoder.name!r} has the layers 0 (the projected tiles) to {depth}, not {list(layers)}"
                )
            # What takes no part would have no gradient, which distributed training takes for a mistake.
            encoder.layers = encoder.layers[: max(layers)]
            encoder.layers_norm.requires_grad_(False)
        if frozen:
            encoder.requires_grad_(False)
        self._graphed: GraphedEncoder | None = None
        self.train()

    def use_cuda_graphs(self) -> None:
        """Replay the encoder of short bags as CUDA graphs from now on; called again, make them anew."""
        if isinstance(self.encoder, SlideEncoder):
            self._graphed = GraphedEncoder(self.encoder)

    def train(self, mode: bool = True) -> "SlideEncoderAggregator":
        """Training or evaluation mode; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def architecture(self) -> dict[str, Any]:
        """The spec of the encoder, and where its first weights came from."""
        return dict(self.spec)

    def use_features_of(self, tile_encoder: str) -> None:
        """See `Aggregator.use_features_of`; one from scratch remembers it."""
        wanted = self.encoder.spec.tile_encoder
        if wanted and wanted != tile_encoder:
            raise LongslideError(
                f"{self.encoder.weights}: trained on features of tile encoder {wanted!r}, but these are of "
                f"{tile_encoder!r}; embed the slides with the same encoder, or train from scratch"
            )
        if not wanted:
            self.encoder.spec = replace(self.encoder.spec, tile_encoder=tile_encoder)
            self.spec["tile_encoder"] = tile_encoder

    def forward(self, tile_features: Tensor, grid_cells: Tensor, cu_seqlens: Tensor) -> Tensor:
        """See `Aggregator.forward`."""
        if not self.layers:
            # A replica of DataParallel has another encoder than the graphs.
            graphed = self._graphed is not None and self._graphed.encoder is self.encoder
            run: Any = self._graphed if graphed else self.encoder
            embeddings: Tensor = run(tile_features, grid_cells, cu_seqlens)
            return embeddings
        assert isinstance(self.encoder, SlideEncoder)
        every = self.encoder.layer_embeddings(tile_features, grid_cells, cu_seqlens)
        return torch.cat([every[layer] for layer in self.layers], dim=1)


def use_cuda_graphs(model: nn.Module) -> None:
    """Let the slide encoders of a model replay short bags as CUDA graphs, whose kernels take less time than their launches.

    The jobs do this for the models that they build; see `GraphedEncoder` for what it asks of a model.
    """
    for module in model.modules():
        if isinstance(module, SlideEncoderAggregator):
            module.use_cuda_graphs()


class LongNetAggregator(SlideEncoderAggregator):
    """LongNet from scratch, of any size, or from a checkpoint of masked autoencoding, which brings its own size.

    Args:
        feature_dim: Length of a tile embedding.
        layers: LongNet layers.
        width: Width of the tokens and of the bag's vector; a multiple of 4 and of `heads`.
        heads: Attention heads.
        ffn_width: Width of the feed-forward networks.
        dilated_ratios: Dilated ratio of each branch of the attention.
        max_wsi_size: Edge of the largest slide in pixels of the tiles; with `tile_size` it sets the longest segment.
        tile_size: Edge of a tile in pixels.
        pool: What the bag's vector is: the `mean` over the tiles, or the `cls` token.
        dropout: Share of values dropped in training.
        drop_path: Share of bags for which the last layer's halves are left out in training; less before it.
        checkpointing: Whether layers are computed again in the backward, for memory.
        pattern: Which keys a token sees: `dilated`, which is LongNet, or to compare with it `dense`, `sliding-window`,
            `strided`, `random` or `learned`.
        window: Tokens seen on either side, for `sliding-window`, and if wanted for `random`.
        period: Distance of the keys from one another, for `strided`.
        random_keys: Random keys of each token, for `random`.
        global_tokens: First tokens that see all and that all see, for `random`; the very first is the cls token.
        pattern_seed: Which random keys, for `random`.
        block_size: Tokens of a block, for `learned`.
        chosen_blocks: Blocks that each block chooses to see besides itself, for `learned`.
        checkpoint: A checkpoint of `longslide pretrain` to begin with, whose pattern stays; none or `random` for random
            weights.
        architecture: What `architecture()` of the trained module said: to build it again, without weights.

    Raises:
        LongslideError: The checkpoint does not fit the features, or is none.
    """

    learning_rate = 4e-4

    def __init__(
        self,
        feature_dim: int,
        layers: int = 4,
        width: int = 256,
        heads: int = 8,
        ffn_width: int = 1024,
        dilated_ratios: tuple[int, ...] = (1, 2, 4, 8, 16),
        max_wsi_size: int = 262144,
        tile_size: int = 256,
        pool: Literal["mean", "cls"] = "mean",
        dropout: float = 0.1,
        drop_path: float = 0.0,
        checkpointing: bool = False,
        pattern: Pattern = "dilated",
        window: int = 0,
        period: int = 0,
        random_keys: int = 0,
        global_tokens: int = 0,
        pattern_seed: int = 0,
        block_size: int = 0,
        chosen_blocks: int = 0,
        checkpoint: str | None = None,
        architecture: Mapping[str, Any] | None = None,
    ) -> None:
        regularisation: dict[str, Any] = {
            "dropout": dropout,
            "drop_path": drop_path,
            "checkpointing": checkpointing,
        }
        if architecture is not None:
            encoder = from_architecture(architecture, pool)
        elif checkpoint is not None and checkpoint != "random":
            encoder = _pretrained(Path(checkpoint), feature_dim, pool, regularisation)
        else:
            spec = SlideEncoderSpec(
                name="longnet",
                hub_id=None,
                hub_file=None,
                tile_encoder="",
                tile_dim=feature_dim,
                layers=layers,
                width=width,
                heads=heads,
                ffn_width=ffn_width,
                dilated_ratios=tuple(dilated_ratios),
                max_wsi_size=max_wsi_size,
                tile_size=tile_size,
                licence="",
                gated=False,
                paper="https://arxiv.org/abs/2307.02486",
                pattern=pattern,
                window=window,
                period=period,
                random_keys=random_keys,
                global_tokens=global_tokens,
                pattern_seed=pattern_seed,
                block_size=block_size,
                chosen_blocks=chosen_blocks,
                **regularisation,
            )
            encoder = SlideEncoder(spec, pool, "random")
        super().__init__(encoder)

    @property
    def options(self) -> dict[str, Any]:
        """The options, with the size that the encoder has: a checkpoint's comes before the constructor's."""
        given = super().options
        return given | {name: self.spec[name] for name in given.keys() & self.spec.keys()}


class GigaPathAggregator(SlideEncoderAggregator):
    """A pretrained slide encoder, frozen or to fine-tune.

    Args:
        feature_dim: Length of a tile embedding.
        slide_encoder: Name of the slide encoder, or path of its YAML file.
        pool: What a layer's vector is: the `mean` over the tiles, or the `cls` token.
        layers: Layers whose vectors are concatenated, 0 being the projected tiles; none for the encoder's final output.
            GigaPath's fine-tuning uses 11 alone, or 5 and 11.
        frozen: Whether the encoder stays as it is and only the head is trained.
        dropout: Share of values dropped in training.
        drop_path: Share of bags for which the last layer's halves are left out in training; less before it.
        checkpointing: Whether layers are computed again in the backward, for memory.
        checkpoint: Weights as published, a checkpoint of `longslide pretrain`, or the word `random`; none takes the
            published weights from the hub or its cache.
        architecture: What `architecture()` of the trained module said: to build it again, without weights.

    Raises:
        LongslideError: The weights are unavailable, or do not fit the features.
    """

    learning_rate = 1.25e-4

    def __init__(
        self,
        feature_dim: int,
        slide_encoder: str = "gigapath",
        pool: Literal["mean", "cls"] = "mean",
        layers: tuple[int, ...] = (),
        frozen: bool = False,
        dropout: float = 0.1,
        drop_path: float = 0.0,
        checkpointing: bool = False,
        checkpoint: str | None = None,
        architecture: Mapping[str, Any] | None = None,
    ) -> None:
        regularisation: dict[str, Any] = {
            "dropout": dropout,
            "drop_path": drop_path,
            "checkpointing": checkpointing,
        }
        if architecture is not None:
            encoder = from_architecture(architecture, pool)
        elif checkpoint is not None and Path(checkpoint).suffix == ".ckpt":
            encoder = _pretrained(Path(checkpoint), feature_dim, pool, regularisation)
        else:
            load_longnet_spec(slide_encoder)
            if checkpoint == "random":
                regularisation |= {"tile_dim": feature_dim, "tile_encoder": ""}
            encoder = create_slide_encoder(slide_encoder, checkpoint=checkpoint, pool=pool, **regularisation)
            check_length(encoder, feature_dim)
        super().__init__(encoder, tuple(layers), frozen)


def _pretrained(
    file: Path, feature_dim: int, pool: Literal["mean", "cls"], regularisation: Mapping[str, Any]
) -> SlideEncoder:
    """The slide encoder of a masked autoencoder's checkpoint, to train further."""
    encoder = read_pretrained(file, pool, **regularisation).train()
    check_length(encoder, feature_dim)
    return encoder


def check_length(encoder: SlideEncoder | PublishedSlideEncoder, feature_dim: int) -> None:
    """Refuse features of another length than a slide encoder reads.

    Raises:
        LongslideError: They are.
    """
    if encoder.spec.tile_dim != feature_dim:
        raise LongslideError(
            f"{encoder.weights}: reads tile embeddings of length {encoder.spec.tile_dim}, but the features have "
            f"{feature_dim}"
        )
