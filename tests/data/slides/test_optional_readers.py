"""CZI and OME-Zarr by their own libraries: pixels as they were written, everywhere, and refusals that say why."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from longslide import LongslideError, embed, open_slide, read_features, write_synthetic_slide
from longslide.data.slides.base import inside_of
from longslide.data.slides.openslide import OpenSlideReader
from longslide.data.slides.parts import files_of


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """A synthetic slide at 0.5 um/px, (1100, 1500, 3)."""
    path = tmp_path_factory.mktemp("slide") / "a.svs"
    write_synthetic_slide(path, size=(1500, 1100))
    with open_slide(path) as slide:
        return slide.read_region(0, 0, 0, *slide.dimensions)


def write_czi(path: Path, pixels: np.ndarray, compression: str = "zstd1:ExplicitLevel=2") -> Path:
    czi = pytest.importorskip("pylibCZIrw.czi")
    with czi.create_czi(str(path), compression_options=compression) as document:
        for y in range(0, pixels.shape[0], 550):
            for x in range(0, pixels.shape[1], 500):
                part = np.ascontiguousarray(pixels[y : y + 550, x : x + 500, ::-1])
                document.write(part, location=(x, y), scene=0)
        document.write_metadata(document_name="a", scale_x=0.5e-6, scale_y=0.5e-6)
    return path


def write_zarr(
    path: Path, pixels: np.ndarray, *, version: str = "0.5", axes: str = "cyx", unit: str | None = "micrometer"
) -> Path:
    """An OME-Zarr pyramid of three levels; 0.5 is Zarr 3, all earlier ones Zarr 2."""
    zarr = pytest.importorskip("zarr")
    root = zarr.open_group(path, mode="w", zarr_format=3 if version == "0.5" else 2)
    step = 0.5 if unit != "nanometer" else 500.0
    datasets = []
    for number in range(3):
        level = cv2.resize(pixels, None, fx=0.5**number, fy=0.5**number, interpolation=cv2.INTER_AREA)
        array = level.transpose(["yxc".index(axis) for axis in axes if axis in "yxc"])
        array = array.reshape([dict(zip("yxc", level.shape, strict=True)).get(axis, 1) for axis in axes])
        chunks = tuple(256 if axis in "xy" else size for axis, size in zip(axes, array.shape, strict=True))
        root.create_array(str(number), data=np.ascontiguousarray(array), chunks=chunks)
        scale = [step * 2**number if axis in "xy" else 1.0 for axis in axes]
        datasets.append({"path": str(number), "coordinateTransformations": [{"type": "scale", "scale": scale}]})
    described = [{"name": axis, **({"unit": unit} if unit and axis in "xy" else {})} for axis in axes]
    pyramid = {"axes": described, "datasets": datasets}
    if version == "0.5":
        root.attrs["ome"] = {"version": version, "multiscales": [pyramid]}
    else:
        root.attrs["multiscales"] = [{**pyramid, "version": version}]
    return path


def check_pixels(path: Path, pixels: np.ndarray, reader: str) -> None:
    height, width = pixels.shape[:2]
    with open_slide(path) as slide:
        assert (slide.reader, slide.dimensions, slide.mpp.value) == (reader, (width, height), 0.5)
        assert slide.library.startswith("fastslide 0." if reader == "fastslide" else "zarr 3.")
        np.testing.assert_array_equal(slide.read_region(0, 0, 0, width, height), pixels)
        np.testing.assert_array_equal(slide.read_region(333, 217, 0, 300, 200), pixels[217:417, 333:633])
        around = slide.read_region(-20, -10, 0, width + 50, height + 30)
        np.testing.assert_array_equal(around[10 : height + 10, 20 : width + 20], pixels)
        around[10 : height + 10, 20 : width + 20] = 255
        assert (around == 255).all(), "where the slide has no pixels there is its background"
        assert (slide.read_region(width + 5, 0, 0, 30, 30) == 255).all()
        again = pickle.loads(pickle.dumps(slide._reader))
        np.testing.assert_array_equal(again.read_region(5, 7, 0, 40, 30), pixels[7:37, 5:45])
        again.close()


@pytest.mark.parametrize("compression", ["zstd0:", "zstd1:ExplicitLevel=2"])
def test_a_czi_that_openslide_refuses_is_read_by_fastslide(
    tmp_path: Path, pixels: np.ndarray, compression: str
) -> None:
    pytest.importorskip("fastslide")
    check_pixels(write_czi(tmp_path / "a.czi", pixels, compression), pixels, "fastslide")


def test_fastslide_takes_no_format_that_openslide_reads(tmp_path: Path) -> None:
    pytest.importorskip("fastslide")
    write_synthetic_slide(tmp_path / "a.svs", size=(512, 512))
    with pytest.raises(LongslideError, match="the slide reader fastslide does not take it"):
        open_slide(tmp_path / "a.svs", reader="fastslide")


def test_a_vsi_without_its_folder_names_the_folder(tmp_path: Path) -> None:
    pytest.importorskip("fastslide")
    (tmp_path / "a.vsi").write_bytes(b"II*\0" + bytes(64))
    with pytest.raises(LongslideError, match=r"a\.vsi: the folder _a_/ with the slide's data is missing beside it"):
        open_slide(tmp_path / "a.vsi")


def test_the_files_of_a_zarr_and_a_vsi_are_all_of_them(tmp_path: Path, pixels: np.ndarray) -> None:
    folder = write_zarr(tmp_path / "a.zarr", pixels)
    assert set(files_of(folder)) == {path for path in folder.rglob("*") if path.is_file()}
    for name in ("b.vsi", "_b_/stack1/frame_t.ets", "_c_/other.ets"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert files_of(tmp_path / "b.vsi") == [tmp_path / "b.vsi", tmp_path / "_b_/stack1/frame_t.ets"]


def test_a_czi_that_is_cut_is_refused_with_both_reasons(tmp_path: Path, pixels: np.ndarray) -> None:
    pytest.importorskip("fastslide")
    path = write_czi(tmp_path / "a.czi", pixels)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    with pytest.raises(LongslideError) as caught:
        open_slide(path).read_region(0, 0, 0, 1500, 1100)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "kind",
    [
        {"version": "0.5"},
        {"version": "0.4"},
        {"version": "0.4", "axes": "tczyx"},
        {"version": "0.5", "axes": "yxc", "unit": "nanometer"},
    ],
)
def test_ome_zarr_of_every_layout_is_read(tmp_path: Path, pixels: np.ndarray, kind: dict[str, Any]) -> None:
    path = write_zarr(tmp_path / "a.ome.zarr", pixels, **kind)
    check_pixels(path, pixels, "ome-zarr")
    with open_slide(path) as slide:
        assert slide.level_dimensions == ((1500, 1100), (750, 550), (375, 275))
        half = cv2.resize(pixels, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
        np.testing.assert_array_equal(slide.read_region(300, 200, 1, 100, 80), half[100:180, 150:250])


def test_ome_zarr_of_bioformats2raw_has_a_group_for_each_series(tmp_path: Path, pixels: np.ndarray) -> None:
    zarr = pytest.importorskip("zarr")
    zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=2).attrs["bioformats2raw.layout"] = 3
    write_zarr(tmp_path / "a.zarr" / "0", pixels, version="0.4", axes="tczyx")
    check_pixels(tmp_path / "a.zarr", pixels, "ome-zarr")


def test_another_ome_zarr_has_another_quickhash_and_a_copy_the_same(tmp_path: Path, pixels: np.ndarray) -> None:
    one = write_zarr(tmp_path / "a.zarr", pixels)
    other = write_zarr(tmp_path / "b.zarr", np.ascontiguousarray(pixels[::-1]))
    shutil.copytree(one, tmp_path / "c.zarr")
    hashes = []
    for path in (one, other, tmp_path / "c.zarr"):
        with open_slide(path) as slide:
            hashes.append(slide.quickhash)
    assert hashes[0] != hashes[1]
    assert hashes[0] == hashes[2]


def test_what_is_no_rgb_brightfield_or_no_ome_zarr_is_refused_by_name(tmp_path: Path, pixels: np.ndarray) -> None:
    zarr = pytest.importorskip("zarr")
    two = write_zarr(tmp_path / "two.zarr", pixels)
    zarr.open_group(two, mode="a").create_array("0", data=np.zeros((2, 64, 64), np.uint16), overwrite=True)
    with pytest.raises(LongslideError, match=r"two\.zarr: 2 channels of uint16, not 8-bit RGB brightfield"):
        open_slide(two)
    zarr.open_group(tmp_path / "plain.zarr", mode="w")
    with pytest.raises(LongslideError, match=r"plain\.zarr: not a slide .*without `multiscales`: not OME-Zarr"):
        open_slide(tmp_path / "plain.zarr")
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(LongslideError, match=r"empty\.zarr: a broken OME-Zarr"):
        open_slide(tmp_path / "empty.zarr")
    without = write_zarr(tmp_path / "without.zarr", pixels, unit=None)
    with open_slide(without) as slide, pytest.raises(LongslideError, match="does not say its microns per pixel"):
        _ = slide.mpp


@pytest.mark.slow
def test_ome_zarr_and_czi_are_embedded_from_a_folder_and_the_file_says_who_read_them(
    tmp_path: Path, pixels: np.ndarray
) -> None:
    pytest.importorskip("fastslide")
    (tmp_path / "slides").mkdir()
    write_zarr(tmp_path / "slides" / "a.ome.zarr", pixels)
    write_czi(tmp_path / "slides" / "b.czi", pixels)
    results = embed(tmp_path / "slides", tmp_path / "out", "vit_tiny_patch16_224", "random")
    assert [(result.slide_id, result.status) for result in results] == [("a", "done"), ("b", "done")]
    one, other = read_features(tmp_path / "out" / "a.h5"), read_features(tmp_path / "out" / "b.h5")
    assert (one.settings["reader"], other.settings["reader"]) == ("ome-zarr", "fastslide")
    assert other.settings["reader_library"].startswith("fastslide 0.")
    assert len(one.coords) > 5
    again = embed(tmp_path / "slides", tmp_path / "out", "vit_tiny_patch16_224", "random")
    assert [result.reason for result in again] == ["already complete"] * 2


@pytest.mark.parametrize(
    ("rectangle", "part"),
    [
        ((0, 0, 10, 10), (0, 0, slice(0, 10), slice(0, 10))),
        ((-3, 5, 10, 10), (0, 5, slice(0, 10), slice(3, 10))),
        ((95, 45, 10, 10), (95, 45, slice(0, 5), slice(0, 5))),
        ((100, 0, 10, 10), None),
        ((-10, 0, 10, 10), None),
        ((-5, -5, 200, 200), (0, 0, slice(5, 55), slice(5, 105))),
    ],
)
def test_the_part_inside_a_picture(rectangle: tuple[int, int, int, int], part: object) -> None:
    assert inside_of(rectangle, (100, 50)) == part


def test_openslide_says_of_itself_what_decodes(tmp_path: Path) -> None:
    write_synthetic_slide(tmp_path / "a.svs", size=(512, 512))
    with open_slide(tmp_path / "a.svs", reader=OpenSlideReader) as slide:
        assert slide.library.startswith("OpenSlide 4.")
