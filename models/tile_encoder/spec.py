"""What is known of a tile encoder: the facts of one YAML file of `configs/tile_encoders/`, without torch.

This module imports neither torch nor timm, so that `doctor` and the command line can list encoders at once.
"""

import difflib
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from ...errors import LongslideError
from ..spec_file import PositiveFloat, PositiveInt, read_spec

Interpolation = Literal["bilinear", "bicubic"]
Pooling = Literal["cls", "cls+mean", "mean", "timm"]


@dataclass(frozen=True)
class TileEncoderSpec:
    """One tile encoder: the keys of its YAML file.

    A new encoder is a new YAML file, in the package or given by path. Keys without a default must be there; a key that
    is not listed here is refused.

    Attributes:
        name: The name users give; for a file of the package also the stem of the file.
        architecture: Name of the timm model, or `package.module:factory` of what makes the network.
        timm_args: Arguments of `timm.create_model` on top of the architecture's own (`mlp_layer: SwiGLUPacked` and
            `act_layer: silu` stand for the timm classes), or of the factory.
        dim: Length of the embedding.
        resize: The short side of a tile after resizing, in pixels.
        interpolation: `bilinear` or `bicubic`, both antialiased as Pillow does.
        crop: Edge of the centre crop, in pixels: what the network sees.
        mean: Mean of the red, green and blue channel, in 0 to 1.
        std: Standard deviation of the three channels, in 0 to 1.
        pooling: `cls`: the class token; `mean`: the mean of the patch tokens (without class and register tokens);
            `cls+mean`: both, concatenated; `timm`: what the model itself returns.
        precision: Recommended precision of inference: `float32`, `float16` or `bfloat16`.
        tile_mpp: Recommended microns per pixel of the tiles; null if there is none.
        tile_px: Recommended edge of the tiles, in pixels.
        licence: Licence of the weights.
        gated: Whether the hub asks for an account that has accepted the terms.
        paper: Link to the paper.
        hub_id: Repository on the Hugging Face hub, or null if there is none.
        hub_file: Weights file in that repository, where it is neither `model.safetensors` nor `pytorch_model.bin`.
        weights_page: Where weights are to be had that are not on the hub, for the message that asks for them.
        norm_eps: Epsilon of the layer norms where it is not timm's.
    """

    name: str
    architecture: str
    dim: PositiveInt
    resize: PositiveInt
    interpolation: Interpolation
    crop: PositiveInt
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    pooling: Pooling
    precision: Literal["float32", "float16", "bfloat16"]
    tile_mpp: PositiveFloat | None
    tile_px: PositiveInt
    licence: str
    gated: bool
    paper: str
    hub_id: str | None
    hub_file: str | None = None
    weights_page: str = ""
    timm_args: dict[str, Any] = field(default_factory=dict)
    norm_eps: float | None = None

    @classmethod
    def of_network(cls, name: str, dim: int, **facts: Any) -> "TileEncoderSpec":
        """The facts of a network of your own, for `TileEncoder(spec, network)`.

        Args:
            name: The name, recorded in feature files.
            dim: Length of the embedding.
            **facts: Other attributes. By default tiles of 256 px at 0.5 microns per pixel, resized to 224 and normalised as
                for ImageNet, and what the network itself returns, in float32.
        """
        defaults: dict[str, Any] = {
            "architecture": name,
            "resize": facts.get("crop", 224),
            "interpolation": "bicubic",
            "crop": 224,
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "pooling": "timm",
            "precision": "float32",
            "tile_mpp": 0.5,
            "tile_px": 256,
            "licence": "",
            "gated": False,
            "paper": "",
            "hub_id": None,
        }
        return cls(name=name, dim=dim, **defaults | facts)

    def __post_init__(self) -> None:
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, not {self.std}")
        if self.crop > self.resize:
            raise ValueError(f"crop ({self.crop}) must not be larger than resize ({self.resize})")


