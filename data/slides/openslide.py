"""The slide formats that OpenSlide reads."""

import threading
from ctypes import c_uint32
from pathlib import Path

import numpy as np
import openslide
from openslide import lowlevel

from ...errors import LongslideError
from .base import TIFF_SUFFIXES, VENDOR_SUFFIXES, DeclinedError, SlideReader, over_background
from .dicom import unread_codec
from .metadata import icc_properties
from .parts import missing_part
from .tiff import tiff_facts


class OpenSlideReader(SlideReader):
    """A slide file read by OpenSlide: its own pixels, without Pillow's copies."""

    SUFFIXES = VENDOR_SUFFIXES | TIFF_SUFFIXES
    reopens = True

    def __reduce__(self) -> tuple[type["OpenSlideReader"], tuple[Path]]:
        return OpenSlideReader, (self.path,)

    def __init__(self, path: Path) -> None:
        self.path = path
        self._cache = openslide.OpenSlideCache(self.cache_bytes)
        try:
            self._handle = handle = self._open()
        except openslide.OpenSlideUnsupportedFormatError as error:
            if (missing := missing_part(path)) is not None:
                raise LongslideError(f"{path}: {missing} is missing beside it; copy it too") from error
            facts = tiff_facts(path)
            raise DeclinedError(facts.refusal if facts else "") from error
        self._lock = threading.Lock()
        self.dimensions = handle.dimensions
        self.level_dimensions = handle.level_dimensions
        self.level_downsamples = handle.level_downsamples
        self.properties = dict(handle.properties)
        if "openslide.icc-size" in self.properties:
            try:
                self.properties |= icc_properties(handle.color_profile)
            except (openslide.OpenSlideError, OSError):  # unreadable: after that OpenSlide reads nothing by this handle
                handle.close()
                self._handle = handle = self._open()
        self.vendor = self.properties["openslide.vendor"]
        facts = tiff_facts(path)
        if facts is not None and facts.lacking:
            handle.close()
            raise LongslideError(f"{path}: {facts.lacking}")
        if self.vendor == "generic-tiff" and facts is not None:
            if facts.refusal:
                handle.close()
                raise DeclinedError(facts.refusal)
            if facts.mpp is not None:
                self.properties["openslide.mpp-x"], self.properties["openslide.mpp-y"] = facts.mpp
                del self.properties["openslide.vendor"]  # these are no resolution tags, as those of a generic TIFF are
        self.library = f"OpenSlide {openslide.__library_version__}"
        colour = self.properties.get("openslide.background-color", "FFFFFF")
        self.background = (int(colour[0:2], 16), int(colour[2:4], 16), int(colour[4:6], 16))

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._handle.close()

    def read_region(self, x: int, y: int, level: int, width: int, height: int) -> np.ndarray:
        """See `SlideReader.read_region`."""
        handle = self._handle
        try:
            bgra = _read_bgra(handle, x, y, level, width, height)
        except (openslide.OpenSlideError, OSError):
            bgra = self._read_again(handle, x, y, level, width, height)
        return over_background(bgra, self.background)

    def _read_again(
        self, broken: openslide.OpenSlide, x: int, y: int, level: int, width: int, height: int
    ) -> np.ndarray:
        """Repeat a failed read on a handle of its own.

        After a failed read OpenSlide refuses every other one on that handle, so the failure may be another thread's.
        """
        with self._lock:
            fresh = self._open_again()
            try:
                return _read_bgra(fresh, x, y, level, width, height)
            except (openslide.OpenSlideError, OSError) as error:
                failed, fresh = fresh, self._open_again()
                failed.close()
                raise LongslideError(
                    f"{self.path}: cannot read {width} x {height} px at ({x}, {y}), level {level}: {error}"
                ) from error
            finally:
                if self._handle is broken:
                    self._handle = fresh  # the broken one closes itself when the last thread has left it
                else:
                    fresh.close()

    def _open_again(self) -> openslide.OpenSlide:
        try:
            return self._open()
        except (openslide.OpenSlideUnsupportedFormatError, DeclinedError) as error:
            raise LongslideError(f"{self.path}: no longer there, or no longer a slide ({error})") from error

    def _open(self) -> openslide.OpenSlide:
        try:
            handle = openslide.OpenSlide(self.path)
            handle.set_cache(self._cache)
            return handle
        except openslide.OpenSlideUnsupportedFormatError:
            raise
        except openslide.OpenSlideError as error:
            if (missing := missing_part(self.path)) is not None:
                raise LongslideError(f"{self.path}: {missing} is missing beside it; copy it too") from error
            facts = tiff_facts(self.path)
            if facts is not None and facts.refusal:
                raise DeclinedError(facts.refusal) from error
            if self.path.suffix.lower() == ".czi":  # it reads some of them; fastslide reads more
                raise DeclinedError(f"OpenSlide does not read this one ({error})") from error
            if codec := unread_codec(error):
                raise LongslideError(f"{self.path}: {codec}") from error
            raise LongslideError(f"{self.path}: a broken or truncated slide ({error}); copy it again") from error


def _read_bgra(handle: openslide.OpenSlide, x: int, y: int, level: int, width: int, height: int) -> np.ndarray:
    """`(height, width, 4)` uint8, colours multiplied by alpha."""
    buffer = (width * height * c_uint32)()
    lowlevel._read_region(handle._osr, buffer, x, y, level, width, height)
    return np.frombuffer(memoryview(buffer), np.uint8).reshape(height, width, 4)
