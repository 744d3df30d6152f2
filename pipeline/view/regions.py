"""Regions drawn in the viewer: GeoJSON that `embed` takes as tissue masks, and the slide table that names them."""

import json
from pathlib import Path
from typing import Any

import shapely

from ...data.table import csv_of, read_rows
from ...data.whole_file import write_whole
from ...errors import LongslideError
from .collection import ViewedSlide
from .open_slides import SlideFile

FOLDER = "regions"
TABLE = "slides.csv"
COLUMNS = ("slide", "slide_id", "slide_mpp", "patient_id", "tissue_mask")

MOST_POINTS = 500_000
"""Points of the regions of a slide."""


class Regions:
    """The regions of a collection, in a folder of its own.

    Args:
        output: The output folder that they belong to; None where there is none, and nothing can be saved.
    """

    def __init__(self, output: Path | None) -> None:
        self.folder = None if output is None else output / FOLDER

    def read(self, slide_id: str) -> dict[str, Any] | None:
        """The regions of a slide as GeoJSON; None if nothing was saved.

        Raises:
            LongslideError: The file cannot be read.
        """
        path = self._path(slide_id)
        if path is None or not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return _collection(_polygons(content))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise LongslideError(f"{path}: not GeoJSON with polygons ({error}); correct or delete it") from error

    def write(self, slide: ViewedSlide, file: SlideFile | None, content: Any) -> Path | None:
        """Save the regions of a slide, or remove them where there are none.

        Args:
            slide: The slide.
            file: How it is opened.
            content: A GeoJSON FeatureCollection of polygons in level-0 pixels.

        Returns:
            The file; None if there are no regions.

        Raises:
            LongslideError: There is no output folder, it is no such GeoJSON, or it cannot be written.
        """
        path = self._path(slide.slide_id)
        if path is None or self.folder is None:
            raise LongslideError("there is no output folder to save regions in: start the viewer with --output FOLDER")
        try:
            polygons = _polygons(content)
        except (ValueError, TypeError, KeyError, AttributeError, shapely.errors.ShapelyError) as error:
            raise LongslideError(f"{slide.slide_id}: these are no polygons ({error})") from error
        rows = {row["slide_id"]: row for row in read_rows(self.folder / TABLE)}
        rows.pop(slide.slide_id, None)
        if polygons:
            write_whole(path, json.dumps(_collection(polygons)).encode())
            rows[slide.slide_id] = {
                "slide": "" if file is None else str(file.path),
                "slide_id": slide.slide_id,
                "slide_mpp": "" if slide.slide_mpp is None else str(slide.slide_mpp),
                "patient_id": slide.patient_id,
                "tissue_mask": path.name,
            }
        else:
            path.unlink(missing_ok=True)
        write_whole(self.folder / TABLE, csv_of(COLUMNS, (rows[name] for name in sorted(rows))))
        return path if polygons else None

    def _path(self, slide_id: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{slide_id}.geojson"


def _polygons(content: Any) -> list[tuple[str, shapely.Polygon]]:
    """Names and polygons of GeoJSON; polygons that cross themselves are mended, empty ones left out."""
    found = []
    points = 0
    for feature in content["features"]:
        name = str((feature.get("properties") or {}).get("classification", {}).get("name", "Tissue"))[:100]
        shape = shapely.geometry.shape(feature["geometry"])
        points += shapely.get_num_coordinates(shape)
        if points > MOST_POINTS:
            raise ValueError(f"more than {MOST_POINTS:,} points")
        for part in shapely.get_parts(shapely.make_valid(shape)):
            if part.geom_type == "Polygon" and part.area > 0:
                found.append((name, part))
    return found


def _collection(polygons: list[tuple[str, shapely.Polygon]]) -> dict[str, Any]:
    features = []
    for name, polygon in polygons:
        oriented = shapely.orient_polygons(polygon)
        rings = [shapely.get_coordinates(ring).round(1).tolist() for ring in (oriented.exterior, *oriented.interiors)]
        features.append(
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": rings},
                "properties": {"objectType": "annotation", "classification": {"name": name}},
            }
        )
    return {"type": "FeatureCollection", "features": features}
