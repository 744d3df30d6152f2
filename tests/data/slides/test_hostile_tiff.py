"""TIFF files damaged anywhere: an error, a failed read or OpenSlide's pixels; never a crash, a hang or a huge allocation."""

import struct
import time
import tracemalloc
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import tifffile
from longslide.data.slides.base import DeclinedError
from longslide.data.slides.native_tiles import DamagedTileError, NativeTiles
from longslide.data.slides.openslide import OpenSlideReader
from longslide.data.slides.tiled_tiff import TiledTiffReader
from longslide.errors import LongslideError

from . import tiff_files as files

KINDS = {
    "jpeg.tif": lambda path: files.write_jpeg_tiff(path, files.tissue(700, 500)),
    "aperio.svs": lambda path: files.write_jpeg_tiff(path, files.tissue(700, 500), aperio=True),
    "deflate.tif": lambda path: files.write_tiff(path, files.tissue(700, 500), compression="zlib", predictor=True),
    "lzw.tif": lambda path: files.write_tiff(path, files.tissue(700, 500), compression="lzw"),
    "webp.tif": lambda path: files.write_tiff(path, files.tissue(700, 500), compression="webp"),
    "jpeg2000.tif": lambda path: files.write_tiff(path, files.tissue(700, 500), compression="jpeg2000"),
    "planes.tif": lambda path: files.write_tiff(
        path, files.tissue(700, 500), compression="zlib", planarconfig="separate"
    ),
}


def directories(path: Path) -> list[tuple[int, int]]:
    """(first byte, bytes) of the header, of each directory and of the values that tags point to."""
    with tifffile.TiffFile(path) as file:
        found = [(0, 16)]
        for page in file.pages:
            found.append((page.offset, 2 + 12 * len(page.tags) + 4))
            found += [(tag.valueoffset, tag.valuebytecount) for tag in page.tags.values() if tag.valueoffset > 16]
    return found


def damaged(content: bytes, places: list[tuple[int, int]], rng: np.random.Generator) -> bytes:
    changed = bytearray(content)
    how = rng.integers(4)
    if how == 0:
        return content[: int(rng.integers(1, len(content)))]
    for _ in range(int(rng.integers(1, 8 if how < 3 else 60))):
        first, count = places[int(rng.integers(len(places)))] if how < 3 else (0, len(content))
        changed[min(first + int(rng.integers(count)), len(content) - 1)] = int(
            rng.choice([0, 1, 127, 255, rng.integers(256)])
        )
    return bytes(changed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_files_damaged_at_random_end_in_an_error_or_in_openslides_pixels(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    KINDS[kind](path)
    content, places = path.read_bytes(), directories(path)
    rng = np.random.default_rng(0)
    seen: Counter[str] = Counter()
    for _ in range(120):
        path.write_bytes(damaged(content, places, rng))
        started = time.process_time()
        try:
            reader = TiledTiffReader(path)
        except (DeclinedError, LongslideError):
            seen["refused"] += 1
            continue
        try:
            reference: OpenSlideReader | None = OpenSlideReader(path)
        except (DeclinedError, LongslideError):
            reference = None
        for level in range(len(reader.level_dimensions)):
            for x, y in ((0, 0), (300, 200)):
                try:
                    pixels = reader.read_region(x, y, level, 300, 300)
                except LongslideError:
                    seen["failed read"] += 1
                    continue
                seen["read"] += 1
                if reference is not None and level < len(reference.level_dimensions):
                    np.testing.assert_array_equal(pixels, reference.read_region(x, y, level, 300, 300))
        reader.close()
        assert time.process_time() - started < 10
    assert min(seen["refused"], seen["failed read"], seen["read"]) > 3


def with_tag(path: Path, code: int, value: int) -> None:
    """Give a tag of the first directory another value, of 32 bits, in place."""
    with tifffile.TiffFile(path) as file:
        offset = file.pages.first.tags[code].offset
    files.overwrite(path, offset + 2, struct.pack("<HII", 4, 1, value))


def refused_without_memory(path: Path) -> None:
    tracemalloc.start()
    try:
        with pytest.raises((DeclinedError, LongslideError)):
            TiledTiffReader(path)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("code", "value"), [(256, 4_000_000_000), (257, 4_000_000_000), (322, 60_000), (322, 2**31), (322, 0), (323, 0)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_declared_sizes_beyond_the_file_allocate_nothing(tmp_path: Path, kind: str, code: int, value: int) -> None:
    path = tmp_path / kind
    KINDS[kind](path)
    with_tag(path, code, value)
    refused_without_memory(path)


def test_a_declared_count_of_tiles_beyond_the_file_allocates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    KINDS["webp.tif"](path)
    with tifffile.TiffFile(path) as file:
        offset = file.pages.first.tags[324].offset
    files.overwrite(path, offset + 4, struct.pack("<I", 2**31))
    refused_without_memory(path)


def test_directories_in_a_circle_end(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    KINDS["webp.tif"](path)
    with tifffile.TiffFile(path) as file:
        page = file.pages.first
        following = page.offset + 2 + 12 * len(page.tags)
        first = page.offset
    files.overwrite(path, following, struct.pack("<I", first))
    started = time.process_time()
    with suppress(DeclinedError, LongslideError):
        TiledTiffReader(path).close()
    assert time.process_time() - started < 5


@pytest.mark.parametrize("codec", ["webp", "jpeg2000", "jpegxl"])
def test_a_stream_of_more_pixels_than_a_tile_has_is_refused_before_it_is_decoded(tmp_path: Path, codec: str) -> None:
    path, large = tmp_path / "a.tif", tmp_path / "large.tif"
    for where, edge in ((path, 256), (large, 2048)):
        blank = np.zeros((edge, edge, 3), np.uint8)
        tifffile.imwrite(where, blank, tile=(edge, edge), photometric="rgb", compression=codec, metadata=None)
    with tifffile.TiffFile(path) as file:
        tiles = NativeTiles.of(file.pages.first)
    [(offset, count)] = files.places(path)
    assert tiles.decode([path.read_bytes()[offset : offset + count]]).shape == (256, 256, 3)
    [(offset, count)] = files.places(large)
    with pytest.raises(DamagedTileError):
        tiles.decode([large.read_bytes()[offset : offset + count]])
