"""OME-Zarr (https://ngff.openmicroscopy.org), by the library zarr, if it is installed."""

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import LongslideError
from ...plurals import count
from .base import DeclinedError, SlideReader, inside_of

MICRONS = {"nanometer": 1e-3, "micrometer": 1.0, "millimeter": 1e3, "centimeter": 1e4, "meter": 1e6}
"""Microns per unit of length."""

_HASHED_PX = 2048  # edge of the part of the coarsest level by which a slide is known


class OmeZarrReader(SlideReader):
    """A folder `.zarr` of OME-Zarr 0.1 to 0.5 with an RGB pyramid, also as bioformats2raw writes it."""

    FOLDER_SUFFIXES = frozenset({".zarr"})
    reopens = True

    def __reduce__(self) -> tuple[type["OmeZarrReader"], tuple[Path]]:
        return OmeZarrReader, (self.path,)

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.suffix.lower() not in self.FOLDER_SUFFIXES or not path.is_dir():
            raise DeclinedError
        try:
            import zarr
        except ModuleNotFoundError:
            raise DeclinedError("OME-Zarr needs the package zarr: pip install 'longslide[ome-zarr]'") from None
        try:
            group: Any = zarr.open_group(path, mode="r")
            if _multiscales(group) is None and "0" in group:  # bioformats2raw: a group for each series
                group = group["0"]
            pyramid = _multiscales(group)
            if pyramid is None:
                raise DeclinedError("a Zarr folder without `multiscales`: not OME-Zarr")
            self._axes = _axes(pyramid)
            self._levels: list[Any] = [group[one["path"]] for one in pyramid["datasets"]]
            shapes = [dict(zip(self._axes, level.shape, strict=True)) for level in self._levels]
        except (OSError, KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise LongslideError(f"{path}: a broken OME-Zarr ({reason}); copy it again") from error
        first = shapes[0]
        if first.get("c") != 3 or self._levels[0].dtype != np.uint8:
            what = f"{count(first.get('c', 1), 'channel')} of {self._levels[0].dtype}"
            raise LongslideError(f"{path}: {what}, not 8-bit RGB brightfield; convert it to that")
        if first.get("z", 1) * first.get("t", 1) > 1:
            planes = first.get("z", 1) * first.get("t", 1)
            raise LongslideError(f"{path}: {planes} planes (a stack in depth or time); save one of them")
        self.level_dimensions = tuple((shape["x"], shape["y"]) for shape in shapes)
        self.dimensions = self.level_dimensions[0]
        self.level_downsamples = tuple(
            (self.dimensions[0] / width + self.dimensions[1] / height) / 2 for width, height in self.level_dimensions
        )
        self.properties = _mpp(pyramid, self._axes) | {"openslide.quickhash-1": self._quickhash(pyramid)}
        self.vendor = "ome-zarr"
        self.library = f"zarr {version('zarr')}"

    def close(self) -> None:
        """Nothing is held open."""

    def read_region(self, x: int, y: int, level: int, width: int, height: int) -> np.ndarray:
        """See `SlideReader.read_region`."""
        region = np.empty((height, width, 3), np.uint8)
        region[...] = self.background
        scale = self.level_downsamples[level]
        part = inside_of((round(x / scale), round(y / scale), width, height), self.level_dimensions[level])
        if part is not None:
            left, top, rows, columns = part
            try:
                region[rows, columns] = self._pixels(
                    level, left, top, columns.stop - columns.start, rows.stop - rows.start
                )
            except (OSError, ValueError, RuntimeError, KeyError) as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise LongslideError(
                    f"{self.path}: cannot read {width} x {height} px at ({x}, {y}), level {level}: {reason}"
                ) from error
        return region

    def _pixels(self, level: int, left: int, top: int, width: int, height: int) -> np.ndarray:
        wanted: dict[str, Any] = {"x": slice(left, left + width), "y": slice(top, top + height), "c": slice(None)}
        values = np.asarray(self._levels[level][tuple(wanted.get(axis, 0) for axis in self._axes)])
        there = [axis for axis in self._axes if axis in wanted]
        return values.transpose([there.index(axis) for axis in ("y", "x", "c")])

    def _quickhash(self, pyramid: Mapping[str, Any]) -> str:
        """Of the metadata and the middle of the coarsest level."""
        width, height = self.level_dimensions[-1]
        w, h = min(width, _HASHED_PX), min(height, _HASHED_PX)
        digest = hashlib.sha256(json.dumps([pyramid, self.level_dimensions], sort_keys=True).encode())
        try:
            middle = self._pixels(len(self._levels) - 1, (width - w) // 2, (height - h) // 2, w, h)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise LongslideError(f"{self.path}: its coarsest level cannot be read ({error}); copy it again") from error
        digest.update(middle.tobytes())
        return digest.hexdigest()


def _multiscales(group: Any) -> dict[str, Any] | None:
    """The first pyramid that a group describes: since version 0.5 under `ome`."""
    attributes = dict(group.attrs)
    found = attributes.get("ome", attributes).get("multiscales")
    return dict(found[0]) if found else None


def _axes(pyramid: Mapping[str, Any]) -> list[str]:
    """Names of the axes in the order of the arrays; versions before 0.3 have five and do not say so."""
    axes = pyramid.get("axes", ["t", "c", "z", "y", "x"])
    return [str(axis if isinstance(axis, str) else axis["name"]).lower() for axis in axes]


def _mpp(pyramid: Mapping[str, Any], axes: list[str]) -> dict[str, str]:
    """The properties of microns per pixel: the scale of level 0 in its unit; none where it does not say."""
    steps = [
        *pyramid["datasets"][0].get("coordinateTransformations", []),
        *pyramid.get("coordinateTransformations", []),
    ]
    scales = [step["scale"] for step in steps if step.get("type") == "scale"]
    found = {}
    for number, axis in enumerate(axes):
        stated = pyramid["axes"][number] if "axes" in pyramid else axis
        unit = MICRONS.get(stated.get("unit", "")) if isinstance(stated, Mapping) else None
        if axis in "xy" and unit and scales:
            found[f"openslide.mpp-{axis}"] = f"{unit * float(np.prod([scale[number] for scale in scales])):.12g}"
    return found
