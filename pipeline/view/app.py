"""The web application of a viewer: its pages, and what they ask for."""

import io
import mimetypes
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ...errors import LongslideError
from ...prediction_columns import time_text
from ...version import __version__
from ..report.wording import task_text
from .attention import Sights, attention_routes
from .cohort import Cohort, cohort_routes
from .collection import Collection
from .content import SlideContent, rings_of
from .guard import Guard
from .layers import Layer, layers_of
from .open_slides import OpenSlides
from .pictures import TILE_PX, SlideFacts, SlideFile, finest_level
from .regions import Regions, region_routes
from .viewed_slide import UNCERTAIN_BELOW, ViewedSlide

STATIC = Path(__file__).parent / "static"

CONTENTS_KEPT = 16
"""Slides whose grids and layers stay in memory."""

THUMBNAIL_PX = 256

mimetypes.add_type("text/javascript", ".js")  # some systems say otherwise, and browsers then refuse modules


@dataclass
class Site:
    """What the routes work on.

    Attributes:
        collection: What is shown.
        open_slides: What reads the slides.
        regions: Regions that were drawn.
        cohort: The embeddings of all slides.
        sights: What tiles see under attention.
    """

    collection: Collection
    open_slides: OpenSlides
    _contents: "OrderedDict[str, tuple[SlideContent, dict[str, Layer]]]" = field(default_factory=OrderedDict)
    _lock: Lock = field(default_factory=Lock)

    def __post_init__(self) -> None:
        self.regions = Regions(self.collection.output)
        self.cohort = Cohort(self.collection)
        self.sights = Sights(self.collection.models)

    def slide(self, request: Request) -> ViewedSlide:
        """The slide that a URL names.

        Raises:
            UnknownError: There is none.
        """
        try:
            return self.collection.slides[request.path_params["slide_id"]]
        except KeyError:
            raise UnknownError from None

    def content(self, slide: ViewedSlide) -> SlideContent:
        """What is known of a slide; kept for the next request."""
        return self._known(slide)[0]

    def layers(self, slide: ViewedSlide) -> dict[str, Layer]:
        """Its layers; kept likewise."""
        return self._known(slide)[1]

    def file(self, slide: ViewedSlide) -> SlideFile:
        """How its file is opened.

        Raises:
            LongslideError: Nobody says where it is.
        """
        file = self.content(slide).file
        if file is None:
            raise LongslideError(f"{slide.slide_id}: its slide file was not found; give its folder to the viewer too")
        return file

    def close(self) -> None:
        """End the processes that read slides, and remove what was put elsewhere."""
        self.open_slides.close()
        self.cohort.close()

    def size(self, slide: ViewedSlide) -> tuple[int, int] | None:
        """(width, height) of level 0; None where neither the slide nor its features can be read."""
        try:
            return self.open_slides.facts(self.file(slide)).dimensions
        except LongslideError:
            return self.content(slide).size

    def forget(self, slide: ViewedSlide) -> None:
        """Read what is known of a slide again."""
        with self._lock:
            self._contents.pop(slide.slide_id, None)

    def _known(self, slide: ViewedSlide) -> tuple[SlideContent, dict[str, Layer]]:
        with self._lock:
            known = self._contents.get(slide.slide_id)
        if known is None:
            content = SlideContent(slide)
            of_cohort = {layer.key: layer for layer in self.cohort.layers(content)}
            known = content, layers_of(content) | of_cohort
        with self._lock:
            self._contents[slide.slide_id] = known
            self._contents.move_to_end(slide.slide_id)
            while len(self._contents) > CONTENTS_KEPT:
                self._contents.popitem(last=False)
        return known


class UnknownError(Exception):
    """What a URL names is not served: 404."""


def create_app(collection: Collection, token: str, slide_timeout: float, once: str = "") -> Guard:
    """The application.

    Args:
        collection: What it shows.
        token: The first part of every path; without it there is nothing.
        slide_timeout: Seconds that opening a slide or drawing a picture may take.
        once: A path that leads to the first page, once.

    Returns:
        It, as uvicorn runs it. The processes that read its slides end with it, or when its `close` is called.
    """
    site = Site(collection, OpenSlides(slide_timeout))
    routes = [route for made_by in ROUTES for route in made_by(site)]
    handlers: dict[Any, Any] = {UnknownError: _not_found, LongslideError: _cannot}
    return Guard(Starlette(routes=routes, exception_handlers=handlers), token, site.close, once)


