"""Where the tissue is on a slide: a classical method that needs no weights, or the user's own mask."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ...errors import LongslideError
from ..slides.slide import Slide

METHOD = "longslide-tissue-1"
"""Name and version of the classical method, recorded in feature files."""

MASK_MPP = 10.0
"""Microns per pixel the tissue is looked for at."""

MAX_MASK_PX = 4096
"""Longest edge of a mask, whatever the slide's size."""

MIN_REGION_UM2 = 20_000.0
"""Smaller pieces are debris: a square of 140 um, a quarter of a tile of 256 px at 0.5 um/px."""

MIN_HOLE_UM2 = 10_000.0
"""Smaller holes are lumens and tears within tissue, and are filled."""


@dataclass(frozen=True)
class Tissue:
    """The tissue of a slide.

    Attributes:
        mask: `(h, w)` bool raster over the whole slide.
        downsample: Level-0 pixels per pixel of the mask, in x and y.
        method: How it was found: the name and version of the method, or the name and digest of the user's file.
    """

    mask: np.ndarray
    downsample: tuple[float, float]
    method: str

    @cached_property
    def contours(self) -> list[list[np.ndarray]]:
        """One polygon a region: its outline first, then its holes, each an `(n, 2)` array of (x, y) in level-0 pixels."""
        # Traced at the corners of the pixels, not at their centres: an upscaled mask's border is the pixels' border.
        doubled = cv2.resize(self.mask.astype(np.uint8), None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
        padded = cv2.copyMakeBorder(doubled, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
        rings, hierarchy = cv2.findContours(padded, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
        polygons: dict[int, list[np.ndarray]] = {}
        scale = np.array(self.downsample) / 2
        for number, ring in enumerate(rings):
            parent = int(hierarchy[0][number][3])
            # The ring runs through the outermost pixels' centres: half a (doubled) pixel inside the border.
            points = (ring[:, 0].astype(np.float64) - 0.5) * scale
            if len(points) < 3:
                continue
            if parent < 0:
                polygons[number] = [points, *polygons.get(number, [])]
            else:
                polygons.setdefault(parent, []).append(points)
        return list(polygons.values())

    def area_mm2(self, slide_mpp: float) -> float:
        """Area in square millimetres, given the microns per pixel of level 0."""
        pixel = self.downsample[0] * self.downsample[1] * (slide_mpp / 1000) ** 2
        return float(np.count_nonzero(self.mask) * pixel)

    def to_geojson(self) -> str:
        """The contours as a GeoJSON FeatureCollection in level-0 pixels, one Polygon a region; QuPath opens it.

        Rings are closed and wound as RFC 7946 asks: outlines counterclockwise, holes clockwise (with y as given).
        """
        features = []
        for polygon in self.contours:
            rings = []
            for number, points in enumerate(polygon):
                ring = points if (_signed_area(points) > 0) == (number == 0) else points[::-1]
                rings.append(np.round([*ring, ring[0]], 2).tolist())
            properties = {"objectType": "annotation", "classification": {"name": "Tissue", "color": [213, 94, 0]}}
            features.append(
                {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": rings}, "properties": properties}
            )
        return json.dumps({"type": "FeatureCollection", "features": features})


def find_tissue(slide: Slide) -> Tissue:
    """Find the tissue of an H&E slide (or of another stain that has colour) by its optical density.

    Glass is estimated as the brightest common colour. Tissue absorbs light and, unlike shadows, coverslip edges and
    black ink or borders, absorbs it unevenly over red, green and blue, and unlike pen ink not in one saturated flat hue.

    Args:
        slide: The slide.

    Returns:
        The tissue; with an empty mask when there is none.
    """
    try:
        mpp = slide.mpp.value
    except LongslideError:
        mpp = 0.5  # only the sizes of debris and holes depend on it
    longest = max(slide.dimensions)
    max_px = int(np.clip(longest * mpp / MASK_MPP, min(longest, 512), MAX_MASK_PX))
    picture = slide.thumbnail(max_px)
    height, width = picture.shape[:2]
    downsample = (slide.dimensions[0] / width, slide.dimensions[1] / height)
    mask = segment_tissue(picture, downsample[0] * mpp)
    return Tissue(mask, downsample, METHOD)


def segment_tissue(picture: np.ndarray, mpp: float) -> np.ndarray:
    """Find tissue on a thumbnail.

    Args:
        picture: `(h, w, 3)` uint8 RGB.
        mpp: Microns per pixel of the thumbnail.

    Returns:
        `(h, w)` bool.
    """
    smooth = cv2.GaussianBlur(picture, (0, 0), 1.0)
    density = _optical_density(smooth)
    red, green, blue = (density[..., channel] for channel in range(3))
    absorbed, chroma = density.mean(-1), density.max(-1) - density.min(-1)

    # Haematoxylin and eosin absorb green most, or nearly: pure haematoxylin a little more red, DAB (brown) more blue.
    # Faint eosin and fat have a chroma near 0.03; noise of glass, after smoothing, stays below 0.015.
    excess = green - np.minimum(red, blue)
    stained = (excess > 0.02) & (excess > 0.15 * absorbed) & (green >= 0.75 * red) & (green >= 0.6 * blue)
    dark = (absorbed > 0.9) & (chroma < 0.35 * absorbed)
    mask = stained & ~dark & ~_pen(smooth, density, mpp)

    radius = max(1, round(15 / mpp))
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
    opened = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, np.ones((2, 2), np.uint8))
    closed = cv2.morphologyEx(opened, cv2.MORPH_CLOSE, kernel)
    closed[dark] = 0
    return _drop_small(closed, MIN_REGION_UM2 / mpp**2, MIN_HOLE_UM2 / mpp**2)


def _optical_density(picture: np.ndarray) -> np.ndarray:
    """-log10 of the transmitted share of light in each channel, 0 for glass; (h, w, 3) float32."""
    pixels = picture.reshape(-1, 3)
    # Glass: the most common bright colour that is not the pure white of stitching gaps.
    brightness = pixels.min(1)
    bright = pixels[(brightness > 150) & (brightness < 254)]
    glass = np.full(3, 245.0)
    if len(bright) > 0.001 * len(pixels):
        level = np.percentile(bright.min(1), 90)
        near = bright[np.abs(bright.min(1).astype(np.float32) - level) < 8]
        # A slide full of pale tissue has no glass to measure: never take the colour of a stain for it. Stains absorb
        # green more than red or blue; glass of another colour, blue or yellow, may have more of it.
        candidate = np.median(near, axis=0)
        spread, lacks_green = np.ptp(candidate), candidate[[0, 2]].min() > candidate[1] + 3
        if candidate.min() > 180 and spread < (22 if lacks_green else 45):
            glass = candidate
    return np.asarray(np.maximum(-np.log10(np.maximum(picture, 1) / glass), 0), np.float32)


def _pen(picture: np.ndarray, density: np.ndarray, mpp: float) -> np.ndarray:
    """Ink of a marker: blue, green or red in a saturated hue that stains do not have, with its soft rim."""
    red, green, blue = (density[..., channel] for channel in range(3))
    # Blue ink absorbs red most, as blue haematoxylin does; but nuclei make tissue uneven, and ink is flat.
    absorbed = density.mean(-1)
    deviation = np.sqrt(np.maximum(cv2.blur(absorbed**2, (5, 5)) - cv2.blur(absorbed, (5, 5)) ** 2, 0))
    flat = deviation < 0.2 * absorbed
    blue_pen = flat & (red > 1.05 * green) & (red > blue + 0.15)
    green_pen = (density.max(-1) > 0.25) & (green < 0.75 * np.minimum(red, blue))
    # Red ink lets red through almost whole, and absorbs blue as strongly as green; eosin absorbs blue far less.
    red_pen = flat & (blue > 0.8 * green) & (red < 0.3 * green) & (green > 0.2)
    ink = (blue_pen | green_pen | red_pen).astype(np.uint8)
    ink = cv2.morphologyEx(ink, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    rim = max(1, round(40 / mpp))
    return cv2.dilate(ink, np.ones((2 * rim + 1, 2 * rim + 1), np.uint8)).astype(bool)


def _drop_small(mask: np.ndarray, min_region_px: float, min_hole_px: float) -> np.ndarray:
    def without_small(binary: np.ndarray, smallest: float) -> np.ndarray:
        _, labels, stats, _ = cv2.connectedComponentsWithStats(binary.astype(np.uint8), connectivity=4)
        keep = stats[:, cv2.CC_STAT_AREA] >= smallest
        keep[0] = False
        return np.asarray(keep[labels])

    filled = ~without_small(mask == 0, min_hole_px)
    return without_small(filled, max(4.0, min_region_px))


def _signed_area(points: np.ndarray) -> float:
    x, y = points.T
    return float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y) / 2)


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
