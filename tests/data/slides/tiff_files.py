"""Tiled TIFF files of many kinds, made of synthetic tissue."""

import struct
from functools import cache, partial
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import simplejpeg
import tifffile
from longslide.data.slides.slide import open_slide
from longslide.data.synthetic import write_synthetic_slide

APERIO = "Aperio Image Library v12.0.0\r\n{width}x{height} [0,0 {width}x{height}] ({tile}x{tile})|AppMag = 20|MPP = 0.5"


@cache
def tissue(width: int = 1003, height: int = 777) -> np.ndarray:
    """`(height, width, 3)` uint8."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = write_synthetic_slide(Path(folder) / "a.tif", size=(1024, 1024), seed=3)
        with open_slide(path, reader="openslide") as slide:
            return slide.read_region(0, 0, 0, width, height)


def levels_of(image: np.ndarray, downsamples: tuple[float, ...]) -> list[np.ndarray]:
    sizes = [(round(image.shape[1] / one), round(image.shape[0] / one)) for one in downsamples]
    return [
        image if one == 1 else cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        for one, size in zip(downsamples, sizes, strict=True)
    ]


def tiles_of(image: np.ndarray, tile: int) -> list[np.ndarray]:
    """Native tiles, row by row, padded by repeating the border."""
    height, width = image.shape[:2]
    padded = np.pad(image, ((0, -height % tile), (0, -width % tile), (0, 0)), mode="edge")
    return [
        np.ascontiguousarray(padded[y : y + tile, x : x + tile])
        for y in range(0, height, tile)
        for x in range(0, width, tile)
    ]


def jpeg(tile: np.ndarray, subsampling: str = "420", quality: int = 80) -> bytes:
    return simplejpeg.encode_jpeg(tile, quality=quality, colorspace="RGB", colorsubsampling=subsampling)


def rgb_jpeg(tile: np.ndarray) -> bytes:
    """A JPEG stream whose colours are red, green and blue as they are."""
    return imagecodecs.jpeg8_encode(tile, level=80, colorspace="RGB", outcolorspace="RGB")


def split_tables(stream: bytes) -> tuple[bytes, bytes]:
    """A JPEG stream's tables, and the stream without them and without application markers."""
    tables, rest, at = b"\xff\xd8", b"\xff\xd8", 2
    while stream[at + 1] != 0xDA:
        end = at + 2 + struct.unpack(">H", stream[at + 2 : at + 4])[0]
        if stream[at + 1] in (0xDB, 0xC4):
            tables += stream[at:end]
        elif stream[at + 1] < 0xE0:
            rest += stream[at:end]
        at = end
    return tables + b"\xff\xd9", rest + stream[at:]


def unlabelled(stream: bytes) -> bytes:
    """A JPEG stream without the markers that say what its colours are."""
    tables, rest = split_tables(stream)
    return tables[:-2] + rest[2:]


def write_jpeg_tiff(
    path: Path,
    image: np.ndarray,
    *,
    tile: int = 240,
    downsamples: tuple[float, ...] = (1, 4),
    subsampling: str = "420",
    rgb: bool = False,
    shared_tables: bool = True,
    aperio: bool = False,
    missing: tuple[int, ...] = (),
) -> None:
    """A pyramid of JPEG tiles.

    `rgb` stores the colours as they are; `missing` are native tiles of level 0 that were not scanned.
    """
    image = image.copy()
    for number in missing:
        row, column = divmod(number, -(-image.shape[1] // tile))
        image[row * tile : (row + 1) * tile, column * tile : (column + 1) * tile] = 255
    with tifffile.TiffWriter(path) as file:
        for number, level in enumerate(levels_of(image, downsamples)):
            encode = rgb_jpeg if rgb else partial(jpeg, subsampling=subsampling)
            streams = [encode(one) for one in tiles_of(level, tile)]
            tables, abbreviated = split_tables(streams[0])[0], [split_tables(one)[1] for one in streams]
            sampling = {"420": (2, 2), "422": (2, 1), "444": (1, 1)}[subsampling]
            file.write(
                iter(abbreviated if shared_tables else streams),
                shape=level.shape,
                dtype="uint8",
                tile=(tile, tile),
                photometric="rgb" if rgb else "ycbcr",
                subsampling=None if rgb else sampling,
                compression="jpeg",
                compressionargs={"outcolorspace": "rgb"} if rgb else None,  # else tifffile's tag says YCbCr
                jpegtables=tables if shared_tables else None,
                description=APERIO.format(width=level.shape[1], height=level.shape[0], tile=tile) if aperio else None,
                resolution=(20_000, 20_000),
                resolutionunit="CENTIMETER",
                subfiletype=int(number > 0 and not aperio),
                metadata=None,
                software=False,
            )
    for number in missing:
        without_bytes(path, number, place=aperio)


def write_tiff(
    path: Path, image: np.ndarray, *, tile: int = 240, downsamples: tuple[float, ...] = (1, 4), **how: object
) -> None:
    """A pyramid as tifffile compresses it."""
    with tifffile.TiffWriter(path) as file:
        for number, level in enumerate(levels_of(image, downsamples)):
            stored = np.moveaxis(level, -1, 0) if how.get("planarconfig") == "separate" else level
            file.write(
                stored,
                tile=(tile, tile),
                photometric="rgb",
                resolution=(20_000, 20_000),
                resolutionunit="CENTIMETER",
                subfiletype=int(number > 0),
                metadata=None,
                **how,
            )


def places(path: Path, level: int = 0) -> list[tuple[int, int]]:
    """(first byte, bytes) of each native tile."""
    with tifffile.TiffFile(path) as file:
        page = [page for page in file.pages if page.is_tiled][level]
        return list(zip(page.dataoffsets, page.databytecounts, strict=True))


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as raw:
        raw.seek(offset)
        raw.write(content)


def corrupt_native_tile(path: Path, tile: int) -> None:
    """Overwrite the compressed bytes of one native tile of level 0."""
    offset, count = places(path)[tile]
    overwrite(path, offset, b"\xff" * count)


def without_bytes(path: Path, number: int, level: int = 0, *, place: bool = False) -> None:
    """Set the byte count of a native tile to zero, and its place unless Aperio's scanners are meant, which leave it."""
    with tifffile.TiffFile(path) as file:
        tags = [page for page in file.pages if page.is_tiled][level].tags
        for code in (325,) if place else (325, 324):
            size = {3: 2, 4: 4, 16: 8}[int(tags[code].dtype)]
            overwrite(path, tags[code].valueoffset + number * size, bytes(size))