def _not_found(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": "there is no such thing here"}, 404)


def _cannot(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 422)


def pages(site: Site) -> list[Route]:
    """The pages and their files."""
    served = {path.relative_to(STATIC).as_posix(): path for path in STATIC.rglob("*") if path.is_file()}

    def file(request: Request) -> Response:
        name = request.path_params.get("name") or "index.html"
        if name not in served:
            raise UnknownError
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        return Response(served[name].read_bytes(), media_type=kind, headers={"Cache-Control": "no-cache"})

    return [Route("/", file), Route("/{name:path}", file)]


def collection_routes(site: Site) -> list[Route]:
    """The list of slides."""

    def collection(request: Request) -> Response:
        task = site.collection.task
        return JSONResponse(
            {
                "title": site.collection.title,
                "version": __version__,
                "task": None if task is None else {"kind": task.kind, "classes": task.classes, "text": task_text(task)},
                "slides": [
                    _listed(slide) | {"draft": slide.slide_id in site.regions.drafts}
                    for slide in site.collection.slides.values()
                ],
            }
        )

    def thumbnail(request: Request) -> Response:
        slide = site.slide(request)
        saved = _saved_thumbnail(slide)
        if saved is not None:
            return _jpeg(request, str(saved.stat().st_mtime_ns), lambda: _small(saved))
        file = site.file(slide)
        version = str(site.open_slides.version(file))
        return _jpeg(request, version, lambda: site.open_slides.thumbnail(file, THUMBNAIL_PX))

    return [
        Route("/api/collection", collection),
        Route("/api/slides/{slide_id}/thumbnail", thumbnail),
    ]


def slide_routes(site: Site) -> list[Route]:
    """One slide: its facts, pixels, tiles and layers."""

    def facts(request: Request) -> Response:
        slide = site.slide(request)
        site.forget(slide)
        content, layers = site.content(slide), site.layers(slide)
        pixels: dict[str, Any] = {}
        try:
            file = site.file(slide)
            site.open_slides.try_again(file)
            opened = site.open_slides.facts(file)
            pixels = {"size": opened.dimensions, "bounds": opened.bounds, "vendor": opened.vendor}
            pixels |= _resolution(opened, content) | {"version": str(site.open_slides.version(file))}
        except LongslideError as error:
            pixels = {"error": str(error)}
            if content.features is not None and content.size is not None:
                pixels |= {"size": content.size, "mpp": content.features.slide_mpp}
        if "size" in pixels:
            pixels |= {"tile_px": TILE_PX, "finest_level": finest_level(tuple(pixels["size"]))}
        grid = content.grid
        return JSONResponse(
            _listed(slide)
            | {
                "pixels": pixels,
                "grid": None if grid is None else {"size": grid.size, "step": grid.step, "tiles": len(grid.coords)},
                "tissue": rings_of(content.tissue),
                "layers": [layer.description() for layer in layers.values()],
                "facts": content.facts,
                "remarks": content.remarks,
                "numbers": {} if slide.prediction is None else slide.prediction.numbers,
                "spread": None if slide.prediction is None else slide.prediction.spread,
                "classifiers": None if slide.prediction is None else slide.prediction.classifiers,
                "saves": site.regions.folder is not None,
            }
        )

    def tile(request: Request) -> Response:
        slide = site.slide(request)
        level, column, row = (request.path_params[name] for name in ("level", "column", "row"))
        file = site.file(slide)
        version = str(site.open_slides.version(file))
        return _jpeg(request, version, lambda: site.open_slides.tile(file, level, column, row))

    def region(request: Request) -> Response:
        slide = site.slide(request)
        x, y, size, px = (_whole(request, name) for name in ("x", "y", "size", "px"))
        if not (1 <= size <= 8192 and 16 <= px <= 1024 and max(abs(x), abs(y)) < 2**31):
            raise UnknownError
        file = site.file(slide)
        version = str(site.open_slides.version(file))
        return _jpeg(request, version, lambda: site.open_slides.region(file, x, y, size, px))

    def tissue(request: Request) -> Response:
        slide = site.slide(request)
        found = site.content(slide).find_tissue(lambda: site.open_slides.tissue(site.file(slide)))
        return JSONResponse({"tissue": rings_of(found)})

    def coords(request: Request) -> Response:
        grid = site.content(site.slide(request)).grid
        if grid is None:
            raise UnknownError
        return Response(np.ascontiguousarray(grid.coords, "<i4").tobytes(), media_type="application/octet-stream")

    def layer(request: Request) -> Response:
        layers = site.layers(site.slide(request))
        if request.path_params["key"] not in layers:
            raise UnknownError
        return Response(layers[request.path_params["key"]].packed(), media_type="application/octet-stream")

    slide = "/api/slides/{slide_id}"
    return [
        Route(slide, facts),
        Route(slide + "/tiles/{level:int}/{column:int}_{row:int}", tile),
        Route(slide + "/region", region),
        Route(slide + "/tissue", tissue),
        Route(slide + "/grid", coords),
        Route(slide + "/layers/{key}", layer),
    ]


ROUTES: list[Callable[[Site], list[Route]]] = [
    collection_routes,
    slide_routes,
    region_routes,
    cohort_routes,
    attention_routes,
    pages,
]
"""What makes the routes, the pages last, for they take every path. Routes are added before them."""


def _listed(slide: ViewedSlide) -> dict[str, Any]:
    """What the list says of a slide."""
    prediction, certainty = slide.prediction, slide.certainty
    scores: dict[str, float] = {}
    if prediction is not None:
        scores = {**(prediction.probability or {})}
        scores |= {name: value for name in ("value", "risk") if (value := getattr(prediction, name)) is not None}
        scores |= {f"survival {time_text(time)}": value for time, value in (prediction.survival or {}).items()}
    return {
        "id": slide.slide_id,
        "patient": slide.patient_id,
        "status": slide.status,
        "reason": slide.reason,
        "tiles": slide.tiles,
        "tissue_mm2": slide.tissue_mm2,
        "odd": slide.odd,
        "prediction": None if prediction is None else prediction.text,
        "scores": scores,
        "target": slide.target,
        "wrong": slide.wrong,
        "error": slide.error,
        "event": slide.event,
        "certainty": certainty,
        "uncertain": certainty is not None and certainty < UNCERTAIN_BELOW,
        "seen": bool(prediction and prediction.seen),
        "warnings": () if prediction is None else prediction.warnings,
    }


def _resolution(slide: SlideFacts, content: SlideContent) -> dict[str, Any]:
    settings = {} if content.features is None or slide.mpp is None else content.features.settings
    return {"mpp": slide.mpp, "mpp_source": settings.get("mpp_source", slide.mpp_source)}


def _saved_thumbnail(slide: ViewedSlide) -> Path | None:
    """The thumbnail that `predict` saved, if it can be read."""
    for folder in slide.results:
        path = folder / "slides" / slide.slide_id / "thumbnail.jpg"
        try:
            with Image.open(path):
                return path
        except OSError:
            continue
    return None


def _small(thumbnail: Path) -> bytes:
    with Image.open(thumbnail) as picture:
        picture.draft("RGB", (THUMBNAIL_PX, THUMBNAIL_PX))
        picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
        content = io.BytesIO()
        picture.convert("RGB").save(content, "JPEG", quality=80)
        return content.getvalue()


def _whole(request: Request, name: str) -> int:
    try:
        return int(request.query_params[name])
    except (KeyError, ValueError):
        raise UnknownError from None


def _jpeg(request: Request, version: str, draw: Callable[[], bytes | None]) -> Response:
    """A picture of one version of a file. A browser keeps it unasked only under a URL that names this version."""
    tag = f'"{version}"'
    named = request.query_params.get("v") == version
    headers = {"Cache-Control": "private, max-age=86400" if named else "private, no-cache", "ETag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    picture = draw()
    if picture is None:
        raise UnknownError
    return Response(picture, media_type="image/jpeg", headers=headers)
