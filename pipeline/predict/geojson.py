"""Scores of tiles as GeoJSON that QuPath opens: a polygon for each tile, and regions merged from the strongest.

RFC 7946 in level-0 pixels: rings are closed, outlines run counterclockwise and holes clockwise (with y as given).
"""

import json
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np

FOR_COLOUR = (180, 4, 38)
AGAINST_COLOUR = (59, 76, 192)
"""Both ends of the overlay's colour map."""

Polygon = list[list[list[int]]]


def tiles_to_geojson(
    coords: np.ndarray, tile_size_level0: int, scores: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
    """A GeoJSON Feature for each tile, a `tile` object in QuPath, with its scores as measurements.

    Args:
        coords: `(N, 2)` top-left corner (x, y) of each tile in level-0 pixels.
        tile_size_level0: Edge of a tile in level-0 pixels.
        scores: `(N,)` scores under the name of each measurement.

    Returns:
        N Features, in the order of `coords`.
    """
    features = []
    names = list(scores)
    values = np.stack([scores[name] for name in names], axis=1).tolist()
    for (x0, y0), row in zip(coords.tolist(), values, strict=True):
        x1, y1 = x0 + tile_size_level0, y0 + tile_size_level0
        ring = [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]
        measurements = {name: float(f"{value:.6g}") for name, value in zip(names, row, strict=True)}
        properties = {"objectType": "tile", "measurements": measurements}
        features.append(
            {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": properties}
        )
    return features


def regions_to_geojson(
    coords: np.ndarray,
    tile_size_level0: int,
    scores: np.ndarray,
    threshold: float,
    *,
    name: str,
    colour: tuple[int, int, int],
) -> list[dict[str, Any]]:
    """A GeoJSON Feature, an annotation in QuPath, for each region of tiles that touch along an edge and reach a threshold.

    Args:
        coords: `(N, 2)` top-left corner (x, y) of each tile in level-0 pixels.
        tile_size_level0: Edge of a tile in level-0 pixels.
        scores: `(N,)` scores.
        threshold: Tiles of at least this score are in.
        name: Class of the annotations.
        colour: RGB of that class.

    Returns:
        The regions, with the mean score of their tiles and their number as measurements.
    """
    inside = scores >= threshold
    tiles, values = coords[inside], scores[inside]
    features = []
    for polygon, rows in _merge(tiles, tile_size_level0):
        measurements = {
            "tiles": len(rows),
            "mean score": float(f"{values[rows].mean():.6g}"),
            "threshold": float(f"{threshold:.6g}"),
        }
        properties = {
            "objectType": "annotation",
            "classification": {"name": name, "color": list(colour)},
            "measurements": measurements,
        }
        features.append(
            {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": polygon}, "properties": properties}
        )
    return features


def to_geojson(features: list[dict[str, Any]]) -> str:
    """A FeatureCollection as text."""
    return json.dumps({"type": "FeatureCollection", "features": features})


def _merge(coords: np.ndarray, size: int) -> list[tuple[Polygon, np.ndarray]]:
    """The union of squares as polygons with holes, and the rows of `coords` in each."""
    if not len(coords):
        return []
    # Between neighbouring edges of squares nothing changes: the union is exact on a raster of these cells.
    xs, ys = (np.unique([coords[:, axis], coords[:, axis] + size]) for axis in (0, 1))
    raster = np.zeros((len(ys) - 1, len(xs) - 1), np.uint8)
    first = np.stack([np.searchsorted(xs, coords[:, 0]), np.searchsorted(ys, coords[:, 1])], axis=1)
    last = np.stack([np.searchsorted(xs, coords[:, 0] + size), np.searchsorted(ys, coords[:, 1] + size)], axis=1)
    for (x0, y0), (x1, y1) in zip(first.tolist(), last.tolist(), strict=True):
        raster[y0:y1, x0:x1] = 1
    # Pieces that meet in a corner alone are two polygons: one whose outline touches itself is not valid.
    count, labels = cv2.connectedComponents(raster, connectivity=4)
    label_of_tile = labels[first[:, 1], first[:, 0]]
    merged = []
    for label in range(1, count):
        rows = np.flatnonzero(label_of_tile == label)
        left, top = first[rows].min(0)
        right, bottom = last[rows].max(0)
        piece = labels[top:bottom, left:right] == label
        rings = [[[int(xs[left + x]), int(ys[top + y])] for x, y in ring] for ring in _rings(piece)]
        merged.append((rings, rows))
    return merged


def _rings(piece: np.ndarray) -> list[list[list[int]]]:
    """Outline and holes of one piece of a raster, along the borders of its pixels; closed, outline first."""
    # In the doubled raster no outline is thinner than two pixels; OpenCV's rings run through the outermost pixels'
    # centres, half a pixel inside the border: rounding moves them there.
    doubled = np.pad(np.kron(piece, np.ones((2, 2))).astype(np.uint8), 1)
    traced, hierarchy = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    rings = []
    for ring, (_, _, _, parent) in sorted(zip(traced, hierarchy[0].tolist(), strict=True), key=lambda pair: pair[1][3]):
        points = _corners(np.rint((ring[:, 0] - 0.5) / 2).astype(int))
        counterclockwise = _signed_area(points) > 0
        if counterclockwise != (parent < 0):
            points = points[::-1]
        rings.append([*points.tolist(), points[0].tolist()])
    return rings


def _corners(points: np.ndarray) -> np.ndarray:
    """The points at which a ring of horizontal and vertical edges turns."""
    points = points[(points != np.roll(points, 1, axis=0)).any(1)]
    turns = (points - np.roll(points, 1, axis=0) != 0) != (np.roll(points, -1, axis=0) - points != 0)
    return np.asarray(points[turns.any(1)])


def _signed_area(points: np.ndarray) -> float:
    x, y = points.T
    return float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y) / 2)
