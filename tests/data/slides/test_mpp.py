"""Microns per pixel: where they come from, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from longslide.data.slides.mpp import Mpp, resolve_mpp
from longslide.data.slides.slide import open_slide
from longslide.data.synthetic import write_pyramid
from longslide.errors import LongslideError
from PIL import Image

SLIDE = Path("a.svs")
GREY = np.full((600, 700, 3), 128, np.uint8)
EVERYTHING = {
    "openslide.mpp-x": "0.265",
    "openslide.mpp-y": "0.265",
    "tiff.ResolutionUnit": "centimeter",
    "tiff.XResolution": "20000",
    "tiff.YResolution": "20000",
    "openslide.objective-power": "10",
}


def without(*prefixes: str) -> dict[str, str]:
    return {key: value for key, value in EVERYTHING.items() if not key.startswith(prefixes)}


@pytest.mark.parametrize(
    ("properties", "given", "expected"),
    [
        (EVERYTHING, 0.3, Mpp(0.3, "option")),
        (EVERYTHING, None, Mpp(0.265, "file")),
        (without("openslide.mpp"), None, Mpp(0.5, "tiff-resolution")),
        (without("openslide.mpp", "tiff"), None, Mpp(1.0, "objective-power")),
        ({}, 0.25, Mpp(0.25, "option")),
    ],
)
def test_the_most_trusted_source_wins(properties: dict[str, str], given: float | None, expected: Mpp) -> None:
    assert resolve_mpp(properties, SLIDE, given) == expected


def test_one_axis_is_enough() -> None:
    assert resolve_mpp({"openslide.mpp-y": "0.265"}, SLIDE) == Mpp(0.265, "file")


def test_a_small_difference_between_the_axes_is_averaged() -> None:
    found = resolve_mpp({"openslide.mpp-x": "0.2500", "openslide.mpp-y": "0.2510"}, SLIDE)
    assert found.value == pytest.approx(0.2505)


@pytest.mark.parametrize(
    ("properties", "given", "message"),
    [
        ({}, None, "does not say its microns per pixel"),
        (EVERYTHING, 250.0, "not plausible"),
        (EVERYTHING, 0.0, "not plausible"),
        (EVERYTHING, -0.5, "not plausible"),
        (EVERYTHING, float("nan"), "not plausible"),
        ({"openslide.mpp-x": "352.8", "openslide.mpp-y": "352.8"}, None, "not plausible"),
        ({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.5"}, None, "differ between x"),
        ({"openslide.mpp-x": "abc", "openslide.mpp-y": "-1"}, None, "does not say"),
        ({"openslide.mpp-x": "0", "openslide.objective-power": "nan"}, None, "does not say"),
        ({"openslide.objective-power": "0.5"}, None, "not plausible"),
    ],
)
def test_what_cannot_be_trusted_is_refused_with_a_remedy(
    properties: dict[str, str], given: float | None, message: str
) -> None:
    with pytest.raises(LongslideError, match=message) as caught:
        resolve_mpp(properties, SLIDE, given)
    assert str(caught.value).startswith("a.svs: ")
    assert "--slide-mpp" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_unit_means_no_resolution() -> None:
    tags = {"tiff.XResolution": "20000", "tiff.YResolution": "20000"}
    for unit in ({}, {"tiff.ResolutionUnit": "none"}):
        with pytest.raises(LongslideError, match="does not say"):
            resolve_mpp(tags | unit, SLIDE)


@pytest.mark.parametrize("mpp", [0.265, 0.2498, 0.5021])
def test_an_svs_keeps_its_own_mpp_unrounded(tmp_path: Path, mpp: float) -> None:
    write_pyramid(tmp_path / "a.svs", GREY, mpp=mpp)
    with open_slide(tmp_path / "a.svs") as slide:
        assert slide.mpp == Mpp(mpp, "file")


def test_a_generic_tiff_has_it_in_its_resolution_tags(tmp_path: Path) -> None:
    write_pyramid(tmp_path / "a.tif", GREY, mpp=0.265)
    with open_slide(tmp_path / "a.tif") as slide:
        assert slide.mpp.source == "tiff-resolution"
        assert slide.mpp.value == pytest.approx(0.265, rel=1e-5)


def test_the_users_word_is_above_the_files(tmp_path: Path) -> None:
    write_pyramid(tmp_path / "a.svs", GREY, mpp=0.25)
    with open_slide(tmp_path / "a.svs", slide_mpp=0.5) as slide:
        assert slide.mpp == Mpp(0.5, "option")


@pytest.mark.parametrize("dpi", [72, 300, 96])
def test_a_printers_resolution_is_not_believed(tmp_path: Path, dpi: int) -> None:
    tifffile.imwrite(
        tmp_path / "a.tif", GREY, tile=(256, 256), photometric="rgb", resolution=(dpi, dpi), resolutionunit="INCH"
    )
    Image.fromarray(GREY).save(tmp_path / "a.png", dpi=(dpi, dpi))
    for name in ("a.tif", "a.png"):
        with open_slide(tmp_path / name) as slide, pytest.raises(LongslideError, match=f"{name}: .*--slide-mpp"):
            _ = slide.mpp


def test_a_plain_image_may_have_a_plausible_resolution(tmp_path: Path) -> None:
    Image.fromarray(GREY).save(tmp_path / "a.png", dpi=(50800, 50800))
    with open_slide(tmp_path / "a.png") as slide:
        assert slide.mpp.source == "tiff-resolution"
        assert slide.mpp.value == pytest.approx(0.5, rel=1e-4)


def test_a_slide_without_mpp_opens_all_the_same(tmp_path: Path) -> None:
    write_pyramid(tmp_path / "a.svs", GREY, mpp=None)
    with open_slide(tmp_path / "a.svs") as slide:
        assert slide.read_region(0, 0, 0, 10, 10).shape == (10, 10, 3)
        with pytest.raises(LongslideError, match="does not say"):
            _ = slide.mpp


@pytest.mark.parametrize(("given", "remarked"), [(0.27, False), (0.29, False), (0.3, True), (0.2, True)])
def test_a_given_mpp_far_off_the_files_own_is_remarked_and_used(given: float, remarked: bool) -> None:
    found = resolve_mpp(EVERYTHING, SLIDE, given)
    assert found == Mpp(given, "option")
    assert found.remark == (f"slide_mpp {given:g} was given, the file says 0.265" if remarked else "")
    assert resolve_mpp({}, SLIDE, given).remark == "", "the file has none"
