"""Formats that OpenSlide does not read, by the library fastslide, if it is installed."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import LongslideError
from ...plurals import count
from .base import DeclinedError, SlideReader, inside_of
from .parts import missing_part


class FastSlideReader(SlideReader):
    """Philips iSyntax, Olympus VSI, and the Zeiss CZI files that OpenSlide refuses.

    It takes no other format: its JPEG pixels are not quite those of OpenSlide.
    """

    SUFFIXES = frozenset({".czi", ".isyntax", ".i2syntax", ".vsi"})
    reopens = True

    def __reduce__(self) -> tuple[type["FastSlideReader"], tuple[Path]]:
        return FastSlideReader, (self.path,)

    def __init__(self, path: Path) -> None:
        self.path = path
        suffix = path.suffix.lower()
        if suffix not in self.SUFFIXES:
            raise DeclinedError
        try:
            from fastslide import FastSlide
        except ModuleNotFoundError:
            raise DeclinedError(
                f"{suffix} files need the package fastslide: pip install 'longslide[fastslide]'"
            ) from None
        try:
            self._slide: Any = FastSlide.from_file_path(path, cache=self.cache_bytes)
        except (RuntimeError, ValueError, OSError) as error:
            if (missing := missing_part(path)) is not None:
                raise LongslideError(f"{path}: {missing} is missing beside it; copy it too") from error
            raise LongslideError(f"{path}: fastslide cannot open it ({_reason(error)}); copy it again") from error
        slide = self._slide
        if slide.dtype != "uint8" or slide.num_channels not in (3, 4):
            what = f"{count(slide.num_channels, 'channel')} of {slide.dtype}"
            slide.close()
            raise LongslideError(f"{path}: {what}, not 8-bit RGB brightfield; convert it to that")
        if max(slide.z_count, slide.t_count) > 1:
            planes = slide.z_count * slide.t_count
            slide.close()
            raise LongslideError(f"{path}: {planes} planes (a stack in depth or time); save one of them")
        self.dimensions = tuple(slide.dimensions)
        self.level_dimensions = tuple(map(tuple, slide.level_dimensions))
        self.level_downsamples = tuple(slide.level_downsamples)
        (x, y), (width, height) = slide.bounds
        bounds = {"x": x, "y": y, "width": width, "height": height}
        self.properties = {f"openslide.bounds-{name}": str(value) for name, value in bounds.items()}
        facts = {
            "openslide.mpp-x": slide.mpp[0],
            "openslide.mpp-y": slide.mpp[1],
            "openslide.objective-power": slide.properties.get("objective_magnification"),
            "openslide.quickhash-1": slide.quickhash,
        }
        self.properties |= {name: str(value) for name, value in facts.items() if value}
        self.vendor = str(slide.format).lower()
        self.library = f"fastslide {version('fastslide')}"

    def close(self) -> None:
        """Close the file."""
        self._slide.close()

    def read_region(self, x: int, y: int, level: int, width: int, height: int) -> np.ndarray:
        """See `SlideReader.read_region`."""
        region = np.empty((height, width, 3), np.uint8)
        region[...] = self.background
        scale = self.level_downsamples[level]
        part = inside_of((round(x / scale), round(y / scale), width, height), self.level_dimensions[level])
        if part is None:
            return region
        left, top, rows, columns = part
        size = (columns.stop - columns.start, rows.stop - rows.start)
        try:
            pixels = self._slide.read_region((left, top), level, size).numpy()
        except (RuntimeError, ValueError, OSError) as error:
            raise LongslideError(
                f"{self.path}: cannot read {width} x {height} px at ({x}, {y}), level {level}: {_reason(error)}"
            ) from error
        if pixels.shape[:2] != size[::-1]:
            raise LongslideError(f"{self.path}: fastslide gives {pixels.shape} for {size[0]} x {size[1]} px")
        region[rows, columns] = pixels[..., :3]
        return region


def _reason(error: Exception) -> str:
    """The first line of an error: where in the library's source it arose is on the others."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
