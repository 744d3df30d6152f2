"""Whichever reader reads a slide, its features are the same."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from classifier_files import ENCODER
from longslide import embed, read_features
from longslide.data.synthetic import write_synthetic_slide


@pytest.mark.parametrize("tile_mpp", [0.5, 0.7, 2.0])
def test_both_readers_give_the_same_features(tmp_path: Path, tile_mpp: float) -> None:
    (tmp_path / "slides").mkdir()
    sees_every_pixel = {
        "img_size: 32, depth: 2": "img_size: 224, depth: 1",
        "resize: 32": "resize: 224",
        "crop: 32": "crop: 224",
    }
    encoder = ENCODER
    for small, large in sees_every_pixel.items():
        encoder = encoder.replace(small, large)
    (tmp_path / "encoder.yaml").write_text(encoder)
    write_synthetic_slide(
        tmp_path / "slides" / "drawn.svs", size=(2051, 1533), mpp=0.5
    )  # levels of 2.0003 and the like
    if folder := os.environ.get("LONGSLIDE_TEST_SLIDES"):
        shutil.copyfile(Path(folder) / "CMU-1-Small-Region.svs", tmp_path / "slides" / "real.svs")
    for reader in ("tiff", "openslide"):
        embed(
            [tmp_path / "slides"],
            tmp_path / reader,
            tmp_path / "encoder.yaml",
            "random",
            tile_mpp=tile_mpp,
            tile_px=224,
            reader=reader,
        )
    for path in (tmp_path / "slides").iterdir():
        ours, reference = (read_features(tmp_path / reader / f"{path.stem}.h5") for reader in ("tiff", "openslide"))
        assert (ours.settings["reader"], reference.settings["reader"]) == ("tiff", "openslide")
        assert ours.slide.quickhash == reference.slide.quickhash
        np.testing.assert_array_equal(ours.coords, reference.coords)
        np.testing.assert_array_equal(ours.features, reference.features)
        assert len(ours.coords) >= 3
