"""Blur is measured as tiles are read, stands in the feature file, and may leave tiles out, which is said and drawn."""

import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from classifier_files import ENCODER
from longslide import LongslideError, embed, open_slide, read_features
from longslide.data.features.feature_file import write_features
from longslide.data.synthetic import write_pyramid
from PIL import Image


@pytest.fixture(scope="module")
def half_blurred(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real tissue, in focus above row 768 and out of focus below."""
    folder = os.environ.get("LONGSLIDE_TEST_SLIDES")
    if not folder:
        pytest.skip("LONGSLIDE_TEST_SLIDES, the folder with CMU-1-Small-Region.svs, is not set")
    with open_slide(Path(folder) / "CMU-1-Small-Region.svs") as slide:
        picture = slide.read_region(780, 1400, 0, 768, 1536).copy()
    picture[768:] = cv2.GaussianBlur(picture[768:], (0, 0), 3)
    path = tmp_path_factory.mktemp("slides") / "half.tif"
    write_pyramid(path, picture, mpp=0.5)
    return path


@pytest.fixture
def job(half_blurred: Path, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "tiny.yaml").write_text(ENCODER)
    return {
        "slides": [half_blurred],
        "output": tmp_path / "features",
        "tile_encoder": str(tmp_path / "tiny.yaml"),
        "tile_checkpoint": "random",
        "device": "cpu",
        "tile_px": 256,
    }


def test_every_tile_has_a_blur_score(job: dict[str, Any]) -> None:
    [result] = embed(**job)
    features = read_features(result.features or "")
    assert features.blur is not None
    assert features.blur.shape == (len(features.coords),)
    lower = features.coords[:, 1] >= 768
    assert 0 < lower.sum() < len(lower)
    assert features.blur[~lower].max() < 0.45 < features.blur[lower].min()
    assert (result.blurred_tiles, features.settings["max_blur"]) == (0, 1.0)


def test_max_blur_leaves_tiles_out_counts_and_draws_them(job: dict[str, Any]) -> None:
    [everything] = embed(**job)
    picture = job["output"] / "qc" / "half.jpg"
    before = np.asarray(Image.open(picture)).astype(int)
    [result] = embed(**job, max_blur=0.45, overwrite=True)
    features = read_features(result.features or "")
    assert (features.coords[:, 1] < 768).all()
    assert features.settings["max_blur"] == 0.45
    assert features.settings["blurred_tiles"] == result.blurred_tiles
    assert (result.tiles or 0) + (result.blurred_tiles or 0) == everything.tiles
    changed = np.abs(np.asarray(Image.open(picture)).astype(int) - before).max(-1) > 60
    assert changed[800:1500].mean() > 0.003, "crossed out"
    assert changed[:700].mean() < 0.001


def test_another_max_blur_is_another_setting(job: dict[str, Any]) -> None:
    embed(**job, max_blur=0.45)
    with pytest.raises(LongslideError, match=r"max_blur 0\.45 instead of 1"):
        embed(**job)
    [again] = embed(**job, max_blur=0.45)
    assert again.reason == "already complete"


def test_a_file_from_before_blur_was_measured_does_not_pass_for_one_without_blurred_tiles(job: dict[str, Any]) -> None:
    [result] = embed(**job)
    features = read_features(result.features or "")
    del features.settings["max_blur"]
    write_features(result.features or "", features)
    assert embed(**job)[0].reason == "already complete"
    with pytest.raises(LongslideError, match="before blur was measured"):
        embed(**job, max_blur=0.45)


def test_the_blur_scores_stay_when_a_slide_embedding_is_added(job: dict[str, Any]) -> None:
    [first] = embed(**job, max_blur=0.45)
    before = read_features(first.features or "")
    [second] = embed(**job, max_blur=0.45, slide_encoder="gigapath", slide_checkpoint="random")
    after = read_features(second.features or "")
    assert after.slide_embedding is not None
    np.testing.assert_array_equal(after.blur, before.blur)
    assert second.blurred_tiles == first.blurred_tiles


def test_a_slide_that_is_blurred_all_over_is_skipped_with_the_reason(job: dict[str, Any]) -> None:
    [result] = embed(**job, max_blur=0.05)
    assert result.status == "skipped"
    assert "more blurred than --max-blur 0.05; see qc/half.jpg" in result.reason
    assert (result.tiles, result.blurred_tiles) == (0, 18)
    assert not (job["output"] / "half.h5").exists()


@pytest.mark.parametrize("value", [0.0, -1.0, 1.5, float("nan")])
def test_a_blur_that_cannot_be_meant_is_refused(job: dict[str, Any], value: float) -> None:
    with pytest.raises(LongslideError, match="--max-blur"):
        embed(**job, max_blur=value)
