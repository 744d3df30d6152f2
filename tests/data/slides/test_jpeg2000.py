"""JPEG 2000 and LZW have no checksum: what can be told of damage is, and what is intact never fails."""

import io
import os
from functools import cache
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from longslide.data.slides.jpeg2000 import jpeg2000_damage, jpeg2000_size
from longslide.data.slides.slide import open_slide
from longslide.errors import LongslideError
from PIL import Image

from . import tiff_files as files

KINDS: dict[str, dict[str, object]] = {
    "lossy": {"quality_mode": "rates", "quality_layers": [20], "irreversible": True},
    "lossless": {},
    "layers": {"quality_mode": "dB", "quality_layers": [30, 40], "progression": "RLCP"},
    "tiles": {"tile_size": (128, 128), "irreversible": True, "quality_mode": "rates", "quality_layers": [10]},
    "boxes": {"no_jp2": False},
    "lengths": {"plt": True},
}


@cache
def stream_of(kind: str) -> bytes:
    memory = io.BytesIO()
    Image.fromarray(files.tissue(512, 512)).save(memory, "JPEG2000", **({"no_jp2": True} | KINDS[kind]))
    return memory.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_an_intact_stream_is_intact_whatever_follows_it(kind: str) -> None:
    stream = stream_of(kind)
    assert jpeg2000_size(stream) == (512, 512)
    for after in (b"", bytes(1000), b"\xff\xd9\xff\x90"):
        assert jpeg2000_damage(stream + after) == ""


def test_real_streams_are_intact() -> None:
    folder = os.environ.get("LONGSLIDE_TEST_CASES")
    if not folder:
        pytest.skip("LONGSLIDE_TEST_CASES, the folder with comp_jpeg2000.tif, is not set")
    path = Path(folder) / "comp_jpeg2000.tif"
    content = path.read_bytes()
    found = [content[offset : offset + count] for offset, count in files.places(path)]
    assert [jpeg2000_damage(one) for one in found] == [""] * len(found) != []


@pytest.mark.parametrize("kind", KINDS)
def test_lost_and_added_bytes_are_damage(kind: str) -> None:
    stream = stream_of(kind)
    rng = np.random.default_rng(0)
    for _ in range(50):
        at, size = int(rng.integers(200, len(stream) - 200)), int(rng.integers(1, 100))
        assert jpeg2000_damage(stream[:at])
        assert jpeg2000_damage(stream[:at] + stream[at + size :])
        assert jpeg2000_damage(stream[:at] + bytes(size) + stream[at:])
    assert jpeg2000_damage(stream[1:])
    assert jpeg2000_damage(b"")


def test_most_noise_is_damage() -> None:
    stream = stream_of("lossy")
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(200):
        at = int(rng.integers(200, len(stream) - 2000))
        found += bool(jpeg2000_damage(stream[:at] + rng.bytes(1500) + stream[at + 1500 :]))
    assert found > 160  # a coder never writes 112 of the 256 bytes that may follow 0xFF


def test_damaged_lzw_that_gives_another_number_of_bytes_is_an_error(tmp_path: Path) -> None:
    image = files.tissue(256, 256)
    stream = imagecodecs.lzw_encode(image.tobytes())
    tifffile.imwrite(tmp_path / "a.tif", image, tile=(256, 256), photometric="rgb", compression="lzw", metadata=None)
    [(offset, count)] = files.places(tmp_path / "a.tif")
    assert count == len(stream)
    rng = np.random.default_rng(0)
    told = 0
    for number in range(60):
        damaged = bytearray(stream)
        damaged[int(rng.integers(100, count))] ^= int(rng.integers(1, 256))
        path = tmp_path / f"{number}.tif"
        path.write_bytes((tmp_path / "a.tif").read_bytes())
        files.overwrite(path, offset, bytes(damaged))
        with open_slide(path, slide_mpp=0.5) as slide:
            if slide.reader != "tiff":
                continue
            try:
                slide.read_region(0, 0, 0, 256, 256)
            except LongslideError:
                told += 1
    assert told > 25
