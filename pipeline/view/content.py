"""What is known of one slide beside its pixels: its tile grid, its tissue, its prediction."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from ...data.features.feature_file import read_features
from ...data.features.features import Features
from ...data.table import read_records
from ...errors import LongslideError
from ..predict.slide_json import read_json
from .pictures import SlideFile
from .viewed_slide import ViewedSlide


@dataclass(frozen=True)
class TileGrid:
    """Where the tiles of a slide are.

    Attributes:
        coords: `(N, 2)` int32 top-left corner (x, y) of each tile in level-0 pixels, in the order of the feature file.
        size: Edge of a tile in level-0 pixels.
        step: Distance between tiles in level-0 pixels.
    """

    coords: np.ndarray
    size: int
    step: int


@dataclass(frozen=True)
class TileScores:
    """What one `tiles.csv` holds.

    Attributes:
        folder: The results folder.
        method: How the tiles were scored.
        coords: `(N, 2)` int32, as of the grid.
        columns: `(N,)` float32 by name: classes or labels, `value`, `risk`, or `attention`.
        shown: The column that the slide's overlay shows.
    """

    folder: Path
    method: str
    coords: np.ndarray
    columns: dict[str, np.ndarray]
    shown: str


@dataclass
class SlideContent:
    """What is known of a slide. What cannot be read is said in `remarks`, and is not there.

    Attributes:
        slide: The slide.
        remarks: What could not be read, and why.
    """

    slide: ViewedSlide
    remarks: list[str] = field(default_factory=list)
    _finding: Lock = field(default_factory=Lock, repr=False)

    @cached_property
    def feature_file(self) -> Path | None:
        """The first of its feature files that is there."""
        return next((path for path in self.slide.features if path.is_file()), None)

    @cached_property
    def features(self) -> Features | None:
        """Its feature file without the tile embeddings; None if there is none."""
        if self.feature_file is None:
            return None
        try:
            return read_features(self.feature_file, embeddings=False)
        except LongslideError as error:
            self.remarks.append(str(error))
            return None

    @cached_property
    def predictions(self) -> dict[Path, dict[str, Any]]:
        """What each results folder says of it."""
        found = {}
        for folder in self.slide.results:
            try:
                found[folder] = read_json(folder / f"{self.slide.slide_id}.json")
            except LongslideError as error:
                self.remarks.append(str(error))
        return found

    @cached_property
    def scores(self) -> list[TileScores]:
        """The scores of its tiles that `predict` wrote."""
        found = []
        for folder, content in self.predictions.items():
            explanation = content.get("explanation")
            path = folder / "slides" / self.slide.slide_id / "tiles.csv"
            if not explanation or not path.is_file():
                continue
            try:
                header, rows = read_records(path)
                numbers = np.array(rows, np.float64).reshape(len(rows), len(header))
            except (LongslideError, ValueError) as error:
                self.remarks.append(f"{path}: the scores cannot be read ({error}); predict the slide again")
                continue
            names = [name.removeprefix("score_") for name in header[2:]]
            columns = {name: numbers[:, number].astype(np.float32) for number, name in enumerate(names, 2)}
            scores = TileScores(
                folder, explanation["method"], numbers[:, :2].astype(np.int32), columns, explanation.get("shows", "")
            )
            found.append(scores)
        return found

    @cached_property
    def grid(self) -> TileGrid | None:
        """The grid of its tiles; None where they are not known, or not in pixels."""
        features = self.features
        if features is not None:
            if features.layout == "stamp":  # cells of a grid whose place is not known
                return None
            size = features.tile_size_level0 or features.step_level0
            return TileGrid(features.coords.astype(np.int32), size, features.step_level0)
        for scores in self.scores:
            quality = self.predictions[scores.folder].get("quality", {})
            px, tile_mpp, slide_mpp = (quality.get(name) for name in ("tile_px", "tile_mpp", "slide_mpp"))
            if px and tile_mpp and slide_mpp:
                size = round(px * tile_mpp / slide_mpp)
                return TileGrid(scores.coords, size, round(size * (px - (quality.get("overlap") or 0)) / px))
        return None

    @cached_property
    def tissue(self) -> str:
        """Its tissue's contours as GeoJSON in level-0 pixels; empty if they are not known."""
        return (self.features.tissue if self.features is not None else None) or ""

    def find_tissue(self, find: Callable[[], str]) -> str:
        """The contours of the tissue of a slide without features, found once.

        Args:
            find: Finds them.

        Raises:
            LongslideError: They cannot be found.
        """
        with self._finding:
            if not self.tissue:
                self.tissue = find()
            return self.tissue

    @cached_property
    def file(self) -> SlideFile | None:
        """How its file is opened: the first of the places where it may be that is there, else the likeliest one."""
        features = self.features
        places = [*self.slide.paths]
        if features is not None and features.slide_path:
            places.append(Path(features.slide_path))
        places += [Path(path) for one in self.predictions.values() if (path := one.get("slide_file", {}).get("path"))]
        if not places:
            return None
        path = next((path for path in places if path.exists()), places[0])
        reader = None if features is None else features.settings.get("reader")
        return SlideFile(path.absolute(), self.given_mpp, reader)

    @cached_property
    def given_mpp(self) -> float | None:
        """Microns per pixel of level 0 by the user's word, now or when its features were made."""
        features = self.features
        if self.slide.slide_mpp is None and features is not None and features.settings.get("mpp_source") == "option":
            return features.slide_mpp
        return self.slide.slide_mpp

    @cached_property
    def size(self) -> tuple[int, int] | None:
        """(width, height) of level 0 by its feature file."""
        return None if self.features is None else self.features.level0_size

    @property
    def facts(self) -> dict[str, Any]:
        """What the page says of its features and predictions, in plain types."""
        features = self.features
        made = {}
        if features is not None:
            made = {
                "tiles": len(features.coords),
                "tile encoder": features.encoder,
                "tile": f"{features.tile_px} px" + (f" at {features.tile_mpp:g} µm/px" if features.tile_mpp else ""),
                "tissue found by": features.tissue_method,
                "feature file": str(self.feature_file),
            }
        return {name: value for name, value in made.items() if value not in (None, "")}


def rings_of(geojson: str) -> list[list[list[list[float]]]]:
    """The polygons of GeoJSON as lists of rings of (x, y); none of an empty text."""
    if not geojson:
        return []
    polygons = []
    for feature in json.loads(geojson).get("features", ()):
        geometry = feature.get("geometry") or {}
        if geometry.get("type") == "Polygon":
            polygons.append(geometry["coordinates"])
        elif geometry.get("type") == "MultiPolygon":
            polygons += geometry["coordinates"]
    return polygons
