"""What the tile encoder ran in, and how far that is from float32, stands in the feature files."""

from pathlib import Path

import h5py
import pytest
import torch
from longslide import embed
from longslide.data.synthetic import write_synthetic_slide
from longslide.models.tile_encoder import engine
from torch import nn


@pytest.fixture
def float8_in(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A CPU has no float8: that it has is only said, and the layers are the given ones."""
    monkeypatch.setattr(engine, "has_float8", lambda device: True)
    monkeypatch.setattr(engine, "product_dtype", lambda device: torch.float16)
    return monkeypatch


def in_float16(linear: nn.Linear, dtype: torch.dtype) -> nn.Linear:
    layer = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, dtype=dtype)
    layer.load_state_dict(linear.state_dict())
    return layer


def in_an_eighth(linear: nn.Linear, dtype: torch.dtype) -> nn.Linear:
    layer = in_float16(linear, dtype)
    layer.weight.data = (layer.weight.data * 8 / layer.weight.data.abs().max()).round() / 8
    return layer


def embed_in_float8(folder: Path) -> str:
    write_synthetic_slide(folder / "a.svs", size=(1024, 1024), mpp=0.5)
    return embed([folder / "a.svs"], folder / "features", "vit_tiny_patch16_224", "random", precision="float8")[
        0
    ].reason


def test_how_far_float8_is_from_float32_is_written_into_the_feature_file(
    tmp_path: Path, float8_in: pytest.MonkeyPatch
) -> None:
    float8_in.setattr(engine, "Float8Linear", in_float16)
    assert embed_in_float8(tmp_path) == ""
    with h5py.File(tmp_path / "features" / "a.h5") as file:
        attributes = file["coords"].attrs
        assert file["features"].attrs["precision"] == "float8"
        assert 0.9999 < attributes["fidelity_least_cosine"] <= attributes["fidelity_mean_cosine"] < 1.00001
        assert 1 <= attributes["fidelity_tiles"] <= len(file["coords"])


def test_float8_that_is_too_coarse_for_a_slide_leaves_no_file(tmp_path: Path, float8_in: pytest.MonkeyPatch) -> None:
    float8_in.setattr(engine, "Float8Linear", in_an_eighth)
    assert "too coarse" in embed_in_float8(tmp_path)
    assert not (tmp_path / "features" / "a.h5").exists()
