"""README's table of what is read: its suffixes are those that folders are searched for, and a test tries each row."""

import re
from pathlib import Path

from longslide.data.slides.folder import folders_looked_at, looked_at

ROOT = Path(__file__).parents[3]

TRIED = {
    "Aperio SVS": "test_slide.py::test_a_read_inside_the_real_slide_is_openslides_pixel_for_pixel",
    "OME-TIFF, pyramid in SubIFDs or not": "test_cases.py::test_a_pyramid_in_sub_directories_has_its_mpp_and_levels",
    "TIFF in tiles or strips, also JPEG 2000, WebP, JPEG XL, 16 bits, planar": (
        "test_tiled_tiff.py::test_codecs_that_openslide_lacks_are_read "
        "test_tiled_tiff.py::test_colours_in_separate_planes_are_put_together "
        "test_tiled_tiff.py::test_16_bits_are_scaled_by_the_files_own_word "
        "test_striped_tiff.py::test_pixels_are_pillows "
        "test_cases.py::test_codecs_that_openslide_lacks_are_read_as_tifffile_reads_them"
    ),
    "Philips TIFF; Akoya QPTIFF (brightfield)": (
        "test_tiled_tiff.py::test_philips_levels_padded_to_whole_tiles_are_openslides "
        "test_tiled_tiff.py::test_a_brightfield_qptiff_has_its_levels_and_the_mpp_of_its_resolution"
    ),
    "DICOM, one slide for each series": (
        "test_cases.py::test_two_series_in_a_folder_are_two_slides "
        "test_dicom.py::test_a_level_in_several_files_is_one_slide_with_the_same_pixels"
    ),
    "Leica SCN": "test_bounds.py::test_tissue_tiles_and_area_are_those_of_the_scanned_area_alone",
    "Hamamatsu, MIRAX, Ventana, Sakura, Trestle": (
        "test_parts.py::test_an_mrxs_names_the_folder_or_file_that_is_missing "
        "test_parts.py::test_a_hamamatsu_index_names_the_picture_that_is_missing"
    ),
    "Zeiss CZI": "test_optional_readers.py::test_a_czi_that_openslide_refuses_is_read_by_fastslide",
    "Philips iSyntax, Olympus VSI": "",
    "OME-Zarr 0.4 and 0.5, also of bioformats2raw": (
        "test_optional_readers.py::test_ome_zarr_of_every_layout_is_read "
        "test_optional_readers.py::test_ome_zarr_of_bioformats2raw_has_a_group_for_each_series"
    ),
    "plain images, up to 250 million pixels (`.jp2` 75, `.webp` 93, progressive `.jpg` 150)": (
        "test_slide.py::test_a_read_returns_the_pixels_of_the_file "
        "test_slide.py::test_the_memory_that_a_plain_image_takes_is_known_before_it_is_decoded"
    ),
}


def rows() -> list[list[str]]:
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## What is read")[1].split("\n##")[0]
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def test_the_suffixes_of_the_table_are_those_that_folders_are_searched_for() -> None:
    # Beside them .jpeg, and .zvi, which nothing reads: it is refused by name and not passed over.
    named = {Path("slide" + name).suffix for row in rows() for name in re.findall(r"`(\.[\w.]+)`", row[1])}
    assert named | {".jpeg", ".zvi"} == looked_at(None) | folders_looked_at(None)


def test_each_row_is_tried_by_a_test_or_says_that_it_is_not() -> None:
    assert [row[0] for row in rows()] == list(TRIED)
    for name, _, _, tried_on in rows():
        assert TRIED[name] or tried_on == "not tried"
        for test in TRIED[name].split():
            file, function = test.split("::")
            assert f"def {function}(" in Path(__file__).with_name(file).read_text(encoding="utf-8"), test
