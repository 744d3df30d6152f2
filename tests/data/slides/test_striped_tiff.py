"""TIFF files in strips, which OpenSlide does not read: strip by strip, whatever their size, with the pixels of libtiff."""

import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from longslide.data.slides import image, native_tiles
from longslide.data.slides.slide import open_slide
from longslide.errors import LongslideError
from PIL import Image

from . import tiff_files as files

PILLOWS = {
    "raw": {},
    "lzw": {"compression": "tiff_lzw"},
    "lzw-predicted": {"compression": "tiff_lzw", "tiffinfo": {317: 2}},
    "deflate": {"compression": "tiff_adobe_deflate"},
    "packbits": {"compression": "packbits"},
    "jpeg": {"compression": "jpeg"},
}


@pytest.mark.parametrize("rows", [1, 16, 64, 5000])
@pytest.mark.parametrize("kind", PILLOWS)
def test_pixels_are_pillows(tmp_path: Path, kind: str, rows: int) -> None:
    pixels, path = files.tissue(), tmp_path / "a.tif"
    options = PILLOWS[kind] | {"strip_size": rows * pixels.shape[1] * 3, "dpi": (50_800, 50_800)}
    Image.fromarray(pixels).save(path, **options)
    with Image.open(path) as picture:
        expected = np.asarray(picture)
    with open_slide(path) as slide:
        assert (slide.reader, slide.remark) == ("tiff", "")
        assert slide.mpp.value == pytest.approx(0.5)
        assert slide.memory_bytes == 0
        height, width = expected.shape[:2]
        np.testing.assert_array_equal(slide.read_region(0, 0, 0, width, height), expected)
        np.testing.assert_array_equal(slide.read_region(700, 500, 0, 256, 256), expected[500:756, 700:956])
        assert (slide.read_region(width - 10, height - 10, 0, 20, 20)[10:, 10:] == 255).all()


@pytest.mark.parametrize("codec", ["webp", "jpegxl", "jpeg2000", "zstd"])
def test_codecs_that_pillow_lacks_are_read(tmp_path: Path, codec: str) -> None:
    pixels, path = files.tissue(), tmp_path / "a.tif"
    tifffile.imwrite(path, pixels, photometric="rgb", compression=codec, rowsperstrip=100)
    with open_slide(path) as slide:
        np.testing.assert_array_equal(slide.read_region(0, 0, 0, 1003, 777), tifffile.imread(path))


def test_separate_planes_and_16_bits_are_read(tmp_path: Path) -> None:
    pixels = files.tissue()
    planes, deep = tmp_path / "planes.tif", tmp_path / "deep.tif"
    tifffile.imwrite(planes, np.moveaxis(pixels, -1, 0), photometric="rgb", planarconfig="separate", rowsperstrip=30)
    tags = [(281, "H", 3, (4095, 4095, 4095), True)]
    tifffile.imwrite(deep, pixels.astype(np.uint16) * 16, photometric="rgb", rowsperstrip=30, extratags=tags)
    for path, tolerance in ((planes, 0), (deep, 1)):
        with open_slide(path) as slide:
            read = slide.read_region(0, 0, 0, 1003, 777)
            assert np.abs(read.astype(int) - pixels).max() <= tolerance


def test_a_damaged_strip_is_an_error_and_the_others_are_whole(tmp_path: Path) -> None:
    pixels, path = files.tissue(), tmp_path / "a.tif"
    tifffile.imwrite(path, pixels, photometric="rgb", compression="zlib", rowsperstrip=100)
    with tifffile.TiffFile(path) as file:
        page = file.pages.first
        offset, count = page.dataoffsets[3], page.databytecounts[3]
    files.overwrite(path, offset, bytes(count))
    with open_slide(path, slide_mpp=0.5) as slide:
        np.testing.assert_array_equal(slide.read_region(0, 400, 0, 1003, 300), pixels[400:700])
        with pytest.raises(LongslideError, match="native tile"):
            slide.read_region(500, 350, 0, 10, 10)
        slide.thumbnail(200)
        assert slide.unreadable_areas


def test_a_cut_file_is_called_truncated(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, files.tissue(), photometric="rgb", rowsperstrip=100)
    path.write_bytes(path.read_bytes()[:1_500_000])
    with pytest.raises(LongslideError, match="truncated"):
        open_slide(path)


def test_a_wide_picture_is_never_whole_in_memory_and_each_strip_is_decoded_about_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.tif"
    wide = np.tile(files.tissue(1000, 750), (4, 12, 1))
    tifffile.imwrite(path, wide, photometric="rgb", compression="zlib", rowsperstrip=16)
    decode, decoded = native_tiles.NativeTiles.decode, []

    def counted(self: native_tiles.NativeTiles, *given: object, **more: object) -> np.ndarray:
        decoded.append(1)
        return decode(self, *given, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(native_tiles.NativeTiles, "decode", counted)
    with open_slide(path) as slide:
        slide._reader.cache_bytes = 16 * 2**20  # that of a slide several times as wide
        tracemalloc.start()
        thumbnail = slide.thumbnail(1200)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        np.testing.assert_array_equal(thumbnail.shape, (300, 1200, 3))
        expected = cv2.resize(wide, (1200, 300), interpolation=cv2.INTER_AREA)
        assert np.abs(thumbnail.astype(int) - expected).mean() < 1
        assert len(decoded) <= 1.2 * wide.shape[0] / 16
        assert peak < 0.6 * wide.nbytes


def test_a_strip_that_is_too_large_is_left_to_pillow_within_its_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, files.tissue(), photometric="rgb", rowsperstrip=777)
    monkeypatch.setattr(native_tiles, "MAX_STRIP_BYTES", 2_000_000)
    assert image.decoding_bytes(path) == 8 * 1003 * 777
    with open_slide(path) as slide:
        assert slide.reader == "image"
        np.testing.assert_array_equal(slide.read_region(0, 0, 0, 1003, 777), files.tissue())


def test_a_thumbnail_under_a_slides_suffix_is_no_slide(tmp_path: Path) -> None:
    path = tmp_path / "a.svs"
    tifffile.imwrite(path, files.tissue(), photometric="rgb", rowsperstrip=16)
    with pytest.raises(LongslideError, match="plain TIFF image"):
        open_slide(path)
