"""What the tiles of all slides of a viewer have to do with one another: tiles like a given one, and colours by embedding."""

import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ...errors import LongslideError
from .collection import Collection
from .content import SlideContent
from .layers import Layer

if TYPE_CHECKING:
    from ...data.features.tile_colours import TileColours
    from ...data.features.tile_index import TileIndex
    from .app import Site

CLUSTERS = 8
HITS = 24

WAIT = 1.0
"""Seconds after which the page is told how far the index is."""


class Cohort:
    """The tile embeddings of a collection, which are gathered when they are first asked for, in a thread of their own.

    Args:
        collection: The collection.
    """

    def __init__(self, collection: Collection) -> None:
        self._collection = collection
        self._lock = threading.Lock()
        self._colouring = threading.Lock()
        self._index: TileIndex | None = None
        self._made_of: list[Path] = []
        self._colours: TileColours | None = None
        self._making: threading.Thread | None = None
        self._error: LongslideError | None = None
        self._progress = (0, 0)
        self._elsewhere: tempfile.TemporaryDirectory[str] | None = None

    @property
    def progress(self) -> tuple[int, int]:
        """How many of how many feature files have been gathered."""
        return self._progress

    def index(self, wait: float | None = None) -> "TileIndex | None":
        """The index; it is made anew if a feature file was written or added since.

        Args:
            wait: Seconds to wait for it, without end by default.

        Returns:
            None where it is not made within that time.

        Raises:
            LongslideError: There are no embeddings, or they cannot be compared.
        """
        with self._lock:
            if self._index is not None and self._made_of == self._sorted_files() and self._index.is_current():
                return self._index
            if self._making is None:
                self._index = self._colours = None
                self._error = None
                self._making = threading.Thread(target=self._make, name="tile index", daemon=True)
                self._making.start()
            making = self._making
        making.join(wait)
        if making.is_alive():
            return None
        if self._error is not None:
            raise self._error
        return self._index

    def colours(self) -> "TileColours":
        """The colours; waits until they are found.

        Raises:
            LongslideError: There are no embeddings, or they cannot be compared.
        """
        from ...data.features.tile_colours import TileColours

        index = self.index()
        assert index is not None
        with self._colouring:
            if self._colours is None or self._colours.index is not index:
                self._colours = TileColours.of(index, CLUSTERS)
            return self._colours

    def similar(self, content: SlideContent, tile: int, n: int, other_slides: bool, wait: float) -> dict[str, Any]:
        """The tiles most like one, in plain types; or how far the index is.

        Raises:
            LongslideError: The slide has no embeddings, or no such tile.
        """
        file = _file_of(content)
        index = self.index(wait)
        if index is None:
            return {"making": self.progress}
        slide_of = {path: slide.slide_id for slide in self._collection.slides.values() for path in slide.features}
        found = index.similar(file.stem, tile, n, other_slides=other_slides)
        hits = [
            {
                "slide": slide_of[one.features],
                "tile": one.tile,
                "x": one.x,
                "y": one.y,
                "size": one.size,
                "similarity": one.similarity,
            }
            for one in found
        ]
        left_out = [f"{path.name}: {why}" for path, why in index.left_out]
        return {"hits": hits, "tiles": len(index), "slides": len(index.files), "left_out": left_out}

    def layers(self, content: SlideContent) -> Iterator[Layer]:
        """The layers of a slide by its embeddings; their values are found when the page asks for them."""
        if content.grid is None or content.feature_file is None:
            return
        name = content.feature_file.stem

        def clusters() -> np.ndarray:
            return self.colours().clusters(name)

        def components() -> np.ndarray:
            return self.colours().components(name)

        names = tuple(f"cluster {number + 1}" for number in range(CLUSTERS))
        about = f"{CLUSTERS} groups of tiles with similar embeddings (k-means over all slides): a colour is one group."
        yield Layer("clusters", "clusters", "embeddings", "categories", clusters, ends=names, about=about)
        about = (
            "Three principal components of the embeddings of all slides as red, green and blue: similar tiles have similar "
            "colours, on each slide."
        )
        yield Layer("components", "principal components", "embeddings", "colours", components, about=about)

    def close(self) -> None:
        """Remove what was put elsewhere."""
        if self._elsewhere is not None:
            self._elsewhere.cleanup()

    def _make(self) -> None:
        from ...data.features.tile_index import TileIndex

        try:
            files = self._made_of = self._sorted_files()
            if not files:
                raise LongslideError("no slide here has a feature file; give the output folder of longslide embed too")
            self._index = TileIndex.open(files, cache=self._place(files[0].parent), progress=self._tell)
        except LongslideError as error:
            self._error = error
        except Exception as error:  # a thread's end is seen by nobody
            self._error = LongslideError(f"the tiles cannot be compared ({type(error).__name__}: {error})")
        finally:
            with self._lock:
                self._making = None

    def _tell(self, done: int, of: int) -> None:
        self._progress = done, of

    def _files(self) -> dict[str, Path]:
        """The feature file of each slide that has one."""
        found = {}
        for slide in self._collection.slides.values():
            path = next((path for path in slide.features if path.is_file()), None)
            if path is not None:
                found[slide.slide_id] = path
        return found

    def _sorted_files(self) -> list[Path]:
        return sorted(self._files().values())

    def _place(self, folder: Path) -> Path | None:
        """Where the index lies: beside the features, or where that is not allowed in a folder that goes with the viewer."""
        if os.access(folder, os.W_OK):
            return None
        if self._elsewhere is None:
            self._elsewhere = tempfile.TemporaryDirectory(prefix="longslide-view-")
        return Path(self._elsewhere.name)


def cohort_routes(site: "Site") -> list[Route]:
    """Tiles like one of a slide; or how far the index is that finds them, which is made before anybody clicks."""

    def similar(request: Request) -> Response:
        content = site.content(site.slide(request))
        other_slides = request.query_params.get("other_slides") == "1"
        return JSONResponse(site.cohort.similar(content, request.path_params["tile"], HITS, other_slides, WAIT))

    def gather(request: Request) -> Response:
        index = site.cohort.index(WAIT)
        return JSONResponse({"making": site.cohort.progress} if index is None else {"tiles": len(index)})

    return [Route("/api/index", gather), Route("/api/slides/{slide_id}/similar/{tile:int}", similar)]


def _file_of(content: SlideContent) -> Path:
    if content.feature_file is None:
        raise LongslideError(f"{content.slide.slide_id}: has no feature file, so nothing is known of its tiles")
    return content.feature_file
