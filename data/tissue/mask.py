"""The user's own tissue masks: PNG or GeoJSON."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ...errors import LongslideError
from ..regular_file import check_regular
from ..slides.slide import Slide
from .base import MAX_MASK_PX, Tissue, TissueSegmenter


@dataclass(frozen=True)
class Mask(TissueSegmenter):
    """The user's own mask of one slide.

    Attributes:
        path: The file, as `read_tissue_mask` takes it.
    """

    path: Path

    @property
    def method(self) -> str:  # type: ignore[override]
        """The name and digest of the file."""
        return mask_method(self.path)

    def __call__(self, slide: Slide) -> Tissue:
        """See `read_tissue_mask`."""
        return read_tissue_mask(self.path, slide)

    @property
    def options(self) -> dict[str, str]:
        """None: `method` says all of it, wherever the file lies."""
        return {}


def read_tissue_mask(path: str | Path, slide: Slide) -> Tissue:
    """Read the user's own tissue mask.

    Args:
        path: A PNG of any size that covers the whole slide (black or transparent is background, anything else tissue), or
            GeoJSON polygons in level-0 pixels, as QuPath exports them.
        slide: The slide it belongs to.

    Returns:
        The tissue.

    Raises:
        LongslideError: The file cannot be read, or does not belong to a slide of this size.
    """
    path = Path(path)
    content = _read_bytes(path)
    if path.suffix.lower() in (".geojson", ".json"):
        mask, downsample = _rasterise(path, content, slide)
    else:
        mask, downsample = _read_raster(path, content, slide)
    return Tissue(mask, downsample, mask_method(path))


def mask_method(path: Path) -> str:
    """What feature files record of the user's own mask: its name and digest."""
    return f"mask:{path.name}:{hashlib.sha256(_read_bytes(path)).hexdigest()[:16]}"


def _read_bytes(path: Path) -> bytes:
    try:
        check_regular(path)
        return path.read_bytes()
    except OSError as error:
        raise LongslideError(f"{path}: cannot read the tissue mask ({error.strerror})") from error


def _read_raster(path: Path, content: bytes, slide: Slide) -> tuple[np.ndarray, tuple[float, float]]:
    raster: Any = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED) if content else None
    if raster is None:
        raise LongslideError(f"{path}: not a picture that can be read as a tissue mask; give a PNG or GeoJSON")
    if raster.ndim == 3:
        colour = raster[..., :3].any(-1)
        raster = colour & (raster[..., 3] > 0) if raster.shape[2] == 4 else colour
    height, width = raster.shape
    downsample = (slide.dimensions[0] / width, slide.dimensions[1] / height)
    # A mask of rounded size may be off by a pixel on either edge.
    tolerance = 0.02 + 1 / min(width, height)
    if abs(downsample[0] / downsample[1] - 1) > tolerance:
        raise LongslideError(
            f"{path}: the mask is {width} x {height}, not of the shape of the slide ({slide.dimensions[0]} x "
            f"{slide.dimensions[1]}); it must cover the whole slide"
        )
    return raster > 0, downsample


def _rasterise(path: Path, content: bytes, slide: Slide) -> tuple[np.ndarray, tuple[float, float]]:
    try:
        polygons = [
            [np.asarray(ring, np.float64)[:, :2] for ring in polygon]
            for polygon in _polygons(json.loads(content))
            if polygon
        ]
        if not all(np.isfinite(ring).all() for polygon in polygons for ring in polygon):
            raise ValueError("coordinates are not finite")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise LongslideError(
            f"{path}: not GeoJSON with polygons ({error}); export annotations from QuPath as GeoJSON"
        ) from error
    if not polygons:
        raise LongslideError(f"{path}: no Polygon or MultiPolygon in the file")
    width, height = slide.dimensions
    points = np.concatenate([ring for polygon in polygons for ring in polygon])
    margin = 0.05 * max(width, height)
    if points.min() < -margin or points[:, 0].max() > width + margin or points[:, 1].max() > height + margin:
        raise LongslideError(
            f"{path}: polygons reach to ({points[:, 0].max():.0f}, {points[:, 1].max():.0f}), outside the slide of "
            f"{width} x {height} px; coordinates must be level-0 pixels of this slide"
        )
    scale = min(1.0, MAX_MASK_PX / max(width, height))
    mask = np.zeros((max(1, round(height * scale)), max(1, round(width * scale))), np.uint8)
    downsample = (width / mask.shape[1], height / mask.shape[0])
    for polygon in polygons:  # one by one: holes are holes of their own polygon only
        region = np.zeros_like(mask)
        cv2.fillPoly(region, [np.floor(ring / downsample).astype(np.int32) for ring in polygon], 1)
        mask |= region
    return mask.astype(bool), downsample


def _polygons(content: Any) -> list[list[Any]]:
    """The polygons, each a list of rings, of a geometry, a Feature, a FeatureCollection, or a list of these."""
    if isinstance(content, list):
        return [polygon for item in content for polygon in _polygons(item)]
    kind = content["type"]
    if kind == "FeatureCollection":
        return _polygons(content["features"])
    if kind == "Feature":
        return _polygons(content["geometry"])
    if kind == "GeometryCollection":
        return _polygons(content["geometries"])
    if kind == "Polygon":
        return [content["coordinates"]]
    return list(content["coordinates"]) if kind == "MultiPolygon" else []
