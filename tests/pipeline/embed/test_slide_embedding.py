"""Slide embeddings from tile embeddings that exist, ours and those of other tools."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from classifier_files import ENCODER
from longslide import Features, LongslideError, create_slide_encoder, embed, read_features, write_synthetic_slide
from longslide.data.features.feature_file import write_features
from longslide.data.features.preprocessing import Preprocessing
from longslide.pipeline.cli import main
from longslide.pipeline.embed.slide_embedding import unlike_recommended

OPTIONS: dict[str, Any] = {"slide_encoder": "gigapath", "slide_checkpoint": "random", "device": "cpu"}


@pytest.fixture(autouse=True)
def _two_narrow_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """GigaPath's slide encoder with two narrow layers, for time."""
    from longslide.models.slide_encoder import encoder

    whole = encoder.load_slide_encoder_spec

    def two_layers(name: str) -> Any:
        return dataclasses.replace(whole(name), layers=2, width=64, heads=4, ffn_width=64)

    monkeypatch.setattr(encoder, "load_slide_encoder_spec", two_layers)


def write_tiles(path: Path, dim: int = 48, **more: Any) -> Features:
    column, row = np.meshgrid(np.arange(5), np.arange(3))
    content: dict[str, Any] = {
        "features": np.random.default_rng(0).normal(size=(15, dim)).astype(np.float16),
        "coords": np.stack([column.ravel(), row.ravel()], 1) * 512,
        "step_level0": 512,
        "tile_size_level0": 512,
        "tile_px": 256,
        "overlap": 0,
        "encoder": "gigapath",
    }
    features = Features(slide_id=path.stem, **content | more)
    path.parent.mkdir(exist_ok=True)
    write_features(path, features)
    return features


def test_they_are_those_that_one_command_makes_from_the_slides(tmp_path: Path) -> None:
    encoder = tmp_path / "tiny.yaml"
    encoder.write_text(ENCODER)
    (tmp_path / "slides").mkdir()
    for name in ("a", "b"):
        write_synthetic_slide(tmp_path / "slides" / f"{name}.svs", size=(1024, 768), seed=ord(name))
    tiles = {"tile_encoder": encoder, "tile_checkpoint": "random", "device": "cpu"}
    embed([tmp_path / "slides"], tmp_path / "at-once", **tiles | OPTIONS)
    embed([tmp_path / "slides"], tmp_path / "features", **tiles)
    before = (tmp_path / "features" / "summary.csv").read_text()
    results = embed([tmp_path / "features"], tmp_path / "features", **OPTIONS)
    assert [(one.slide_id, one.status) for one in results] == [("a", "done"), ("b", "done")]
    assert results[0].slide == str(tmp_path / "slides" / "a.svs")
    assert before.splitlines()[0] == (tmp_path / "features" / "summary.csv").read_text().splitlines()[0]
    for name in ("a", "b"):
        one, other = (read_features(tmp_path / folder / f"{name}.h5") for folder in ("at-once", "features"))
        np.testing.assert_array_equal(one.slide_embedding, other.slide_embedding)
        np.testing.assert_array_equal(one.features, other.features)
        assert (one.slide_encoder, one.slide_weights, one.pool) == ("gigapath", "random seed=0", "mean")
        assert (other.slide_encoder, other.slide_weights, other.pool) == ("gigapath", "random seed=0", "mean")
        assert one.slide == other.slide
    # The slides' own command finds all done, and this one too.
    assert {one.reason for one in embed([tmp_path / "slides"], tmp_path / "features", **tiles | OPTIONS)} == {
        "already complete"
    }
    assert {one.reason for one in embed([tmp_path / "features"], tmp_path / "features", **OPTIONS)} == {
        "already complete"
    }
    with pytest.raises(LongslideError, match=r"all 2 existing results .* otherwise \(pool mean instead of cls"):
        embed([tmp_path / "features"], tmp_path / "features", pool="cls", **OPTIONS)


def test_tiles_of_tridents_default_size_are_remarked_for_an_encoder_of_half_of_it() -> None:
    said = "tiles of 512 px at 0.5 um/px (recommended for gigapath: 256 px at 0.5 um/px)"
    assert unlike_recommended(Preprocessing("gigapath", tile_px=512, tile_mpp=0.5)) == said
    assert unlike_recommended(Preprocessing(tile_px=512, tile_mpp=0.5), "gigapath") == said
    assert not unlike_recommended(Preprocessing("gigapath", tile_px=224, tile_mpp=0.5))
    assert not unlike_recommended(Preprocessing("conch_v15", tile_px=512, tile_mpp=0.5))
    assert not unlike_recommended(Preprocessing("of their own", tile_px=512, tile_mpp=0.5))


