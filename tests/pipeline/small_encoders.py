"""Small networks and weights in place of the published ones, so that commands of the documentation run as they stand."""

import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from longslide import create_slide_encoder, create_tile_encoder
from longslide.models.slide_encoder import checkpoint as slide_weights
from longslide.models.slide_encoder import spec as slide_specs
from longslide.models.tile_encoder import spec as tile_specs
from longslide.models.tile_encoder import weights as tile_weights
from torch import Tensor, nn

SMALL_SLIDE_ENCODERS: dict[str, dict[str, Any]] = {
    "gigapath": {"layers": 12, "width": 16, "heads": 4, "ffn_width": 16},
    "titan": {"layers": 1, "width": 48, "heads": 12, "pool_heads": 8, "ffn_width": 16},
    "moozy": {"layers": 1, "ffn_width": 16},
    "feather": {"width": 16, "attention_width": 8},
}
"""The sizes of slide encoders, by name or architecture; of the others the published ones stay."""


class SmallNetwork(nn.Module):
    """A linear layer on a thumbnail of 4 x 4 pixels: `(B, 3, H, W)` to `(B, dim)`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layer = nn.Linear(48, dim)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(nn.functional.adaptive_avg_pool2d(images, 4).flatten(1))

    @staticmethod
    def from_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state


def use_small_encoders(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let the encoders of the package be small ones of the same names and dimensions, and the hub have weights of them."""
    configs = Path(str(files("longslide.configs")))
    for kind in ("tile_encoders", "slide_encoders"):
        (folder / kind).mkdir(parents=True)
        for path in (configs / kind).glob("*.yaml"):
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
            if kind == "tile_encoders":
                content |= {"architecture": "small_encoders:SmallNetwork", "timm_args": {"dim": content["dim"]}}
                content["pooling"] = "timm"
            else:
                architecture = content.get("architecture", "gigapath")
                sizes = content["arguments"] if "architecture" in content else content
                sizes.update(SMALL_SLIDE_ENCODERS.get(architecture, {}))
            (folder / kind / path.name).write_text(yaml.safe_dump(content))
    packaged = {path.stem: path for path in (folder / "tile_encoders").glob("*.yaml")}
    monkeypatch.setattr(tile_specs, "_packaged", lambda: packaged)
    monkeypatch.setattr(slide_specs, "_folder", lambda: folder / "slide_encoders")

    def download(what: str, hub_id: str, names: Sequence[str], **_: object) -> tuple[Path, str]:
        kind, name = re.fullmatch(r"(Tile|Slide) encoder '(.*)'", what).groups()
        file = folder / "hub" / hub_id / names[0]
        if not file.exists():
            save_weights(kind, name, file)
        return file, f"hf:{hub_id}@small"

    monkeypatch.setattr(tile_weights, "download", download)
    monkeypatch.setattr(slide_weights, "download", download)


def save_weights(kind: str, name: str, file: Path) -> None:
    """Random weights of an encoder in the layout of its publisher."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if kind == "Tile":
        state = create_tile_encoder(name, checkpoint="random").network.state_dict()
    else:
        state = slide_weights.to_published(create_slide_encoder(name, checkpoint="random"))
    if file.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file({key: value.contiguous().clone() for key, value in state.items()}, file)
    else:
        torch.save(state, file)
