"""Whole-slide images: opening, reading regions as RGB, microns per pixel."""

import hashlib
import threading
from collections.abc import Mapping
from ctypes import c_uint32
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

import cv2
import numpy as np
import openslide
from openslide import lowlevel
from PIL import Image, ImageFile, UnidentifiedImageError

from ...errors import LongslideError
from .mpp import Mpp, resolve_mpp

Image.MAX_IMAGE_PIXELS = None  # plain images of many gigapixels are no attack here

# Decoded native tiles kept per slide: several rows of a 100,000 px wide level, so neighbours are not decoded twice.
CACHE_BYTES = 256 * 2**20

_BLOCK = 2048  # pixels of a level read at once for a thumbnail
_MAX_UNREADABLE = 256  # failed reads after which a slide has no thumbnail: each one reopens the file


class Slide:
    """An open slide. A context manager; reads may come from several threads at once.

    Attributes:
        path: The file.
        slide_id: Its id: the file's stem unless given.
        dimensions: (width, height) of level 0 in pixels.
        level_dimensions: (width, height) of each level, finest first.
        level_downsamples: Level-0 pixels per pixel of each level.
        properties: OpenSlide's properties; the DPI tags of a plain image appear as TIFF resolution tags.
        vendor: OpenSlide's name of the format, or `image` for a plain image.
        background: RGB shown where the slide has no pixels.
    """

    def __init__(self, path: Path, slide_mpp: float | None, slide_id: str | None) -> None:
        self.path = path
        self.slide_id = slide_id or path.stem
        self._given_mpp = slide_mpp
        self._cache = openslide.OpenSlideCache(CACHE_BYTES)
        self._handle = handle = _open_handle(path, self._cache)
        self._lock = threading.Lock()
        self.dimensions: tuple[int, int] = handle.dimensions
        self.level_dimensions: tuple[tuple[int, int], ...] = handle.level_dimensions
        self.level_downsamples: tuple[float, ...] = handle.level_downsamples
        self.properties: Mapping[str, str] = dict(handle.properties)
        self.vendor = self.properties.get("openslide.vendor", "image")
        if isinstance(handle, openslide.ImageSlide):
            self.properties |= _dpi_properties(path)
        colour = self.properties.get("openslide.background-color", "FFFFFF")
        self.background = (int(colour[0:2], 16), int(colour[2:4], 16), int(colour[4:6], 16))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._handle.close()

    @cached_property
    def mpp(self) -> Mpp:
        """Microns per pixel at level 0 and where it comes from.

        Raises:
            LongslideError: There is none, or it is implausible.
        """
        return resolve_mpp(self.properties, self.path, self._given_mpp)

    @cached_property
    def quickhash(self) -> str:
        """Identity of the image data: OpenSlide's quickhash, or the SHA-256 of the file."""
        quick = self.properties.get("openslide.quickhash-1")
        if quick:
            return quick
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def read_region(self, x: int, y: int, level: int, width: int, height: int) -> np.ndarray:
        """Read a rectangle of a level.

        Args:
            x: Left edge in level-0 pixels; may lie outside the slide.
            y: Top edge in level-0 pixels; may lie outside the slide.
            level: Level to read from.
            width: Pixels of that level.
            height: Pixels of that level.

        Returns:
            `(height, width, 3)` uint8 RGB; where the slide has no pixels, `background`.

        Raises:
            LongslideError: The region cannot be read. Other regions still can.
        """
        handle = self._handle
        try:
            bgra = _read_bgra(handle, x, y, level, width, height)
        except (openslide.OpenSlideError, OSError):
            bgra = self._read_again(handle, x, y, level, width, height)
        rgb = cv2.cvtColor(bgra, cv2.COLOR_BGRA2RGB)
        if bgra.view("<u4").min() < 0xFF000000:  # some alpha, the highest byte, is below 255
            missing = cv2.bitwise_not(cv2.extractChannel(bgra, 3))
            shining_through = cv2.merge(
                [cv2.convertScaleAbs(missing, alpha=colour / 255) for colour in self.background]
            )
            cv2.add(rgb, shining_through, dst=rgb)
        return np.asarray(rgb)

    def thumbnail(self, max_px: int = 2048) -> np.ndarray:
        """The whole slide, antialiased, with no edge longer than `max_px`.

        A region that cannot be read shows as background: the tile stream will count it, where it matters.

        Returns:
            `(h, w, 3)` uint8 RGB.

        Raises:
            LongslideError: Hardly anything of the slide can be read.
        """
        scale = min(1.0, max_px / max(self.dimensions))
        width, height = (max(1, round(edge * scale)) for edge in self.dimensions)
        large_enough = [i for i, (w, h) in enumerate(self.level_dimensions) if w >= width and h >= height]
        level = max(large_enough, default=0)
        level_width, level_height = self.level_dimensions[level]
        # First by a whole factor, block by block, so that no more than a block of the level is in memory.
        factor = max(1, min(level_width // width, level_height // height))
        block = max(1, _BLOCK // factor) * factor
        small = np.empty((-(-level_height // factor), -(-level_width // factor), 3), np.uint8)
        unreadable: list[LongslideError] = []
        for top in range(0, level_height, block):
            for left in range(0, level_width, block):
                w, h = min(block, level_width - left), min(block, level_height - top)
                region = self._read_what_can_be_read(left, top, level, w, h, unreadable)
                out = small[top // factor : -(-(top + h) // factor), left // factor : -(-(left + w) // factor)]
                out[...] = cv2.resize(region, out.shape[1::-1], interpolation=cv2.INTER_AREA)
        if small.shape[:2] == (height, width):
            return small
        return np.asarray(cv2.resize(small, (width, height), interpolation=cv2.INTER_AREA))

    def _read_what_can_be_read(
        self, left: int, top: int, level: int, width: int, height: int, unreadable: list[LongslideError]
    ) -> np.ndarray:
        """Read a rectangle given in pixels of the level; on an error its quarters, down to a native tile's size."""
        scale_x, scale_y = (a / b for a, b in zip(self.dimensions, self.level_dimensions[level], strict=True))
        try:
            return self.read_region(round(left * scale_x), round(top * scale_y), level, width, height)
        except LongslideError as error:
            unreadable.append(error)
            if len(unreadable) > _MAX_UNREADABLE:
                raise
        region = np.empty((height, width, 3), np.uint8)
        region[...] = self.background
        if max(width, height) > 256:
            for y, h in ((0, height // 2), (height // 2, height - height // 2)):
                for x, w in ((0, width // 2), (width // 2, width - width // 2)):
                    if w and h:
                        region[y : y + h, x : x + w] = self._read_what_can_be_read(
                            left + x, top + y, level, w, h, unreadable
                        )
        return region

    def _read_again(
        self, broken: openslide.AbstractSlide, x: int, y: int, level: int, width: int, height: int
    ) -> np.ndarray:
        """Repeat a failed read on a handle of its own.

        After a failed read OpenSlide refuses every other one on that handle, so the failure may be another thread's.
        """
        with self._lock:
            fresh = _open_handle(self.path, self._cache)
            try:
                return _read_bgra(fresh, x, y, level, width, height)
            except (openslide.OpenSlideError, OSError) as error:
                fresh = _open_handle(self.path, self._cache)
                raise LongslideError(
                    f"{self.path}: cannot read {width} x {height} px at ({x}, {y}), level {level}: {error}"
                ) from error
            finally:
                if self._handle is broken:
                    self._handle = fresh  # the broken one closes itself when the last thread has left it
                else:
                    fresh.close()


def open_slide(path: str | Path, *, slide_mpp: float | None = None, slide_id: str | None = None) -> Slide:
    """Open a slide with OpenSlide, or a plain image (PNG, JPEG, ...) with Pillow.

    Args:
        path: The file.
        slide_mpp: Microns per pixel at level 0; overrides the file's.
        slide_id: The slide's id; the file's stem by default.

    Returns:
        The slide. It may lack microns per pixel: only asking for `mpp` raises then.

    Raises:
        LongslideError: No such file, or not a slide that can be read.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            first = file.read(1)
    except IsADirectoryError:
        raise LongslideError(f"{path}: a folder, not a slide file") from None
    except OSError as error:  # no such file, no permission, a file server that is away
        raise LongslideError(f"{path}: cannot be opened ({error.strerror})") from error
    if not first:
        raise LongslideError(f"{path}: the file is empty (0 bytes); copy it again")
    return Slide(path, slide_mpp, slide_id)


def _open_handle(path: Path, cache: openslide.OpenSlideCache) -> openslide.AbstractSlide:
    try:
        handle = openslide.OpenSlide(path)
        handle.set_cache(cache)
        return handle
    except openslide.OpenSlideUnsupportedFormatError:
        pass
    except openslide.OpenSlideError as error:
        raise LongslideError(f"{path}: a broken or truncated slide ({error}); copy it again") from error
    try:
        with Image.open(path) as picture:
            if isinstance(picture, ImageFile.StubImageFile):  # known to Pillow but not read, such as a feature file
                raise UnidentifiedImageError
            if picture.mode.startswith(("I", "F")):  # Pillow would clip it to white
                raise LongslideError(f"{path}: an image of more than 8 bits a channel; convert it to 8-bit RGB")
        image = openslide.ImageSlide(str(path))
        image.read_region((0, 0), 0, (1, 1))  # decodes the image: a truncated one fails here
        return image
    except UnidentifiedImageError as error:
        raise LongslideError(f"{path}: not a slide or image in a format that OpenSlide or Pillow reads") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise LongslideError(f"{path}: a broken or truncated image ({error}); copy it again") from error


def _read_bgra(handle: openslide.AbstractSlide, x: int, y: int, level: int, width: int, height: int) -> np.ndarray:
    """`(height, width, 4)` uint8, colours multiplied by alpha: OpenSlide's own pixels, without Pillow's copies."""
    if not isinstance(handle, openslide.OpenSlide):
        premultiplied = np.asarray(handle.read_region((x, y), level, (width, height)).convert("RGBa"))
        return np.ascontiguousarray(premultiplied[..., [2, 1, 0, 3]])
    buffer = (width * height * c_uint32)()
    lowlevel._read_region(handle._osr, buffer, x, y, level, width, height)
    return np.frombuffer(memoryview(buffer), np.uint8).reshape(height, width, 4)


def _dpi_properties(path: Path) -> dict[str, str]:
    with Image.open(path) as image:
        x, y = image.info.get("dpi", (0, 0))
    return {"tiff.ResolutionUnit": "inch", "tiff.XResolution": str(float(x)), "tiff.YResolution": str(float(y))}
