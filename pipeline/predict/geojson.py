"""Scores of tiles as GeoJSON that QuPath opens: a polygon for each tile, and regions merged from the strongest.

RFC 7946 in level-0 pixels: rings are closed, outlines run counterclockwise and holes clockwise (with y as given).
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import shapely

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
    # simplify(0) drops the points along an edge; pieces that meet in a corner alone are polygons of their own.
    pieces = shapely.get_parts(shapely.union_all(shapely.box(*coords.T, *(coords + size).T)).simplify(0))
    tiles, piece_of_tile = shapely.STRtree(pieces).query(shapely.points(coords + size / 2), "intersects")
    merged = [(_rings(piece), tiles[piece_of_tile == number]) for number, piece in enumerate(pieces)]
    return sorted(merged, key=lambda polygon_and_rows: int(polygon_and_rows[1][0]))


def _rings(piece: shapely.Polygon) -> Polygon:
    """Outline and holes of a polygon of whole pixels, closed, outline first."""
    oriented = shapely.orient_polygons(piece)
    return [shapely.get_coordinates(ring).astype(int).tolist() for ring in (oriented.exterior, *oriented.interiors)]
