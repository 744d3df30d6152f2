"""Plain images (PNG, JPEG, ...) as slides of one level."""

import io
from contextlib import suppress
from pathlib import Path

import numpy as np
import openslide
import PIL
import tifffile
from PIL import Image, ImageCms, ImageFile, TiffImagePlugin, UnidentifiedImageError

from ...errors import LongslideError
from ..free_memory import return_freed_memory
from ..regular_file import check_regular
from .base import (
    IMAGE_SUFFIXES,
    MOST_BYTES,
    TIFF_SUFFIXES,
    VENDOR_SUFFIXES,
    DeclinedError,
    SlideReader,
    over_background,
)
from .metadata import icc_properties
from .native_tiles import NativeTiles
from .tiff import broken_directory, is_tiff, tiff_facts, white_of

Image.MAX_IMAGE_PIXELS = None  # plain images of many gigapixels are no attack here

MAX_PX = 250_000_000
"""Pixels of a plain image, which is whole in memory at 4 bytes a pixel, above which it is refused."""


class ImageReader(SlideReader):
    """An image that Pillow reads, whole in memory; its DPI tags appear as TIFF resolution tags."""

    SUFFIXES = IMAGE_SUFFIXES | TIFF_SUFFIXES | {".jp2"}

    def __init__(self, path: Path) -> None:
        self.path = path
        facts = tiff_facts(path)
        if facts is not None and facts.refusal:
            raise DeclinedError(facts.refusal)
        if broken := broken_directory(path):  # Pillow would show what is left of it, and grey for what is not
            raise DeclinedError(f"a truncated or broken TIFF ({broken}); copy it again")
        try:
            with Image.open(path) as picture:
                if path.suffix.lower() in VENDOR_SUFFIXES:
                    raise DeclinedError(
                        f"under the suffix {path.suffix} stands a plain {picture.format} image: a preview, or misnamed, "
                        "or a broken or truncated slide"
                    )
                if isinstance(picture, ImageFile.StubImageFile):  # known to Pillow but not read, such as a feature file
                    raise DeclinedError
                if picture.mode.startswith(("I", "F")):  # Pillow would clip it to white
                    raise LongslideError(f"{path}: an image of more than 8 bits a channel; convert it to 8-bit RGB")
                if picture.width * picture.height > MAX_PX or _bytes_of(picture) > MOST_BYTES:
                    raise LongslideError(
                        f"{path}: {picture.width:,} x {picture.height:,} px would take "
                        f"{_bytes_of(picture) / 1e9:,.1f} GB of memory, as a plain image has no tiles; "
                        "convert it by `vips tiffsave IN OUT.tif --tile --pyramid --compression jpeg`"
                    )
                x, y = picture.info.get("dpi", (0, 0))
                icc = icc_properties(_icc_profile(picture))
            decoded: Image.Image = Image.open(path)
            decoded.load()  # a truncated one fails here
            if decoded.format == "WEBP":  # whose decoder keeps two more pictures
                decoded = decoded.copy()
            self._decoded = decoded
            self._image = openslide.ImageSlide(decoded)
        except UnidentifiedImageError as error:
            raise DeclinedError from error
        except (OSError, SyntaxError, ValueError) as error:
            raise LongslideError(f"{path}: a broken or truncated image ({error}); copy it again") from error
        self.dimensions = self._image.dimensions
        self.level_dimensions = (self.dimensions,)
        self.level_downsamples = (1.0,)
        resolution = {"tiff.XResolution": str(float(x)), "tiff.YResolution": str(float(y))}
        self.properties = {"tiff.ResolutionUnit": "inch"} | resolution | icc
        self.memory_bytes = 4 * self.dimensions[0] * self.dimensions[1]
        self.vendor = "image"
        self.library = f"Pillow {PIL.__version__}"

    def close(self) -> None:
        """Free the image."""
        self._image.close()
        self._decoded.close()
        return_freed_memory()

    def read_region(self, x: int, y: int, level: int, width: int, height: int) -> np.ndarray:
        """See `SlideReader.read_region`."""
        try:
            region = self._image.read_region((x, y), level, (width, height))
        except (openslide.OpenSlideError, OSError) as error:
            raise LongslideError(f"{self.path}: cannot read {width} x {height} px at ({x}, {y}): {error}") from error
        premultiplied = np.asarray(region.convert("RGBa"))
        return over_background(np.ascontiguousarray(premultiplied[..., [2, 1, 0, 3]]), self.background)


def decoding_bytes(path: Path, reader: type[SlideReader] | None = None) -> int:
    """Memory that a file takes while it is decoded, if it is a plain image that `ImageReader` takes; else 0.

    Args:
        path: The file.
        reader: The slide reader, if one is named.
    """
    if reader not in (None, ImageReader) or path.suffix.lower() in VENDOR_SUFFIXES or path.is_dir():
        return 0
    try:
        check_regular(path)
        if is_tiff(path):
            with tifffile.TiffFile(path) as tiff, suppress(DeclinedError):
                NativeTiles.of(tiff.pages.first, white_of(tiff))
                return 0  # read tile by tile, or strip by strip
        with Image.open(path) as picture:
            size = _bytes_of(picture)
            return size if size <= MOST_BYTES and picture.width * picture.height <= MAX_PX else 0  # else it is refused
    except Exception:  # not one of these, or broken: opening it says how
        return 0


def _bytes_of(picture: Image.Image) -> int:
    """Memory at the peak, measured with Pillow 13: 4 bytes a pixel, and what the decoder keeps beside."""
    beside = {"JPEG2000": 16, "WEBP": 12, "AVIF": 12}.get(picture.format or "", 0)
    if picture.info.get("progressive"):
        beside = 6  # coefficients of the whole picture
    if isinstance(picture, TiffImagePlugin.TiffImageFile):
        rows = picture.tag_v2.get(278, picture.height)
        beside = 4 if rows * 2 > picture.height else 0  # a strip is decoded at once
    return picture.width * picture.height * (4 + beside)


def _icc_profile(picture: Image.Image) -> ImageCms.ImageCmsProfile | None:
    try:
        return ImageCms.ImageCmsProfile(io.BytesIO(picture.info["icc_profile"]))
    except (KeyError, OSError, TypeError):  # none, or a broken one
        return None
