"""Regions drawn in the viewer: GeoJSON that `embed` takes as tissue masks, and the slide table that names them."""

import json
import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import shapely
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ...data.table import csv_of, read_rows
from ...data.whole_file import write_whole
from ...errors import LongslideError
from .content import SlideContent

if TYPE_CHECKING:
    from .app import Site

logger = logging.getLogger(__name__)

FOLDER = "regions"
TABLE = "slides.csv"
DRAFTS = ".drafts"
COLUMNS = ("slide", "slide_id", "slide_mpp", "patient_id", "tissue_mask")

MOST_POINTS = 500_000
"""Points of the regions of a slide."""

MOST_SENT_BYTES = 32 * 2**20


class Regions:
    """The regions of a collection, in a folder of its own.

    Args:
        output: The output folder that they belong to; None where there is none, and nothing can be saved.
    """

    def __init__(self, output: Path | None) -> None:
        self.folder = None if output is None else output.absolute() / FOLDER
        self._writing = threading.Lock()  # files are written by one request at a time
        self._drafts: dict[str, Any] = {}
        for path in () if self.folder is None else self.folder.glob(f"{DRAFTS}/*.json"):
            try:
                self._drafts[path.stem] = _draft_of(json.loads(path.read_text(encoding="utf-8")), path.stem)
            except (OSError, ValueError, RecursionError, LongslideError) as error:
                logger.warning("%s: what was drawn and not saved cannot be read (%s)", path, error)

    @property
    def drafts(self) -> Mapping[str, Any]:
        """What is drawn and not saved, by slide: an object as the page sent it."""
        return self._drafts

    def keep_draft(self, slide_id: str, draft: Any) -> bool:
        """Keep what is drawn and not saved yet, or forget it.

        Args:
            slide_id: The slide.
            draft: A JSON object: `regions`, the open outline (`ring`) and what it is for (`change`); None for nothing.

        Returns:
            Whether it is kept when the viewer ends: there is a folder for it that may be written to.

        Raises:
            LongslideError: It is no such object.
        """
        if draft is not None:
            _draft_of(draft, slide_id)
        with self._writing:  # two tabs may show the slide
            if draft is None:
                self._drafts.pop(slide_id, None)
            else:
                self._drafts[slide_id] = draft
            return self._write_draft(slide_id, draft)

    def _write_draft(self, slide_id: str, draft: Any) -> bool:
        if self.folder is None:
            return False
        path = self.folder / DRAFTS / f"{slide_id}.json"
        try:
            if draft is None:
                path.unlink(missing_ok=True)
            else:
                write_whole(path, json.dumps(draft).encode())
        except (OSError, LongslideError):
            return False
        return True

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
        except (OSError, ValueError) as error:
            raise LongslideError(f"{path}: cannot be read as JSON ({error}); correct or delete it") from error
        return to_geojson(regions_of(content, str(path)))

    def write(self, content: SlideContent, geojson: Any) -> Path | None:
        """Save the regions of a slide, or remove them where there are none.

        Args:
            content: What is known of the slide.
            geojson: A GeoJSON FeatureCollection of polygons in level-0 pixels.

        Returns:
            The file; None if there are no regions.

        Raises:
            LongslideError: There is no output folder, it is no such GeoJSON, or it cannot be written.
        """
        slide_id = content.slide.slide_id
        path = self._path(slide_id)
        if path is None or self.folder is None:
            raise LongslideError("no output folder to save regions in: start the viewer with --output FOLDER")
        regions = regions_of(geojson, slide_id)
        with self._writing:
            self._write(content, path, self.folder / TABLE, regions)
        return None if regions.is_empty else path

    def _write(self, content: SlideContent, path: Path, table: Path, regions: shapely.Geometry) -> None:
        slide = content.slide
        rows = {row["slide_id"]: row for row in read_rows(table)}
        rows.pop(slide.slide_id, None)
        if regions.is_empty:
            path.unlink(missing_ok=True)
        else:
            write_whole(path, json.dumps(to_geojson(regions)).encode())
            rows[slide.slide_id] = {
                "slide": "" if content.file is None else str(content.file.path),
                "slide_id": slide.slide_id,
                "slide_mpp": "" if content.given_mpp is None else str(content.given_mpp),
                "patient_id": slide.patient_id,
                "tissue_mask": path.name,
            }
        if rows:
            write_whole(table, csv_of(COLUMNS, (rows[name] for name in sorted(rows))))
        else:
            table.unlink(missing_ok=True)

    def _path(self, slide_id: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{slide_id}.geojson"


def regions_of(geojson: Any, what: str) -> shapely.Geometry:
    """The area of GeoJSON's polygons, mended where they cross themselves.

    Args:
        geojson: A FeatureCollection.
        what: Whose it is, for the message.

    Raises:
        LongslideError: It is none, or has more than `MOST_POINTS`.
    """
    try:
        shapes = [shapely.geometry.shape(feature["geometry"]) for feature in geojson["features"]]
        points = int(shapely.get_num_coordinates(shapes).sum())
        finite = bool(np.isfinite(shapely.get_coordinates(shapes)).all())
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, shapely.errors.ShapelyError) as error:
        raise LongslideError(f"{what}: these are not polygons ({error!r})") from error
    if points > MOST_POINTS or not finite:
        why = f"{points:,} points, more than {MOST_POINTS:,}" if finite else "coordinates that are no numbers"
        raise LongslideError(f"{what}: regions with {why}; draw simpler ones")
    return _areas(shapely.union_all([_areas(shapely.make_valid(shape)) for shape in shapes]))


