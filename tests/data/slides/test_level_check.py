"""Reduced levels that do not show what level 0 shows are found, said, and not used."""

import os
from pathlib import Path

import numpy as np
import pytest
import tifffile
from longslide.data.slides.slide import open_slide
from longslide.data.synthetic import write_synthetic_slide
from longslide.data.tiles.grid import make_grid

from . import tiff_files as files


def pyramid(path: Path, *, level_1: np.ndarray | None = None, level_1_is_ycbcr: bool = False) -> Path:
    """Three levels, the second one of other pixels or with YCbCr streams under the label RGB."""
    levels = files.levels_of(files.tissue(1024, 1024), (1, 2, 4))
    if level_1 is not None:
        levels[1] = level_1
    with tifffile.TiffWriter(path) as file:
        for number, level in enumerate(levels):
            ycbcr = level_1_is_ycbcr and number == 1
            tiles = files.tiles_of(level, 256)
            file.write(
                iter([files.unlabelled(files.jpeg(tile) if ycbcr else files.rgb_jpeg(tile)) for tile in tiles]),
                shape=level.shape,
                dtype="uint8",
                tile=(256, 256),
                photometric="rgb",
                compression="jpeg",
                compressionargs={"outcolorspace": "rgb"},  # else tifffile's tag says YCbCr
                resolution=(20_000, 20_000),
                resolutionunit="CENTIMETER",
                subfiletype=int(number > 0),
                metadata=None,
                software=False,
            )
    return path


@pytest.mark.parametrize("reader", ["tiff", "openslide"])
def test_levels_of_an_honest_pyramid_agree(tmp_path: Path, reader: str) -> None:
    for path in (pyramid(tmp_path / "a.tif"), write_synthetic_slide(tmp_path / "b.svs", size=(3072, 2048), mpp=0.25)):
        with open_slide(path, reader=reader) as slide:
            assert slide.differing_levels == set()
            assert slide.remark == ""


@pytest.mark.parametrize("name", ["control_intact.svs", "ome_subifd.ome.tif"])
def test_levels_of_real_slides_agree(name: str) -> None:
    folder = os.environ.get("LONGSLIDE_TEST_CASES")
    if not folder:
        pytest.skip(f"LONGSLIDE_TEST_CASES, the folder with {name}, is not set")
    with open_slide(Path(folder) / name) as slide:
        assert len(slide.level_dimensions) == 2
        assert slide.differing_levels == set()


@pytest.mark.parametrize("reader", ["tiff", "openslide"])
def test_a_level_of_ycbcr_labelled_as_rgb_is_not_used(tmp_path: Path, reader: str) -> None:
    with open_slide(pyramid(tmp_path / "whole.tif"), reader=reader) as slide:
        tissue, thumbnail = slide.tissue(), slide.thumbnail(500)
    with open_slide(pyramid(tmp_path / "a.tif", level_1_is_ycbcr=True), reader=reader) as slide:
        assert slide.differing_levels == {1}
        assert slide.remark == "level 1 unlike level 0 in place or colours: finer ones were used"
        assert np.abs(slide.thumbnail(500).astype(int) - thumbnail).mean() < 3
        assert slide.tissue().area_mm2(0.5) == pytest.approx(tissue.area_mm2(0.5), rel=0.05)
        assert make_grid(slide, tissue, tile_mpp=1.0).level == 0


def test_a_level_that_shows_another_place_is_not_used(tmp_path: Path) -> None:
    honest = files.levels_of(files.tissue(1024, 1024), (1, 2))[1]
    for number, moved in enumerate((np.roll(honest, (60, 90), (0, 1)), honest[:, ::-1])):
        with open_slide(pyramid(tmp_path / f"{number}.tif", level_1=np.ascontiguousarray(moved))) as slide:
            assert slide.differing_levels == {1}


def test_a_level_of_one_colour_differs_from_one_with_tissue(tmp_path: Path) -> None:
    blank = np.full((512, 512, 3), 240, np.uint8)
    with open_slide(pyramid(tmp_path / "a.tif", level_1=blank)) as slide:
        assert slide.differing_levels == {1}


def test_a_level_of_another_shape_is_not_used(tmp_path: Path) -> None:
    with open_slide(pyramid(tmp_path / "a.tif", level_1=files.levels_of(files.tissue(1024, 700), (2,))[0])) as slide:
        assert slide.differing_levels == {1}


def test_the_last_pixels_of_a_level_may_be_cut_off(tmp_path: Path) -> None:
    honest = files.levels_of(files.tissue(1024, 1024), (2,))[0]
    with open_slide(pyramid(tmp_path / "a.tif", level_1=np.ascontiguousarray(honest[:-2, :-1]))) as slide:
        assert slide.differing_levels == set()
