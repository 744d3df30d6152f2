"""What a TIFF file says of its pixels, and why OpenSlide or Pillow would read it wrongly or not at all."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path

import tifffile

from ...plurals import count

CODECS = {34712: "JPEG 2000", 50001: "WebP", 50002: "JPEG XL", 52546: "JPEG XL", 34887: "LERC"}
"""Compressions of TIFF files that OpenSlide does not read, by their numbers."""

logging.getLogger("tifffile").addHandler(logging.NullHandler())  # what it finds is said in one line of ours

_CONVERT = "convert it, for instance by `vips tiffsave IN OUT.tif --tile --pyramid --compression jpeg`"
_MICRONS = {
    "nm": 1e-3,
    "um": 1.0,
    "µm": 1.0,
    "μm": 1.0,
    "micron": 1.0,
    "microns": 1.0,
    "mm": 1e3,
    "cm": 1e4,
    "inch": 25_400.0,
}


@dataclass(frozen=True)
class TiffFacts:
    """What a TIFF file says of its first image.

    Attributes:
        refusal: Why its pixels cannot be read here, and what to do; empty if nothing is against it.
        mpp: Microns per pixel in x and y by its OME or ImageJ metadata, as text.
        lacking: Which native tiles belong to an image of its size and are not in its directory; empty if none.
    """

    refusal: str = ""
    mpp: tuple[str, str] | None = None
    lacking: str = ""


def is_tiff(path: Path) -> bool:
    """Whether a file begins as a TIFF file does."""
    with path.open("rb") as file:
        return file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def tiff_facts(path: Path) -> TiffFacts | None:
    """Look at a file's TIFF directory; None if it is no TIFF file."""
    if not is_tiff(path):
        return None
    try:
        with tifffile.TiffFile(path) as tiff:
            return _facts(tiff, tiff.pages.first)
    except Exception as error:  # whatever a broken directory makes of the parser
        reason = " ".join(str(error).split())
        return TiffFacts(f"a truncated or broken TIFF ({reason or type(error).__name__}); copy it again")


def broken_directory(path: Path) -> str:
    """Why a directory of a TIFF file, of whichever of its pages, cannot be read; empty if all can, or it is no TIFF file."""
    if not is_tiff(path):
        return ""
    try:
        with tifffile.TiffFile(path) as tiff:
            for _ in tiff.pages:
                pass
    except Exception as error:  # whatever a broken directory makes of the parser
        return " ".join(str(error).split()) or type(error).__name__
    return ""


def white_of(tiff: tifffile.TiffFile) -> int | None:
    """The largest value of a sample of 16 bits by the file's own word; None if it does not say."""
    tags = tiff.pages.first.tags
    stated = tags.valueof(281) or tags.valueof(341)  # MaxSampleValue, SMaxSampleValue
    if stated is not None:
        white = max(stated) if isinstance(stated, tuple) else stated
        return int(white) if 0 < white < 2**16 else None
    bits = re.search(r'<(?:\w+:)?Pixels\b[^>]*\bSignificantBits="(\d+)"', tiff.ome_metadata or "")
    return 2 ** int(bits.group(1)) - 1 if bits and 8 <= int(bits.group(1)) <= 16 else None


def _facts(tiff: tifffile.TiffFile, page: tifffile.TiffPage) -> TiffFacts:
    belong, there = _native_tiles(page), len(page.dataoffsets)
    if there < belong:  # a size that is not true: OpenSlide would read nothing, for minutes
        lacking = (
            f"broken: its header says {page.imagewidth:,} x {page.imagelength:,} px, which are {belong:,} native tiles or "
            f"strips, of which it has {there:,}; copy it again"
        )
        return TiffFacts(lacking, lacking=lacking)
    size = tiff.filehandle.size
    ends = [offset + count for offset, count in zip(page.dataoffsets, page.databytecounts, strict=False)]
    if ends and max(ends) > size:
        return TiffFacts(f"truncated: its pixels end at byte {max(ends):,}, the file at {size:,}; copy it again")
    mpp = _ome_mpp(tiff.ome_metadata or "") if tiff.is_ome else _imagej_mpp(page)
    codec = CODECS.get(int(page.compression))
    if codec is not None:
        read = "which is not read here" if codec == "LERC" else "which is read here as RGB alone"
        return TiffFacts(f"its pixels are compressed by {codec}, {read}; {_CONVERT}", mpp)
    bits = page.bitspersample
    if isinstance(bits, tuple):
        bits = max(bits)
    if bits > 8:
        what = f"{count(page.samplesperpixel, 'channel')} of {bits} bits"
        read = "; RGB of 16 bits is read where the file says which value is white" if bits == 16 else ""
        return TiffFacts(f"{what}, not 8-bit RGB brightfield{read}; scale and {_CONVERT}", mpp)
    if page.samplesperpixel > 1 and int(page.planarconfig) == 2:
        return TiffFacts(
            f"its colours are stored in separate planes, which are read here as RGB alone; {_CONVERT}", mpp
        )
    if page.samplesperpixel == 1 and (channels := _channels(tiff)) > 1:
        return TiffFacts(f"{channels} grey channels: fluorescence or multiplex, not 8-bit RGB brightfield", mpp)
    return TiffFacts("", mpp)


def _native_tiles(page: tifffile.TiffPage) -> int:
    """Tiles or strips that an image of this size has."""
    planes = page.samplesperpixel if int(page.planarconfig) == 2 else 1
    if page.is_tiled:
        return planes * -(-page.imagewidth // page.tilewidth) * -(-page.imagelength // page.tilelength)
    rows = page.rowsperstrip or page.imagelength
    return int(planes * -(-page.imagelength // rows))


def _channels(tiff: tifffile.TiffFile) -> int:
    if not (tiff.is_ome or tiff.is_imagej or tiff.is_qpi):
        return 1
    series = tiff.series[0]
    return int(dict(zip(series.axes, series.shape, strict=False)).get("C", 1))


def _ome_mpp(metadata: str) -> tuple[str, str] | None:
    pixels = re.search(r"<(?:\w+:)?Pixels\b[^>]*>", metadata)
    if pixels is None:
        return None
    stated = dict(re.findall(r'(\w+)="([^"]*)"', pixels.group()))
    found = []
    for axis in "XY":
        size, unit = stated.get(f"PhysicalSize{axis}"), stated.get(f"PhysicalSize{axis}Unit", "µm")
        if size is None or unit not in _MICRONS:
            return None
        try:
            found.append(f"{float(size) * _MICRONS[unit]:.12g}")
        except ValueError:
            return None
    return found[0], found[1]


def _imagej_mpp(page: tifffile.TiffPage) -> tuple[str, str] | None:
    if not page.is_imagej:
        return None
    unit = re.search(r"^unit=(.+)$", page.description, re.MULTILINE)
    name = unit.group(1).strip().replace("\\u00B5", "µ") if unit else ""
    found = []
    for code in (282, 283):  # XResolution, YResolution: pixels per unit
        tag = page.tags.get(code)
        if tag is None or name not in _MICRONS or not tag.value[0]:
            return None
        found.append(f"{_MICRONS[name] * tag.value[1] / tag.value[0]:.12g}")
    return found[0], found[1]
