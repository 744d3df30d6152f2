"""A slide encoder as an aggregator: LongNet from scratch, or a pretrained checkpoint to fine-tune."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import LongslideError
from ..slide_encoder.base import from_architecture, read_pretrained
from ..slide_encoder.cuda_graphs import GraphedEncoder
from ..slide_encoder.encoder import SlideEncoder, create_slide_encoder
from ..slide_encoder.spec import SlideEncoderSpec
from .base import Aggregator
from .options import GigaPathOptions, LongNetOptions


class SlideEncoderAggregator(Aggregator):
    """A slide encoder whose final output, or the concatenated outputs of some layers, are the bag's vector.

    Args:
        encoder: The slide encoder. Layers after the last one used are cut off.
        layers: Layers whose vectors are concatenated, 0 being the projected tiles; none for the final output.
        frozen: Whether the encoder stays as it is, without dropout too.
    """

    def __init__(self, encoder: SlideEncoder, layers: tuple[int, ...] = (), frozen: bool = False) -> None:
        super().__init__()
        depth = len(encoder.layers)
        if any(not 0 <= layer <= depth for layer in layers):
            raise LongslideError(
                f"slide encoder {encoder.name!r} has the layers 0 (the projected tiles) to {depth}, not {list(layers)}"
            )
        self.encoder = encoder
        self.layers = tuple(layers)
        self.frozen = frozen
        self.width = encoder.spec.width * max(1, len(layers))
        self.spec = asdict(encoder.spec) | {"weights": encoder.weights}
        if layers:
            # What takes no part would have no gradient, which distributed training takes for a mistake.
            encoder.layers = encoder.layers[: max(layers)]
            encoder.layers_norm.requires_grad_(False)
        if frozen:
            encoder.requires_grad_(False)
        self._graphed: GraphedEncoder | None = None
        self.train()

    def use_cuda_graphs(self) -> None:
        """Replay the encoder of short bags as CUDA graphs from now on; called again, make them anew."""
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

    def forward(self, tile_features: Tensor, grid_cells: Tensor, cu_seqlens: Tensor) -> Tensor:
        """See `Aggregator.forward`."""
        if not self.layers:
            # A replica of DataParallel has another encoder than the graphs.
            graphed = self._graphed is not None and self._graphed.encoder is self.encoder
            run: Any = self._graphed if graphed else self.encoder
            embeddings: Tensor = run(tile_features, grid_cells, cu_seqlens)
            return embeddings
        every = self.encoder.layer_embeddings(tile_features, grid_cells, cu_seqlens)
        return torch.cat([every[layer] for layer in self.layers], dim=1)


def use_cuda_graphs(model: nn.Module) -> None:
    """Let the slide encoders of a model replay short bags as CUDA graphs, whose kernels take less time than their launches.

    The jobs do this for the models that they build; see `GraphedEncoder` for what it asks of a model.
    """
    for module in model.modules():
        if isinstance(module, SlideEncoderAggregator):
            module.use_cuda_graphs()


def create_longnet(
    feature_dim: int,
    options: LongNetOptions,
    checkpoint: str | Path | None,
    tile_encoder: str | None,
    architecture: Mapping[str, Any] | None = None,
) -> SlideEncoderAggregator:
    """LongNet from scratch, of any size, or from a checkpoint of masked autoencoding.

    Args:
        feature_dim: Length of a tile embedding.
        options: Its options.
        checkpoint: A checkpoint that `longslide fit` wrote with the masked autoencoder; None for random weights.
        tile_encoder: The tile encoder that made the features, if known.
        architecture: What `architecture()` of the trained module said: to build it again, without weights.

    Raises:
        LongslideError: The checkpoint does not fit the features, or is none.
    """
    if architecture is not None:
        return SlideEncoderAggregator(from_architecture(architecture, options.pool))
    if checkpoint is not None and checkpoint != "random":
        encoder = load_pretrained(Path(checkpoint), options)
        check_features(encoder, checkpoint, feature_dim, tile_encoder)
        return SlideEncoderAggregator(encoder)
    size = {key: value for key, value in asdict(options).items() if key != "pool"}
    spec = SlideEncoderSpec(
        name="longnet",
        hub_id=None,
        hub_file=None,
        tile_encoder=tile_encoder or "",
        tile_dim=feature_dim,
        licence="",
        gated=False,
        paper="https://arxiv.org/abs/2307.02486",
        **size,
    )
    return SlideEncoderAggregator(SlideEncoder(spec, options.pool, "random"))


def create_gigapath(
    feature_dim: int,
    options: GigaPathOptions,
    checkpoint: str | Path | None,
    tile_encoder: str | None,
    architecture: Mapping[str, Any] | None = None,
) -> SlideEncoderAggregator:
    """A pretrained slide encoder, frozen or to fine-tune.

    Args:
        feature_dim: Length of a tile embedding.
        options: Its options.
        checkpoint: Weights as published, a checkpoint of masked autoencoding, or the word `random`; None takes the published
            weights from the hub or its cache.
        tile_encoder: The tile encoder that made the features, if known.
        architecture: What `architecture()` of the trained module said: to build it again, without weights.

    Raises:
        LongslideError: The weights cannot be had, or do not fit the features.
    """
    if architecture is not None:
        encoder = from_architecture(architecture, options.pool)
    elif checkpoint is not None and Path(checkpoint).suffix == ".ckpt":
        encoder = load_pretrained(Path(checkpoint), options)
        check_features(encoder, checkpoint, feature_dim, tile_encoder)
    else:
        overrides: dict[str, Any] = {name: getattr(options, name) for name in ("dropout", "drop_path", "checkpointing")}
        if checkpoint == "random":
            overrides["tile_dim"] = feature_dim
        encoder = create_slide_encoder(options.slide_encoder, checkpoint=checkpoint, pool=options.pool, **overrides)
        if checkpoint != "random":
            check_features(encoder, checkpoint or encoder.weights, feature_dim, tile_encoder)
    return SlideEncoderAggregator(encoder, options.layers, options.frozen)


def load_pretrained(file: Path, options: LongNetOptions | GigaPathOptions) -> SlideEncoder:
    """The slide encoder of a masked autoencoder's checkpoint, to train further; see `read_pretrained`."""
    regularisation = {name: getattr(options, name) for name in ("dropout", "drop_path", "checkpointing")}
    return read_pretrained(file, options.pool, **regularisation).train()


def check_features(encoder: SlideEncoder, checkpoint: str | Path, feature_dim: int, tile_encoder: str | None) -> None:
    """Refuse features that the checkpoint was not trained on.

    Args:
        encoder: The slide encoder with the checkpoint's weights.
        checkpoint: The checkpoint, for the message.
        feature_dim: Length of a tile embedding.
        tile_encoder: The tile encoder that made the features, if known.

    Raises:
        LongslideError: They are of another tile encoder, or of another length.
    """
    wanted = encoder.spec.tile_encoder
    if wanted and tile_encoder and wanted != tile_encoder:
        raise LongslideError(
            f"{checkpoint}: trained on features of tile encoder {wanted!r}, but these are of {tile_encoder!r}; "
            "embed the slides with the same encoder, or train from scratch"
        )
    if encoder.spec.tile_dim != feature_dim:
        raise LongslideError(
            f"{checkpoint}: reads tile embeddings of length {encoder.spec.tile_dim}, but the features have {feature_dim}"
        )