def changed(
    regions: shapely.Geometry,
    ring: Any,
    change: Literal["add", "remove"],
    size: tuple[int, int] | None,
    what: str,
) -> shapely.Geometry:
    """Regions with an area added or removed, within the slide.

    Args:
        regions: The regions.
        ring: (x, y) of the area's outline in level-0 pixels, as lists.
        change: What to do with it.
        size: (width, height) of the slide, if it is known.
        what: Whose they are, for the message.

    Raises:
        LongslideError: The ring is none.
    """
    area = regions_of({"features": [{"geometry": {"type": "Polygon", "coordinates": [ring]}}]}, what)
    if size is not None:
        area = shapely.intersection(area, shapely.box(0, 0, *size))
    result = shapely.union(regions, area) if change == "add" else shapely.difference(regions, area)
    return _areas(result)


def to_geojson(regions: shapely.Geometry) -> dict[str, Any]:
    """A FeatureCollection of polygons, to a tenth of a pixel; QuPath opens it, and `embed` takes it as a tissue mask."""
    features = []
    for polygon in shapely.get_parts(regions):
        oriented = shapely.orient_polygons(polygon)
        rings = [shapely.get_coordinates(ring).round(1).tolist() for ring in (oriented.exterior, *oriented.interiors)]
        features.append(
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": rings},
                "properties": {"objectType": "annotation", "classification": {"name": "Tissue", "color": [213, 94, 0]}},
            }
        )
    return {"type": "FeatureCollection", "features": features}


def region_routes(site: "Site") -> list[Route]:
    """What is drawn of a slide: read, kept as a draft, saved, changed by an outline."""

    def read(request: Request) -> Response:
        slide = site.slide(request)
        known, draft = site.regions.read(slide.slide_id), site.regions.drafts.get(slide.slide_id)
        return JSONResponse({"regions": known, "draft": draft, "path": _shown(site.regions.folder)})

    async def keep(request: Request) -> Response:
        slide, sent = site.slide(request), await _sent(request)
        return JSONResponse({"lasts": await run_in_threadpool(site.regions.keep_draft, slide.slide_id, sent)})

    async def write(request: Request) -> Response:
        slide, sent = site.slide(request), await _sent(request)
        path = await run_in_threadpool(lambda: site.regions.write(site.content(slide), sent))
        return JSONResponse({"path": _shown(path), "table": _shown(site.regions.folder, TABLE)})

    async def change(request: Request) -> Response:
        slide, sent = site.slide(request), await _sent(request)
        if not isinstance(sent, dict) or sent.get("change") not in ("add", "remove"):
            raise LongslideError(f"{slide.slide_id}: `change` must be add or remove")

        def changing() -> dict[str, Any]:
            regions = regions_of(sent.get("regions"), slide.slide_id)
            size = site.size(slide)
            return to_geojson(changed(regions, sent.get("ring"), sent["change"], size, slide.slide_id))

        return JSONResponse({"regions": await run_in_threadpool(changing)})

    path = "/api/slides/{slide_id}/regions"
    return [
        Route(path, read, methods=["GET"]),
        Route(path, write, methods=["PUT"]),
        Route(path, change, methods=["POST"]),
        Route(path + "/draft", keep, methods=["PUT"]),
    ]


async def _sent(request: Request) -> Any:
    """The JSON that was sent."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MOST_SENT_BYTES:
            raise LongslideError(f"more than {MOST_SENT_BYTES >> 20} MB of regions; draw simpler ones")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise LongslideError(f"not JSON: {error}") from error


def _shown(folder: Path | None, *names: str) -> str | None:
    return None if folder is None else str(folder.joinpath(*names))


def _draft_of(draft: Any, slide_id: str) -> dict[str, Any]:
    """A draft, if it is one; its areas are looked at when they are changed or saved."""
    if (
        not isinstance(draft, dict)
        or set(draft) != {"regions", "ring", "change"}
        or not isinstance(draft["regions"], dict)
        or not isinstance(draft["regions"].get("features"), list)
        or not isinstance(draft["ring"], list)
    ):
        raise LongslideError(f"{slide_id}: a draft has `regions` (GeoJSON), `ring` (a list of points) and `change`")
    return draft


def _areas(shape: shapely.Geometry) -> shapely.Geometry:
    """What of a geometry is area: points and lines left out."""
    parts = [part for several in shapely.get_parts(shape) for part in shapely.get_parts(several)]
    return shapely.MultiPolygon([part for part in parts if part.geom_type == "Polygon" and part.area > 0])
