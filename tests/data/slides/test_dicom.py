"""DICOM: a slide is a series, and a level of it may be several files, a concatenation."""

import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from longslide import open_slide
from longslide.data.slides.slide_table import find_slides
from longslide.errors import LongslideError

LONG = {b"OB", b"OW", b"SQ", b"UN", b"UT"}
SOP_INSTANCE, FRAMES, PIXELS = (0x0008, 0x0018), (0x0028, 0x0008), (0x7FE0, 0x0010)
ITEM, UNKNOWN = b"\xfe\xff\x00\xe0", b"\xff\xff\xff\xff"


def elements_of(content: bytes) -> dict[tuple[int, int], bytes]:
    """Each element of an explicit little-endian file with the bytes that it takes, up to its pixels."""
    elements, position = {}, 132
    while True:
        tag = struct.unpack_from("<HH", content, position)
        if content[position + 4 : position + 6] in LONG:
            end = position + 12 + struct.unpack_from("<I", content, position + 8)[0]
        else:
            end = position + 8 + struct.unpack_from("<H", content, position + 6)[0]
        if tag == PIXELS:
            return {**elements, PIXELS: content[position:]}
        elements[tag], position = content[position:end], end


def element(tag: tuple[int, int], kind: bytes, value: bytes) -> bytes:
    value += (b"\0" if kind == b"UI" else b" ") * (len(value) % 2)
    return struct.pack("<HH", *tag) + kind + struct.pack("<H", len(value)) + value


def frames_of(pixels: bytes) -> list[bytes]:
    """The fragments after the table of offsets, each with its head."""
    items, position = [], 12
    while pixels[position : position + 4] == ITEM:
        end = position + 8 + struct.unpack_from("<I", pixels, position + 4)[0]
        items.append(pixels[position:end])
        position = end
    return items[1:]


def concatenate(source: Path, targets: list[Path]) -> None:
    """Write a file of one level as a concatenation (PS3.3, C.7.6.16.2.2.4): so many files, each with some of its frames."""
    content = source.read_bytes()
    elements = elements_of(content)
    uid = elements[SOP_INSTANCE][8:].rstrip(b"\0")
    frames = frames_of(elements[PIXELS])
    for number, part in enumerate(np.array_split(np.arange(len(frames)), len(targets))):
        name = uid[:-2] + b"%02d" % number
        data = ITEM + bytes(4) + b"".join(frames[index] for index in part) + b"\xfe\xff\xdd\xe0" + bytes(4)
        changed = {
            **elements,
            (0x0002, 0x0003): element((0x0002, 0x0003), b"UI", name),
            SOP_INSTANCE: element(SOP_INSTANCE, b"UI", name),
            (0x0020, 0x0242): element((0x0020, 0x0242), b"UI", uid),
            (0x0020, 0x9161): element((0x0020, 0x9161), b"UI", uid[:-2] + b"99"),
            (0x0020, 0x9162): element((0x0020, 0x9162), b"US", struct.pack("<H", number + 1)),
            (0x0020, 0x9163): element((0x0020, 0x9163), b"US", struct.pack("<H", len(targets))),
            (0x0020, 0x9228): element((0x0020, 0x9228), b"UL", struct.pack("<I", part[0])),
            FRAMES: element(FRAMES, b"IS", b"%d" % len(part)),
            PIXELS: struct.pack("<HH", *PIXELS) + b"OB\0\0" + UNKNOWN + data,
        }
        targets[number].write_bytes(content[:132] + b"".join(changed[tag] for tag in sorted(changed)))


@pytest.fixture
def series() -> Path:
    """The folder of a series whose level 0 is s1_73020434.dcm."""
    cases = os.environ.get("LONGSLIDE_TEST_CASES")
    if not cases:
        pytest.skip("LONGSLIDE_TEST_CASES, the folder with dicom_two_series, is not set")
    return Path(cases) / "dicom_two_series"


def test_a_level_in_several_files_is_one_slide_with_the_same_pixels(series: Path, tmp_path: Path) -> None:
    for name in ("s1_34553435.dcm", "s1_97956864.dcm"):
        shutil.copyfile(series / name, tmp_path / name)
    concatenate(series / "s1_73020434.dcm", [tmp_path / f"level-0-{number}.dcm" for number in range(3)])
    [entry] = find_slides(tmp_path)
    with open_slide(series / "s1_73020434.dcm") as slide:
        expected = slide.read_region(0, 0, 0, *slide.dimensions)
    for path in (entry.path, tmp_path / "level-0-1.dcm"):
        with open_slide(path) as slide:
            assert slide.dimensions == (1024, 1024)
            assert np.array_equal(slide.read_region(0, 0, 0, 1024, 1024), expected)


def test_a_missing_part_of_a_level_is_named(series: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"level-0-{number}.dcm" for number in range(3)]
    concatenate(series / "s1_73020434.dcm", files)
    files[1].unlink()
    with pytest.raises(LongslideError, match="2/3 in concatenation"):
        open_slide(files[0])
