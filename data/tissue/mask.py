"""The user's own tissue masks: PNG or GeoJSON."""

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from ...errors import LongslideError
from ..free_memory import return_freed_memory
from ..regular_file import check_regular
from ..slides.base import MOST_BYTES
from ..slides.slide import Slide
from .base import MAX_MASK_PX, Tissue, TissueSegmenter

Image.MAX_IMAGE_PIXELS = None  # the limit is `MOST_BYTES`

_BAND = 256  # rows of the mask that are reduced at once


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
        path: A PNG that covers the whole slide (black or transparent is background, anything else tissue) of any size up to
            1.5 gigapixels in grey, 375 megapixels in colour, of which `MAX_MASK_PX` along its longer edge are used; or
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


def decoding_bytes(path: Path) -> int:
    """Memory that a mask takes while it is read."""
    try:
        check_regular(path)
        if path.suffix.lower() in (".geojson", ".json"):
            return min(20 * path.stat().st_size, MOST_BYTES)  # lists of numbers
        with Image.open(path) as picture:
            return min(_bytes_of(picture), MOST_BYTES)  # with more it is refused
    except Exception:  # not there, or broken: reading it says how
        return 0


def _bytes_of(picture: Image.Image) -> int:
    return picture.width * picture.height * (1 if picture.mode in ("1", "L", "P") else 4)


def _read_bytes(path: Path) -> bytes:
    try:
        check_regular(path)
        return path.read_bytes()
    except OSError as error:
        raise LongslideError(f"{path}: cannot read the tissue mask ({error.strerror})") from error


def _read_raster(path: Path, content: bytes, slide: Slide) -> tuple[np.ndarray, tuple[float, float]]:
    try:
        with Image.open(io.BytesIO(content)) as picture:
            width, height = picture.size
            _check_shape(path, width, height, slide)
            need = _bytes_of(picture)
            if need > MOST_BYTES:
                raise LongslideError(
                    f"{path}: the mask of {width:,} x {height:,} px takes {need / 1e9:.1f} GB of memory; give a smaller "
                    f"one, as {MAX_MASK_PX:,} px are all that is used, or one of 8-bit grey"
                )
            mask = _reduced(picture)
            picture.close()
            return_freed_memory()
            return mask, (slide.dimensions[0] / mask.shape[1], slide.dimensions[1] / mask.shape[0])
    except UnidentifiedImageError as error:
        raise LongslideError(
            f"{path}: not a picture that can be read as a tissue mask; give a PNG or GeoJSON"
        ) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise LongslideError(f"{path}: a broken or truncated tissue mask ({error}); copy it again") from error


def _check_shape(path: Path, width: int, height: int, slide: Slide) -> None:
    downsample = (slide.dimensions[0] / width, slide.dimensions[1] / height)
    # A mask of rounded size may be off by a pixel on either edge.
    tolerance = 0.02 + 1 / min(width, height)
    if abs(downsample[0] / downsample[1] - 1) > tolerance:
        raise LongslideError(
            f"{path}: the mask is {width} x {height}, not of the shape of the slide ({slide.dimensions[0]} x "
            f"{slide.dimensions[1]}); it must cover the whole slide"
        )


def _reduced(picture: Image.Image) -> np.ndarray:
    """The mask of a picture; of a larger one than `MAX_MASK_PX` a pixel is tissue where half of what it covers is."""
    width, height = picture.size
    scale = max(1.0, max(width, height) / MAX_MASK_PX)
    columns, rows = max(1, round(width / scale)), max(1, round(height / scale))
    mask = np.empty((rows, columns), bool)
    for row in range(0, rows, _BAND):
        end = min(row + _BAND, rows)
        top, bottom = (round(edge * height / rows) for edge in (row, end))
        tissue = _tissue_in(picture.crop((0, top, width, bottom)), picture.info.get("transparency"))
        if tissue.shape != (end - row, columns):
            tissue = cv2.resize(tissue, (columns, end - row), interpolation=cv2.INTER_AREA)
        mask[row:end] = tissue >= 128
    return mask


def _tissue_in(band: Image.Image, transparent: Any) -> np.ndarray:
    """`(h, w)` uint8, 255 where a picture is neither black nor transparent."""
    if band.mode in ("P", "PA") or transparent is not None:  # an index says nothing: its colour does
        if transparent is not None:
            band.info["transparency"] = transparent
        band = band.convert("RGBA")
    pixels = np.asarray(band)
    if pixels.ndim == 2:
        return np.where(pixels != 0, np.uint8(255), np.uint8(0))
    colours = pixels[..., :-1] if band.mode in ("RGBA", "LA") else pixels
    tissue = np.where(colours.any(-1), np.uint8(255), np.uint8(0))
    if band.mode in ("RGBA", "LA"):
        tissue[pixels[..., -1] == 0] = 0
    return tissue


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
    for polygon in polygons:
        rings = [np.floor(ring / downsample).astype(np.int32) for ring in polygon]
        if len(rings) == 1:
            cv2.fillPoly(mask, rings, 1)
            continue
        # Holes are holes of their own polygon only: it is drawn apart, in the rectangle that it takes.
        low = np.clip(np.min([ring.min(0) for ring in rings], axis=0), 0, (mask.shape[1] - 1, mask.shape[0] - 1))
        high = np.max([ring.max(0) for ring in rings], axis=0) + 1
        part = mask[low[1] : high[1], low[0] : high[0]]
        region = np.zeros(part.shape, np.uint8)
        cv2.fillPoly(region, [ring - low.astype(np.int32) for ring in rings], 1)
        part |= region
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
