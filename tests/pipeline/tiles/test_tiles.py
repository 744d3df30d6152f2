"""Tiles as pictures: the very pixels that a tile encoder gets, whole or not at all."""

import csv
import json
import tarfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from longslide import LongslideError, embed, open_slide, read_features, tiles, write_synthetic_slide
from longslide.data.tiles.grid import Grid, grid_of_tiles
from longslide.data.tissue.optical_density import OpticalDensity
from longslide.pipeline.batch.claims import claim
from longslide.pipeline.cli import main
from longslide.pipeline.tiles import picture_files
from torch import Tensor, nn


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two slides whose tiles at 0.5 um/px are resampled, one with dots in its name."""
    folder = tmp_path_factory.mktemp("slides")
    write_synthetic_slide(folder / "S21.1.svs", size=(1600, 1200), mpp=0.29)
    write_synthetic_slide(folder / "b.svs", size=(1600, 1200), mpp=0.29, seed=1)
    return folder


def read_png(content: bytes) -> np.ndarray:
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def pictures_of(folder: Path, slide_id: str) -> dict[tuple[int, int], np.ndarray]:
    """By (x, y), from a PNG folder or from shards."""
    found = {path.stem: path.read_bytes() for path in (folder / slide_id).glob("*.png")}
    for shard in sorted(folder.glob(f"{slide_id}-*.tar")):
        with tarfile.open(shard) as archive:
            for member in archive.getmembers():
                if member.name.endswith(".png"):
                    found[Path(member.name).stem] = archive.extractfile(member).read()
    return {tuple(map(int, name.split("_"))): read_png(content) for name, content in found.items()}


@pytest.mark.parametrize("layout", ["png", "webdataset"])
def test_the_pictures_are_the_tiles_that_python_reads(slides: Path, tmp_path: Path, layout: str) -> None:
    words = ["tiles", str(slides), "--output", str(tmp_path), "--layout", layout, "--tile-px", "128", "--overlap", "16"]
    assert main(words) == 0
    for name in ("S21.1", "b"):
        with open_slide(slides / f"{name}.svs") as slide:
            wanted = {
                tuple(xy): tile
                for batch in slide.tiles(mpp=0.5, px=128, overlap=16)
                for xy, tile in zip(batch.coords.tolist(), batch.tiles, strict=True)
            }
        found = pictures_of(tmp_path, name)
        assert found.keys() == wanted.keys()
        assert len(found) > 12
        for xy, tile in wanted.items():
            np.testing.assert_array_equal(found[xy], tile)
        index = json.loads((tmp_path / f"{name}.json").read_text())
        assert {tuple(xy) for xy in index["coords"]} == wanted.keys()
    with (tmp_path / "summary.csv").open() as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["done", "done"]
    assert (tmp_path / "qc" / "b.jpg").is_file()


class Corners(nn.Module):
    """Gives back what it sees: nine pixels of each image."""

    def forward(self, images: Tensor) -> Tensor:
        return images[:, :, ::100, ::100].flatten(1)


@pytest.mark.slow
def test_the_tiles_of_a_feature_file_are_what_its_encoder_saw(slides: Path, tmp_path: Path) -> None:
    embed(slides, tmp_path / "features", Corners(), tile_px=224)
    words = ["tiles", str(slides), "--features", str(tmp_path / "features"), "--output", str(tmp_path / "tiles")]
    assert main([*words, "--layout", "png"]) == 0
    for name in ("S21.1", "b"):
        features = read_features(tmp_path / "features" / f"{name}.h5")
        found = pictures_of(tmp_path / "tiles", name)
        assert len(found) == len(features.coords)
        seen = np.stack([found[tuple(xy)] for xy in features.coords.tolist()])
        pixels = torch.from_numpy(seen).permute(0, 3, 1, 2)[:, :, ::100, ::100].flatten(1).numpy() / 255
        # Networks without a transform of their own get tiles normalised as for ImageNet.
        mean, std = np.repeat([0.485, 0.456, 0.406], 9), np.repeat([0.229, 0.224, 0.225], 9)
        np.testing.assert_allclose(features.features.astype(np.float32), (pixels - mean) / std, atol=2e-3)


@pytest.mark.slow
def test_the_folder_of_the_features_keeps_its_summary(slides: Path, tmp_path: Path) -> None:
    (tmp_path / "summary.csv").write_text("slide_id\n")
    with pytest.raises(LongslideError, match="the folder of the features"):
        tiles(slides, tmp_path, features=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["summary.csv"]


def test_a_rerun_does_what_is_missing_and_refuses_other_settings(
    slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiles(slides, tmp_path, tile_px=256)
    shard = tmp_path / "b-000000.tar"
    before = shard.stat().st_mtime_ns
    (tmp_path / "S21.1.json").unlink()
    results = tiles(slides, tmp_path, tile_px=256)
    assert [result.reason for result in results] == ["", "already complete"]
    assert shard.stat().st_mtime_ns == before
    with pytest.raises(LongslideError, match="tile_px 256 instead of 128"):
        tiles(slides, tmp_path, tile_px=128)
    with pytest.raises(LongslideError, match="layout webdataset instead of png"):
        tiles(slides, tmp_path, tile_px=256, layout="png")
    assert [result.status for result in tiles(slides, tmp_path, tile_px=256, layout="png", overwrite=True)] == [
        "done"
    ] * 2
    assert not list(tmp_path.glob("*.tar")), "the shards of before are gone"
    assert len(list((tmp_path / "b").glob("*.png"))) == results[1].tiles


def test_shards_hold_so_many_tiles_and_are_a_webdataset(slides: Path, tmp_path: Path) -> None:
    [result] = tiles(slides / "S21.1.svs", tmp_path, tile_px=128, tiles_per_shard=10)
    shards = sorted(tmp_path.glob("S21.1-*.tar"))
    assert len(shards) == -(-result.tiles // 10)
    assert json.loads((tmp_path / "S21.1.json").read_text())["files"] == [shard.name for shard in shards]
    webdataset = pytest.importorskip("webdataset")
    samples = list(webdataset.WebDataset([str(shard) for shard in shards], shardshuffle=False).decode("rgb8"))
    assert len(samples) == result.tiles
    with open_slide(slides / "S21.1.svs") as slide:
        first = next(iter(slide.tiles(px=128)))
    np.testing.assert_array_equal(samples[0]["png"], first.tiles[0])
    assert samples[0]["__key__"] == "S21.1/{}_{}".format(*first.coords[0])
    assert samples[0]["json"]["slide_id"] == "S21.1"
    assert (samples[0]["json"]["x"], samples[0]["json"]["y"]) == tuple(first.coords[0])


@pytest.mark.slow
def test_nothing_half_written_is_left_by_a_slide_that_fails(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 0

    def full_disk(tile: np.ndarray) -> bytes:
        nonlocal count
        count += 1
        if count == 12:
            raise OSError(28, "No space left on device")
        return picture_files.png(tile)

    monkeypatch.setattr("longslide.pipeline.tiles.job.png", full_disk)
    (tmp_path / ".b.123.tmp").mkdir()  # of a process that was killed
    for layout in ("png", "webdataset"):
        count = 0
        results = tiles([slides / "b.svs"], tmp_path, layout=layout, tile_px=128, threads=1)
        assert [result.status for result in results] == ["failed"]
        assert "No space left" in results[0].reason
        assert {path.name for path in tmp_path.iterdir()} <= {"summary.csv", "qc", ".locks"}


def test_a_bad_slide_ends_nothing_and_glass_has_no_pictures(slides: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.svs").write_text("no slide")
    (tmp_path / "in" / "b.svs").write_bytes((slides / "b.svs").read_bytes())
    cv2.imwrite(str(tmp_path / "glass.png"), np.full((1200, 1200, 3), 255, np.uint8))
    results = tiles([tmp_path / "in", tmp_path / "glass.png"], tmp_path / "out", slide_mpp=0.29)
    assert [result.status for result in results] == ["failed", "done", "skipped"]
    assert "no tissue found" in results[2].reason
    assert not (tmp_path / "out" / "glass.json").exists()


def test_a_slide_another_process_works_on_is_skipped(slides: Path, tmp_path: Path) -> None:
    held = claim(tmp_path, "b")
    results = {result.slide_id: result for result in tiles(slides, tmp_path)}
    held.release()
    assert {name: result.status for name, result in results.items()} == {"S21.1": "done", "b": "skipped"}
    assert "another process" in results["b"].reason


def test_blurred_tiles_are_left_out_as_embed_leaves_them(slides: Path, tmp_path: Path) -> None:
    with open_slide(slides / "b.svs") as slide:
        stream = slide.tiles(px=128)
        list(stream)
        limit = float(np.median(stream.blur))
        sharp = int((stream.blur <= limit).sum())
    [result] = tiles(slides / "b.svs", tmp_path, tile_px=128, max_blur=limit)
    assert result.tiles == sharp


def test_features_of_another_slide_are_refused(slides: Path, tmp_path: Path) -> None:
    embed(slides / "b.svs", tmp_path / "features", Corners(), tile_px=224)
    (tmp_path / "other").mkdir()
    write_synthetic_slide(tmp_path / "other" / "b.svs", size=(1600, 1200), mpp=0.29, seed=7)
    [result] = tiles(tmp_path / "other" / "b.svs", tmp_path / "out", features=tmp_path / "features")
    assert result.status == "failed"
    assert "made of another slide" in result.reason


def test_a_grid_of_known_tiles_is_the_grid_that_made_them(slides: Path) -> None:
    with open_slide(slides / "b.svs") as slide:
        made: Grid = slide.tiles(px=128).grid
        again = grid_of_tiles(
            slide,
            made.coords,
            tile_px=made.tile_px,
            tile_size_level0=made.tile_size_level0,
            step_level0=made.step_level0,
            level=made.level,
        )
        chosen = grid_of_tiles(
            slide,
            made.coords,
            tile_px=made.tile_px,
            tile_size_level0=made.tile_size_level0,
            step_level0=made.step_level0,
        )
        assert (again.level, again.read_px) == (chosen.level, chosen.read_px) == (made.level, made.read_px)
        with pytest.raises(LongslideError, match="tiles lie outside"):
            grid_of_tiles(slide, made.coords + 5000, tile_px=128, tile_size_level0=221, step_level0=221)
        with pytest.raises(LongslideError, match="no level 9"):
            grid_of_tiles(slide, made.coords, tile_px=128, tile_size_level0=221, step_level0=221, level=9)


@pytest.mark.parametrize(
    "wrong",
    [
        {"threads": 0},
        {"tiles_per_shard": 0},
        {"max_blur": 2.0},
        {"features": "nowhere"},
        {"features": ".", "tile_px": 224},
        {"features": ".", "max_blur": 0.5},
        {"features": ".", "overlap": 16},
        {"features": ".", "tissue": OpticalDensity(threshold=0.05)},
        {"tile_encoder": "uni2h"},
    ],
)
def test_wrong_usage_is_one_line_and_writes_nothing(slides: Path, tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(LongslideError) as caught:
        tiles(slides, tmp_path / "out", **wrong)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