def write_foreign(folder: Path, tool: str) -> Path:
    """What TRIDENT, CLAM and STAMP write: 15 tiles, in the order each has."""
    folder.mkdir(parents=True, exist_ok=True)
    tiles = write_tiles(folder.parent / "ours" / "slide.h5")
    path = folder / "slide.h5"
    with h5py.File(path, "w") as file:
        if tool == "trident":
            file["features"] = tiles.features
            file["coords"] = tiles.coords
            file["coords"].attrs.update({"patch_size": 256, "patch_size_level0": 512, "overlap": 0})
        elif tool == "clam":
            file["features"] = tiles.features
            file["coords"] = tiles.coords
        else:
            file["feats"] = tiles.features
            file["coords"] = tiles.coords / 2.0
            file.attrs.update({"unit": "um", "tile_size_um": 256.0, "tile_size_px": 224, "extractor": "GigaPath"})
    return path


@pytest.mark.parametrize("tool", ["trident", "clam", "stamp"])
def test_files_of_other_tools_give_the_same_embedding_and_stay_as_they_are(tmp_path: Path, tool: str) -> None:
    path = write_foreign(tmp_path / "theirs", tool)
    before = path.read_bytes()
    words = ["--slide-encoder", "gigapath", "--slide-checkpoint", "random", "--device", "cpu"]
    assert main(["embed", str(tmp_path / "theirs"), "--output", str(tmp_path / "out"), *words]) == 0
    made = read_features(tmp_path / "out" / "slide.h5")
    assert made.layout == "longslide"
    assert made.settings["made_from"] == tool
    ours = read_features(tmp_path / "ours" / "slide.h5")
    encoder = create_slide_encoder("gigapath", checkpoint="random", tile_dim=48)
    with torch.inference_mode():
        expected = encoder(torch.from_numpy(ours.features).float()[None], torch.from_numpy(ours.cells)[None])[0]
    np.testing.assert_allclose(made.slide_embedding, expected, rtol=1e-4, atol=1e-5)
    assert path.read_bytes() == before
    with pytest.raises(LongslideError, match=f"a feature file of {tool}, which is left as it is"):
        embed([path], path.parent, **OPTIONS)


@pytest.mark.parametrize(
    ("tiles", "said"),
    [
        ({"dim": 48}, r"s\.h5: tile embeddings of length 48, but slide encoder 'gigapath' reads 1536"),
        (
            {"dim": 1536, "encoder": "uni2-h"},
            r"s\.h5: tile embeddings of 'uni2-h', but slide encoder 'gigapath' reads those of 'gigapath'",
        ),
    ],
)
def test_what_a_slide_encoder_cannot_read_is_one_line_before_weights_are_looked_for(
    tmp_path: Path, tiles: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiles(tmp_path / "in" / "s.h5", **tiles)
    with pytest.raises(LongslideError, match=said):
        embed([tmp_path / "in"], tmp_path / "out", slide_encoder="gigapath", device="cpu")
    words = ["embed", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--slide-encoder", "gigapath"]
    assert main(words) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_one_bad_file_fails_alone(tmp_path: Path) -> None:
    write_tiles(tmp_path / "in" / "a.h5")
    write_tiles(tmp_path / "in" / "b.h5", dim=32)
    write_tiles(tmp_path / "in" / "c.h5", coords=np.zeros((15, 2), np.int64))
    (tmp_path / "in" / "d.h5").write_bytes((tmp_path / "in" / "a.h5").read_bytes()[:900])
    results = embed([tmp_path / "in"], tmp_path / "out", **OPTIONS)
    assert {one.slide_id: one.status for one in results} == {"a": "done", "b": "failed", "c": "failed", "d": "failed"}
    for word, one in zip(("", "length 32", "one grid cell", "truncated"), results, strict=True):
        assert word in one.reason
    assert sorted(path.name for path in (tmp_path / "out").glob("*.h5")) == ["a.h5"]


def test_other_tile_embeddings_under_a_name_that_is_taken_are_not_passed_over(tmp_path: Path) -> None:
    write_tiles(tmp_path / "one" / "s.h5")
    write_tiles(tmp_path / "other" / "s.h5", features=np.ones((15, 48), np.float16))
    embed([tmp_path / "one"], tmp_path / "out", **OPTIONS)
    with pytest.raises(LongslideError, match=r"s\.h5: made otherwise \(of other tile embeddings\)"):
        embed([tmp_path / "other"], tmp_path / "out", **OPTIONS)
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    [again] = embed([tmp_path / "copy"], tmp_path / "out", **OPTIONS)
    assert again.reason == "already complete"
    with pytest.raises(LongslideError, match="two feature files of one name"):
        embed([tmp_path / "one", tmp_path / "other"], tmp_path / "out", **OPTIONS)


def test_slides_without_a_tile_encoder_and_features_without_a_slide_encoder_are_told_what_is_missing(
    tmp_path: Path,
) -> None:
    write_synthetic_slide(tmp_path / "a.svs", size=(600, 500))
    with pytest.raises(LongslideError, match="--tile-encoder"):
        embed([tmp_path / "a.svs"], tmp_path / "out", **OPTIONS)
    write_tiles(tmp_path / "in" / "s.h5")
    with pytest.raises(LongslideError, match="--slide-encoder for slide embeddings"):
        embed([tmp_path / "in"], tmp_path / "out")
