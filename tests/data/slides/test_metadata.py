"""Metadata that contradict one another are remarked: real files, written with tifffile and Pillow."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from longslide import open_slide
from PIL import Image, ImageCms


def write_svs(path: Path, facts: str, **kwargs: object) -> Path:
    pixels = np.full((512, 512, 3), 240, np.uint8)
    tifffile.imwrite(
        path,
        pixels,
        tile=(256, 256),
        photometric="rgb",
        compression="jpeg",
        description=f"Aperio Image Library v12.0.0\r\n512x512|{facts}",
        metadata=None,
        **kwargs,
    )
    return path


def other_profile() -> bytes:
    profile = ImageCms.createProfile("LAB")
    return ImageCms.ImageCmsProfile(profile).tobytes()


@pytest.mark.parametrize("facts", ["AppMag = 20|MPP = 0.499", "AppMag = 40|MPP = 0.2525", "AppMag = 20|MPP = 0.55"])
def test_metadata_that_agree_are_not_remarked(tmp_path: Path, facts: str) -> None:
    with open_slide(write_svs(tmp_path / "a.svs", facts)) as slide:
        assert slide.remark == ""


def test_an_objective_power_that_does_not_go_with_the_mpp_is_remarked(tmp_path: Path) -> None:
    with open_slide(write_svs(tmp_path / "a.svs", "AppMag = 20|MPP = 0.25")) as slide:
        assert slide.remark == "the file says 0.25 um/px and objective power 20, which has about 0.5"
        assert slide.mpp.value == 0.25


def test_axes_of_different_mpp_are_remarked_also_where_the_user_gives_one(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as file:
        metadata = {"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.505}
        file.write(np.zeros((512, 512, 3), np.uint8), tile=(256, 256), photometric="rgb", metadata=metadata)
    with open_slide(path) as slide:
        assert slide.remark == "the file's microns per pixel differ between x (0.5) and y (0.505)"
    tifffile.tiffcomment(path, tifffile.tiffcomment(path).replace('"0.505"', '"0.250"'))
    with open_slide(path, slide_mpp=0.5) as slide:
        assert slide.remark == "the file's microns per pixel differ between x (0.5) and y (0.25)"


def test_an_icc_profile_is_remarked_unless_it_is_srgb(tmp_path: Path) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name, profile, remark in (
        ("a.svs", other_profile(), "its ICC profile (Lab identity built-in) is not applied: colours are as stored"),
        ("b.svs", srgb, ""),
    ):
        path = write_svs(tmp_path / name, "AppMag = 20|MPP = 0.5", iccprofile=profile)
        with open_slide(path) as slide:
            assert slide.remark == remark
        Image.new("RGB", (64, 64)).save(tmp_path / f"{name}.png", icc_profile=profile, dpi=(50_800, 50_800))
        with open_slide(tmp_path / f"{name}.png") as slide:
            assert slide.remark == remark


def test_resolution_tags_that_contradict_the_mpp_are_remarked(tmp_path: Path) -> None:
    path = write_svs(
        tmp_path / "a.svs", "AppMag = 20|MPP = 0.5", resolution=(40_000, 40_000), resolutionunit="CENTIMETER"
    )
    with open_slide(path) as slide:
        assert slide.remark == "the file says 0.5 um/px, and 0.25 in its resolution tags"