def list_tile_encoders() -> list[str]:
    """Names of the tile encoders of the package, sorted. Any timm model works too, by its timm name."""
    return sorted(_packaged())


def load_tile_encoder_spec(name: str | Path) -> TileEncoderSpec:
    """Look up a tile encoder.

    Args:
        name: An encoder of the package (see `list_tile_encoders`), the path of a YAML file, or the name of a timm model
            (only then is timm imported).

    Returns:
        The facts of the encoder.

    Raises:
        LongslideError: If there is no such encoder (near matches are named) or the YAML file is not right.
    """
    packaged = _packaged()
    if str(name) in packaged:
        return read_spec(packaged[str(name)], TileEncoderSpec, "tile encoder")
    if Path(name).suffix in (".yaml", ".yml"):
        spec = read_spec(Path(name), TileEncoderSpec, "tile encoder")
        if spec.name in packaged:
            raise LongslideError(
                f"{name}: the name {spec.name!r} is taken by an encoder of the package; choose another."
            )
        return spec
    return _timm_spec(str(name))


def _packaged() -> dict[str, Path]:
    folder = Path(str(files("longslide.configs"))) / "tile_encoders"
    return {path.stem: path for path in folder.glob("*.yaml")}


def _timm_spec(name: str) -> TileEncoderSpec:
    """The spec of any timm model: dimension from the model, transform from its `pretrained_cfg`."""
    if "timm" not in sys.modules and name.partition(".")[0] not in timm_architectures():
        raise _no_such_encoder(name, timm_architectures())

    import timm
    import torch
    from timm.data.config import resolve_data_config

    if not timm.is_model(name):
        raise _no_such_encoder(name, [*timm.list_models(), *timm.list_pretrained()])
    with torch.device("meta"):
        model: Any = timm.create_model(name, pretrained=False, num_classes=0)
    config: Any = model.pretrained_cfg
    transform = resolve_data_config(pretrained_cfg=config)  # type: ignore[no-untyped-call]
    crop = int(transform["input_size"][-1])
    if transform["interpolation"] not in get_args(Interpolation):
        raise LongslideError(
            f"timm model {name!r} resizes by {transform['interpolation']!r}; write a YAML file for it with "
            f"one of {', '.join(get_args(Interpolation))}."
        )
    return TileEncoderSpec(
        name=name,
        architecture=name,
        dim=int(getattr(model, "head_hidden_size", model.num_features)),
        resize=int(crop / transform["crop_pct"]),
        interpolation=transform["interpolation"],
        crop=crop,
        mean=transform["mean"],
        std=transform["std"],
        pooling="timm",
        precision="float32",
        tile_mpp=None,
        tile_px=crop,
        licence=config.get("license") or "see the model card",
        gated=False,
        paper=_paper_link(config),
        hub_id=config.get("hf_hub_id"),
    )


def timm_architectures() -> list[str]:
    """Names of timm's architectures, read from its files: importing timm, and torch with it, takes many seconds."""
    package = find_spec("timm")
    if package is None or package.origin is None:
        return []
    sources = sorted((Path(package.origin).parent / "models").glob("*.py"))
    pattern = re.compile(r"^@register_model\ndef (\w+)\(", re.MULTILINE)
    return [name for source in sources for name in pattern.findall(source.read_text(encoding="utf-8"))]


def _no_such_encoder(name: str, of_timm: Iterable[str]) -> LongslideError:
    near = difflib.get_close_matches(name, [*_packaged(), *of_timm], n=5, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else f"the package has {', '.join(list_tile_encoders())}."
    return LongslideError(f"No tile encoder {name!r}: {hint} The path of a YAML file or any timm model works too.")


def _paper_link(config: dict[str, Any]) -> str:
    paper = config.get("paper_ids") or ""
    first = paper if isinstance(paper, str) else paper[0]
    return first.replace("arXiv:", "https://arxiv.org/abs/")
