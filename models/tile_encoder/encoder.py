"""Pretrained vision transformers that turn tiles into embeddings."""

from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers.mlp import SwiGLUPacked
from torch import Tensor, nn

from ...errors import LongslideError
from .spec import TileEncoderSpec, list_tile_encoders, load_tile_encoder_spec
from .transform import TileTransform
from .weights import load_weights

__all__ = ["TileEncoder", "TileEncoderSpec", "create_tile_encoder", "list_tile_encoders", "load_tile_encoder_spec"]


class TileEncoder(nn.Module):
    """The transform, the network and the pooling of a tile encoder.

    Attributes:
        spec: The facts of the encoder.
        weights: Source and digest of the weights, as recorded in the feature file.
        network: The timm model.
    """

    def __init__(self, spec: TileEncoderSpec, network: nn.Module, weights: str) -> None:
        super().__init__()
        self.spec = spec
        self.weights = weights
        self.network = network
        self.transform = TileTransform(spec.resize, spec.interpolation, spec.crop, spec.mean, spec.std)

    @property
    def dim(self) -> int:
        """Length of the embedding."""
        return self.spec.dim

    def forward(self, tiles: Tensor) -> Tensor:
        """Embed a batch of tiles.

        Args:
            tiles: (B, H, W, 3) uint8 on the device of the network.

        Returns:
            (B, dim) in the precision of the network.

        Raises:
            LongslideError: If the network's embeddings are not of length `spec.dim`.
        """
        images = self.transform(tiles).to(next(self.network.parameters()).dtype)
        embeddings = self._pool(images)
        if embeddings.shape != (len(tiles), self.dim):
            raise LongslideError(
                f"Tile encoder {self.spec.name!r} gives embeddings of shape {tuple(embeddings.shape[1:])}, but its "
                f"`dim` is {self.dim}: correct `dim` or `pooling` in its YAML file."
            )
        return embeddings

    def _pool(self, images: Tensor) -> Tensor:
        network: Any = self.network
        if self.spec.pooling == "timm":
            return network(images)  # type: ignore[no-any-return]
        tokens: Tensor = network.forward_features(images)
        if self.spec.pooling == "cls":
            return tokens[:, 0]
        mean = tokens[:, network.num_prefix_tokens :].mean(dim=1)
        return mean if self.spec.pooling == "mean" else torch.cat([tokens[:, 0], mean], dim=-1)


def create_tile_encoder(name: str | Path, *, checkpoint: str | Path | None = None, seed: int = 0) -> TileEncoder:
    """Build a tile encoder with its weights, on the CPU, in float32 and in evaluation mode.

    Args:
        name: An encoder of the package (see `list_tile_encoders`), the path of a YAML file, or the name of a timm
            model.
        checkpoint: A weights file (safetensors, or a state dict of torch), a folder as the hub lays it out, or the word
            `random` for seeded random weights. None takes the published weights from the Hugging Face hub or its cache.
        seed: Seed of random weights.

    Returns:
        The encoder.

    Raises:
        LongslideError: If the encoder is not known, its YAML file is wrong, or its weights cannot be had or do not fit.
    """
    spec = load_tile_encoder_spec(name)
    if checkpoint == "random":
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # not torch.manual_seed: that would also seed the GPUs
            network = build_network(spec)
        return TileEncoder(spec, network, f"random seed={seed}").eval()
    with torch.random.fork_rng(devices=[]):
        with torch.device("meta"):
            network = build_network(spec)
        if any(True for _ in network.buffers()):  # buffers that a checkpoint does not hold must be computed
            network = build_network(spec)
    weights = load_weights(network, spec, None if checkpoint is None else Path(checkpoint))
    return TileEncoder(spec, network.float(), weights).eval()


def build_network(spec: TileEncoderSpec) -> nn.Module:
    """The timm model of a spec, with the initial weights timm draws, on the current default device.

    Raises:
        LongslideError: If timm cannot build it, or it does not take tiles of `spec.crop` pixels.
    """
    arguments = dict(spec.timm_args)
    if arguments.get("mlp_layer") == "SwiGLUPacked":
        arguments["mlp_layer"] = SwiGLUPacked
    try:
        network: nn.Module = timm.create_model(spec.architecture, pretrained=False, num_classes=0, **arguments)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise LongslideError(
            f"Tile encoder {spec.name!r}: timm cannot build {spec.architecture} with timm_args "
            f"{spec.timm_args}: {reason}"
        ) from error
    if spec.norm_eps is not None:
        for module in network.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = spec.norm_eps
    embed: Any = getattr(network, "patch_embed", None)
    if getattr(embed, "strict_img_size", False) and tuple(embed.img_size) != (spec.crop, spec.crop):
        raise LongslideError(
            f"Tile encoder {spec.name!r}: `crop` is {spec.crop}, but {spec.architecture} takes {embed.img_size[0]}; "
            "set `img_size` or `dynamic_img_size: true` in timm_args."
        )
    if spec.pooling != "timm" and not hasattr(network, "num_prefix_tokens"):
        raise LongslideError(f"Tile encoder {spec.name!r}: pooling {spec.pooling!r} needs a ViT; use `pooling: timm`.")
    return network
