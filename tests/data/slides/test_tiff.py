"""TIFF files that would be read wrongly are refused by what they are; their own microns per pixel count."""

import os
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from longslide.data.slides.slide import open_slide
from longslide.data.synthetic import write_synthetic_slide
from longslide.errors import LongslideError

from ..refusals import refused

RGB = np.full((512, 512, 3), 180, np.uint8)


def refusal(path: Path) -> str:
    message = refused(open_slide, path)
    assert str(path) in message
    return message


def case(name: str) -> Path:
    folder = os.environ.get("LONGSLIDE_TEST_CASES")
    if not folder:
        pytest.skip(f"LONGSLIDE_TEST_CASES, the folder with {name}, is not set")
    return Path(folder) / name


def test_16_bits_of_which_the_file_does_not_say_how_many_count_are_refused() -> None:
    message = refusal(case("twelve_bit_in_16.tif"))
    assert "3 channels of 16 bits" in message
    assert "convert it" in message
    assert "truncated" not in message


@pytest.mark.parametrize(("codec", "what"), [("webp", "WebP"), ("jpegxl", "JPEG XL"), ("jpeg2000", "JPEG 2000")])
def test_what_is_neither_rgb_nor_in_a_codec_of_pillows_is_refused_by_its_codec(
    tmp_path: Path, codec: str, what: str
) -> None:
    four = np.dstack([RGB, RGB[..., :1]])
    tifffile.imwrite(tmp_path / "a.tif", four, photometric="rgb", extrasamples=["unassalpha"], compression=codec)
    message = refusal(tmp_path / "a.tif")
    assert f"compressed by {what}, which is read here as RGB alone" in message
    assert "convert it" in message
    assert "truncated" not in message


def test_the_real_ome_tiff_keeps_its_own_mpp() -> None:
    with open_slide(case("ome_subifd.ome.tif")) as slide:
        assert slide.mpp.value == pytest.approx(0.2525)
        assert slide.mpp.source == "file"


@pytest.mark.parametrize("tile", [None, (256, 256)])
def test_what_is_not_8_bit_chunky_rgb_is_refused(tmp_path: Path, tile: tuple[int, int] | None) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, RGB.astype(np.uint16) * 16, tile=tile, photometric="rgb")
    assert "3 channels of 16 bits" in refusal(path)
    four = np.moveaxis(np.dstack([RGB, RGB[..., :1]]), -1, 0)
    tifffile.imwrite(path, four, tile=tile, photometric="rgb", planarconfig="separate", extrasamples=["unassalpha"])
    assert "separate planes, which are read here as RGB alone" in refusal(path)
    stack = np.zeros((4, 512, 512), np.uint8)
    tifffile.imwrite(tmp_path / "a.ome.tif", stack, tile=tile, photometric="minisblack", metadata={"axes": "CYX"})
    assert "4 grey channels" in refusal(tmp_path / "a.ome.tif")


@pytest.mark.parametrize(("unit", "size"), [("µm", 0.2525), ("nm", 252.5), ("mm", 0.0002525)])
def test_ome_metadata_state_the_mpp_in_any_unit(tmp_path: Path, unit: str, size: float) -> None:
    stated = {"PhysicalSizeX": size, "PhysicalSizeXUnit": unit, "PhysicalSizeY": size, "PhysicalSizeYUnit": unit}
    tifffile.imwrite(tmp_path / "a.ome.tif", RGB, tile=(256, 256), photometric="rgb", metadata={"axes": "YXS"} | stated)
    with open_slide(tmp_path / "a.ome.tif") as slide:
        assert slide.mpp.value == pytest.approx(0.2525)


@pytest.mark.parametrize(
    ("unit", "size"), [("um", 0.2525), ("\\u00B5m", 0.2525), ("micron", 0.2525), ("mm", 0.0002525)]
)
def test_imagejs_unit_is_that_of_the_resolution_tags(tmp_path: Path, unit: str, size: float) -> None:
    how: dict[str, Any] = {"imagej": True, "resolution": (1 / size, 1 / size), "metadata": {"unit": unit}}
    tifffile.imwrite(tmp_path / "a.tif", RGB, **how)
    with open_slide(tmp_path / "a.tif") as slide:
        assert (slide.mpp.value, slide.mpp.source) == (pytest.approx(0.2525), "file")


def test_a_truncated_svs_is_called_truncated(tmp_path: Path) -> None:
    path = write_synthetic_slide(tmp_path / "a.svs", size=(1536, 1024))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    assert "truncated" in refusal(path)


def test_a_tiff_with_a_broken_directory_is_no_plain_image(tmp_path: Path) -> None:
    """Pillow shows such a file as if it were whole, and grey where its tiles are damaged."""
    path = write_synthetic_slide(tmp_path / "a.tif", size=(1024, 768))
    with tifffile.TiffFile(path) as tiff:
        second = tiff.pages[1].offset
    with path.open("r+b") as file:
        file.seek(second)
        file.write(b"\xaa" * 64)
    assert "broken TIFF" in refusal(path)


def test_a_plain_image_too_large_for_memory_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 40_000, 30_000, 8, 2, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )
    assert "4.8 GB of memory" in refusal(tmp_path / "a.png")


def test_a_size_that_the_directory_has_no_tiles_for_is_refused_at_once(tmp_path: Path) -> None:
    """By a header of 1,000,000 x 50,000 px, of which OpenSlide would look for every tile."""
    path = write_synthetic_slide(tmp_path / "a.svs", size=(1024, 768))
    with tifffile.TiffFile(path) as tiff:
        entries = [
            (tiff.pages.first.tags[name].offset, px) for name, px in (("ImageWidth", 10**6), ("ImageLength", 50_000))
        ]
    with path.open("r+b") as file:
        for offset, px in entries:
            file.seek(offset + 2)
            file.write(struct.pack("<HII", 4, 1, px))
    began = time.process_time()
    for reader in (None, "openslide"):
        with pytest.raises(
            LongslideError, match=r"says 1,000,000 x 50,000 px, which are [\d,]+ native tiles"
        ) as refused:
            open_slide(path, reader=reader)
        assert str(path) in str(refused.value)
    assert time.process_time() - began < 5
