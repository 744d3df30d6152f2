"""Files on which the software went wrong, each with what must come out; those of tissue are tested with the finder."""

import os
import re
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest
import tifffile
from longslide.data.slides.slide import open_slide
from longslide.data.slides.slide_table import find_slides
from longslide.errors import LongslideError


@pytest.fixture(scope="module")
def cases() -> Path:
    folder = os.environ.get("LONGSLIDE_TEST_CASES")
    if not folder:
        pytest.skip("LONGSLIDE_TEST_CASES is not set")
    return Path(folder)


def test_every_file_of_the_folder_is_in_a_test(cases: Path) -> None:
    """A file that is added there fails here until it is tested."""
    tested = {
        *("control_intact.svs", "overview_unreadable.svs", "comp_webp.tif", "comp_jpeg2000.tif"),
        *("dicom_two_series", "mrxs_alone", "ome_subifd.ome.tif", "twelve_bit_in_16.tif", "tissue", "README.md"),
    }
    assert {path.name for path in cases.iterdir()} <= tested
    pictures = (cases / "tissue").glob("*_truth.png")
    source = Path(__file__).parents[1].joinpath("tissue", "test_cases.py").read_text()
    named = [path.name.removesuffix("_truth.png") for path in pictures]
    assert [name for name in named if not re.search(rf'"{name}"', source)] == []


@pytest.mark.parametrize("reader", ["tiff", "openslide"])
@pytest.mark.parametrize("name", ["control_intact.svs", "overview_unreadable.svs"])
def test_an_unreadable_overview_costs_no_tissue(cases: Path, name: str, reader: str) -> None:
    with open_slide(cases / name, reader=reader) as slide:
        stream = slide.tiles(0.5, 256)
        assert slide.tissue().area_mm2(slide.mpp.value) == pytest.approx(0.267, abs=0.001)
        assert sum(len(batch.tiles) for batch in stream) == 16
        assert ("level 1 unreadable" in slide.remark) == (name == "overview_unreadable.svs")


def test_two_series_in_a_folder_are_two_slides(cases: Path) -> None:
    entries = find_slides(cases / "dicom_two_series")
    assert len(entries) == 2
    quickhashes = set()
    for entry in entries:
        with open_slide(entry.path) as slide:
            quickhashes.add(slide.quickhash)
            assert sum(len(batch.tiles) for batch in slide.tiles(0.5, 256)) > 0
    assert len(quickhashes) == 2


@pytest.mark.parametrize(
    ("syntax", "codec"),
    [("80", "JPEG-LS"), ("70", "lossless JPEG"), ("99", "the transfer syntax 1.2.840.10008.1.2.4.99")],
)
def test_dicom_in_a_codec_that_openslide_lacks_is_refused_by_its_codec(
    cases: Path, tmp_path: Path, syntax: str, codec: str
) -> None:
    for file in (cases / "dicom_two_series").glob("s1_*.dcm"):
        content = file.read_bytes().replace(b"1.2.840.10008.1.2.4.50", f"1.2.840.10008.1.2.4.{syntax}".encode())
        (tmp_path / file.name).write_bytes(content)
    with pytest.raises(LongslideError) as refused:
        open_slide(next(tmp_path.iterdir()))
    assert f"compressed by {codec}, which OpenSlide does not read in DICOM; convert" in str(refused.value)
    assert "truncated" not in str(refused.value)


def test_any_file_of_a_series_opens_its_slide(cases: Path) -> None:
    found = set()
    for file in (cases / "dicom_two_series").glob("s1_*.dcm"):
        with open_slide(file) as slide:
            found.add((slide.quickhash, slide.level_dimensions))
    assert len(found) == 1


def test_an_mrxs_without_its_folder_names_the_folder(cases: Path) -> None:
    with pytest.raises(LongslideError, match=r"case1\.mrxs: the folder case1/ .* is missing"):
        open_slide(cases / "mrxs_alone" / "case1.mrxs")


@pytest.mark.parametrize("name", ["comp_webp.tif", "comp_jpeg2000.tif"])
def test_codecs_that_openslide_lacks_are_read_as_tifffile_reads_them(cases: Path, name: str) -> None:
    with pytest.raises((openslide.OpenSlideError, openslide.OpenSlideUnsupportedFormatError)):
        openslide.OpenSlide(cases / name).read_region((0, 0), 0, (10, 10))
    with open_slide(cases / name) as slide:
        width, height = slide.dimensions
        np.testing.assert_array_equal(slide.read_region(0, 0, 0, width, height), tifffile.imread(cases / name, key=0))
        assert slide.remark == ""


def test_a_pyramid_in_sub_directories_has_its_mpp_and_levels(cases: Path) -> None:
    with open_slide(cases / "ome_subifd.ome.tif") as slide:
        assert (slide.slide_id, slide.mpp.value, slide.mpp.source) == ("ome_subifd", pytest.approx(0.2525), "file")
        with tifffile.TiffFile(slide.path) as file:
            levels = [level.asarray() for level in file.series[0].levels]
        assert slide.level_dimensions == tuple(level.shape[1::-1] for level in levels)
        assert len(levels) > 1
        for number, level in enumerate(levels):
            height, width = level.shape[:2]
            np.testing.assert_array_equal(slide.read_region(0, 0, number, width, height), level)


def test_twelve_bits_in_sixteen_are_refused_by_their_bits(cases: Path) -> None:
    with pytest.raises(LongslideError, match="3 channels of 16 bits, not 8-bit RGB brightfield"):
        open_slide(cases / "twelve_bit_in_16.tif")


def test_pictures_of_tissue_have_a_truth_of_their_size(cases: Path) -> None:
    for truth in (cases / "tissue").glob("*_truth.png"):
        picture = truth.with_name(truth.name.replace("_truth.png", ".jpg"))
        assert cv2.imread(str(truth)).shape[:2] == cv2.imread(str(picture)).shape[:2]
