"""Synthetic slides: what OpenSlide makes of them."""

import hashlib
from pathlib import Path
from typing import Literal

import numpy as np
import openslide
import pytest
from longslide.data.slides.slide import open_slide
from longslide.data.synthetic import write_pyramid, write_synthetic_slide
from longslide.data.tissue.optical_density import find_tissue
from longslide.errors import LongslideError

SIZE = (1500, 1200)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("suffix", [".svs", ".tif", ".tiff"])
def test_the_same_seed_writes_the_same_file(tmp_path: Path, suffix: str) -> None:
    a, b, other = (tmp_path / f"{name}{suffix}" for name in ("a", "b", "other"))
    assert write_synthetic_slide(a, size=SIZE, seed=3) == a
    write_synthetic_slide(b, size=SIZE, seed=3)
    write_synthetic_slide(other, size=SIZE, seed=4)
    assert digest(a) == digest(b) != digest(other)


@pytest.mark.parametrize(("suffix", "vendor"), [(".svs", "aperio"), (".tif", "generic-tiff")])
@pytest.mark.parametrize("mpp", [0.25, 0.5, None])
def test_openslide_opens_them_with_and_without_mpp(tmp_path: Path, suffix: str, vendor: str, mpp: float | None) -> None:
    path = write_synthetic_slide(tmp_path / f"a{suffix}", size=SIZE, mpp=mpp)
    with openslide.OpenSlide(path) as reference:
        assert reference.properties["openslide.vendor"] == vendor
        assert reference.dimensions == SIZE
        assert reference.level_count == 3
    with open_slide(path) as slide:
        if mpp is None:
            with pytest.raises(LongslideError, match="microns per pixel"):
                _ = slide.mpp
        else:
            assert slide.mpp.value == pytest.approx(mpp, rel=1e-5)


@pytest.mark.parametrize("texture", ["glandular", "solid"])
def test_there_is_tissue_on_glass(tmp_path: Path, texture: Literal["glandular", "solid"]) -> None:
    path = write_synthetic_slide(tmp_path / "a.svs", size=(2048, 1536), texture=texture)
    with open_slide(path) as slide:
        assert 0.05 < find_tissue(slide).mask.mean() < 0.8
        corner = slide.read_region(0, 0, 0, 40, 40)
    assert corner.mean() > 230


def test_the_two_textures_differ_where_there_is_tissue(tmp_path: Path) -> None:
    means = {}
    textures: tuple[Literal["glandular"], Literal["solid"]] = ("glandular", "solid")
    for texture in textures:
        path = write_synthetic_slide(tmp_path / f"{texture}.svs", size=(2048, 1536), texture=texture)
        with open_slide(path) as slide:
            picture = slide.thumbnail(2048)
        dark = picture.astype(int).sum(-1) < 400  # nuclei
        means[texture] = dark.mean()
    assert means["solid"] > 1.5 * means["glandular"]


def test_the_levels_of_a_pyramid_show_the_same_picture(tmp_path: Path) -> None:
    y, x = np.mgrid[0:1100, 0:1700]
    ramp = np.stack([x / 1700 * 250, y / 1100 * 250, x * 0], axis=-1).astype(np.uint8)
    write_pyramid(tmp_path / "a.svs", ramp, mpp=0.5)
    with open_slide(tmp_path / "a.svs") as slide:
        assert slide.level_dimensions == ((1700, 1100), (850, 550), (425, 275))
        for level, (width, height) in enumerate(slide.level_dimensions):
            whole = slide.read_region(0, 0, level, width, height).astype(float)
            assert np.abs(whole[..., 0] - (np.arange(width) + 0.5) / width * 250).max() < 2
            assert np.abs(whole[..., 1] - (np.arange(height)[:, None] + 0.5) / height * 250).max() < 2
