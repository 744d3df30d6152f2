"""Pretrained vision transformers that turn tiles into embeddings."""

from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.config import resolve_data_config
from timm.layers.mlp import SwiGLUPacked
from torch import Tensor, nn

from ...errors import LongslideError
from ...registry import call_factory, is_factory
from ..checkpoint_file import digest_of_tensors
from .spec import TileEncoderSpec, list_tile_encoders, load_tile_encoder_spec
from .transform import TileTransform
from .weights import load_weights

__all__ = ["TileEncoder", "TileEncoderSpec", "create_tile_encoder", "list_tile_encoders", "load_tile_encoder_spec"]


class TileEncoder(nn.Module):
    """The transform, the network and the pooling of a tile encoder.

    Args:
        spec: The facts of the encoder.
        network: What maps `(B, 3, crop, crop)` normalised images to embeddings: a timm model, or with `pooling: timm` any
            module that gives `(B, dim)`.
        weights: Source and digest of the weights; by default the digest of the network's tensors.

    Attributes:
        weights: Source and digest of the weights, as recorded in the feature file.
    """

    def __init__(self, spec: TileEncoderSpec, network: nn.Module, weights: str | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.weights = f"{type(network).__name__} {digest_of_tensors(network)}" if weights is None else weights
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
        images = self.transform(tiles)
        parameter = next(self.network.parameters(), None)
        images = images if parameter is None else images.to(parameter.dtype)
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


def create_tile_encoder(
    name: str | Path | nn.Module, *, checkpoint: str | Path | None = None, seed: int = 0
) -> TileEncoder:
    """Build a tile encoder with its weights, on the CPU, in float32 and in evaluation mode.

    Args:
        name: An encoder of the package (see `list_tile_encoders`), the path of a YAML file, the name of a timm model,
            `package.module:factory`, or a module. A factory is called with those of `checkpoint` and `seed` that it takes,
            and makes a `TileEncoder` or a module (see `tile_encoder_of`), whose precision and device are left as they are.
        checkpoint: A weights file (safetensors, or a state dict of torch), a folder as the hub lays it out, or the word
            `random` for seeded random weights. None takes the published weights from the Hugging Face hub or its cache.
        seed: Seed of random weights.

    Returns:
        The encoder.

    Raises:
        LongslideError: If the encoder is not known, its YAML file is wrong, or its weights are unavailable or do not fit.
    """
    if isinstance(name, nn.Module):
        if checkpoint is not None:
            raise LongslideError(
                f"a tile encoder given as a module has its weights: leave out the checkpoint {checkpoint}"
            )
        return tile_encoder_of(name, type(name).__name__)
    if is_factory(name):
        what, given = f"tile encoder {name!r}", {"checkpoint": checkpoint, "seed": seed}
        made = call_factory(str(name), what, given, option="--tile-checkpoint")
        if not isinstance(made, nn.Module):
            raise LongslideError(f"{what}: makes a {type(made).__name__}, and neither a TileEncoder nor a torch module")
        return tile_encoder_of(made, str(name))
    spec = load_tile_encoder_spec(name)
    if is_factory(spec.architecture) and checkpoint is None and spec.hub_id is None and not spec.weights_page:
        return TileEncoder(spec, build_network(spec)).eval()  # the factory loads its own weights
    if checkpoint == "random":
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # not torch.manual_seed: that would also seed the GPUs
            network = build_network(spec)
        return TileEncoder(spec, network, f"random seed={seed}").eval()
    with torch.random.fork_rng(devices=[]):
        foreign = is_factory(spec.architecture) and not spec.architecture.startswith("longslide.")
        with torch.device("cpu" if foreign else "meta"):
            network = build_network(spec)
        if any(
            buffer.is_meta for buffer in network.buffers()
        ):  # those that a checkpoint does not hold must be computed
            network = build_network(spec)
    weights = load_weights(network, spec, None if checkpoint is None else Path(checkpoint))
    return TileEncoder(spec, network.float(), weights).eval()


def tile_encoder_of(module: nn.Module, name: str) -> TileEncoder:
    """A module as a tile encoder, in evaluation mode.

    What a `TileEncoder` says of itself is taken as it is. Of a timm model the transform is timm's; any other module gets
    tiles of 224 px at 0.5 microns per pixel, normalised as for ImageNet: make a `TileEncoder` where it wants something else.

    Raises:
        LongslideError: The module does not map `(B, 3, H, W)` images to `(B, dim)` embeddings.
    """
    if isinstance(module, TileEncoder):
        return module.eval()
    module.eval()
    facts: dict[str, Any] = {"tile_px": 224}
    config = getattr(module, "pretrained_cfg", None)
    if config:
        transform = resolve_data_config(pretrained_cfg=config)  # type: ignore[no-untyped-call]
        crop = int(transform["input_size"][-1])
        facts = {name: transform[name] for name in ("mean", "std", "interpolation")}
        facts |= {"crop": crop, "resize": int(crop / transform["crop_pct"]), "tile_px": crop}
    crop = facts.get("crop", 224)
    parameter = next(module.parameters(), torch.empty(0))
    try:
        with torch.inference_mode():
            shape = module(torch.zeros(2, 3, crop, crop, dtype=parameter.dtype, device=parameter.device)).shape
        if len(shape) != 2 or shape[0] != 2:
            raise RuntimeError(f"it gives {tuple(shape)}")
    except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise LongslideError(
            f"tile encoder {name!r}: the module does not map (2, 3, {crop}, {crop}) images to (2, dim) embeddings "
            f"({reason}); make a TileEncoder of it, with a TileEncoderSpec"
        ) from error
    return TileEncoder(TileEncoderSpec.of_network(name, shape[1], **facts), module).eval()


def build_network(spec: TileEncoderSpec) -> nn.Module:
    """The network of a spec: a timm model with the initial weights timm draws, on the current default device.

    Raises:
        LongslideError: If it cannot be built, or does not take tiles of `spec.crop` pixels.
    """
    if is_factory(spec.architecture):
        what = f"Tile encoder {spec.name!r}"
        made = call_factory(spec.architecture, what, spec.timm_args, required=True)
        if not isinstance(made, nn.Module):
            raise LongslideError(f"{what}: {spec.architecture} makes a {type(made).__name__}, not a torch module")
        return made
    arguments = dict(spec.timm_args)
    if arguments.get("mlp_layer") == "SwiGLUPacked":
        arguments["mlp_layer"] = SwiGLUPacked
    try:
        network: nn.Module = timm.create_model(spec.architecture, pretrained=False, **{"num_classes": 0} | arguments)
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
