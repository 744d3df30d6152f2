"""Which tiles of a slide one tile sees under the attention of a trained model or a published encoder."""

import threading
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ...errors import LongslideError
from ...models.slide_encoder.spec import SlideEncoderSpec, list_slide_encoders, load_slide_encoder_spec
from .content import SlideContent
from .viewed_slide import Model, model_name

if TYPE_CHECKING:
    from ..attention_map.sight import Sight
    from .app import Site

IN_SEGMENT = 64
"""Added to a branch's number for tiles of the segment that are not seen."""

SIGHTS_KEPT = 8
"""Models that are not read again, each on one slide."""


class Sights:
    """What the tiles of slides see, by model; kept for the next click.

    Args:
        trained: The trained models that were given, of whatever slides.
    """

    def __init__(self, trained: list[Model]) -> None:
        self._trained = trained
        self._kept: OrderedDict[tuple[object, ...], Sight] = OrderedDict()
        self._reading = threading.Lock()

    def models(self, content: SlideContent) -> list[Model]:
        """The trained models: first those of the slide's predictions, then the others that were given."""
        found = []
        for folder, prediction in content.predictions.items():
            for one in prediction.get("checkpoints", ()):
                path = _found(Path(one["path"]), folder)
                found.append(Model(f"{model_name(path)} ({folder.name})", path, one.get("digest", "")))
        by_path = {model.checkpoint.absolute(): model for model in [*content.slide.models, *self._trained]}
        for model in found:
            by_path.pop(model.checkpoint.absolute(), None)
        return [*found, *by_path.values()]

    def of(self, content: SlideContent, key: str) -> "Sight | None":
        """What the tiles of a slide see.

        Args:
            content: What is known of the slide.
            key: `model-<number>` for one of `models`, else the name of a published encoder.

        Returns:
            None where there is no such model, encoder or grid.

        Raises:
            LongslideError: The model cannot be read, was trained anew since, or has no attention between tiles.
        """
        if content.features is None or content.feature_file is None:
            return None
        kind, _, number = key.partition("-")
        models = self.models(content)
        if kind == "model" and number in map(str, range(len(models))):
            return self._trained_sight(models[int(number)], content.feature_file)
        if key not in list_slide_encoders():
            return None
        return _published_sight(key, len(content.features.coords))

    def _trained_sight(self, model: Model, feature_file: Path) -> "Sight":
        from ...data.features.feature_file import read_features
        from ...models.checkpoint_file import digest
        from ..attention_map.sight import sight_of_model

        with self._reading:
            if not model.checkpoint.is_file():
                raise LongslideError(
                    f"{model.checkpoint}: the model is no longer there; give its run folder to the viewer"
                )
            times = [path.stat().st_mtime_ns for path in (model.checkpoint, feature_file)]
            key = (model, feature_file, *times)
            if key not in self._kept:
                if model.digest and digest(model.checkpoint) != model.digest:
                    raise LongslideError(
                        f"{model.checkpoint}: is not the model of these predictions any more; predict again"
                    )
                self._kept[key] = sight_of_model(model.checkpoint, read_features(feature_file))
            self._kept.move_to_end(key)
            while len(self._kept) > SIGHTS_KEPT:
                self._kept.popitem(last=False)
            return self._kept[key]


def attention_routes(site: "Site") -> list[Route]:
    """The models that there are for a slide, what one is like, and what a tile sees."""

    def models(request: Request) -> Response:
        trained = site.sights.models(site.content(site.slide(request)))
        names = [name for name in list_slide_encoders() if isinstance(load_slide_encoder_spec(name), SlideEncoderSpec)]
        keys = [{"key": f"model-{number}", "name": model.name} for number, model in enumerate(trained)]
        return JSONResponse({"trained": keys, "published": [{"key": name, "name": name} for name in names]})

    def sight_of(request: Request) -> "Sight":
        from .app import UnknownError

        sight = site.sights.of(site.content(site.slide(request)), request.path_params["model"])
        if sight is None:
            raise UnknownError
        return sight

    def model(request: Request) -> Response:
        return JSONResponse(_described(sight_of(request)))

    def seen(request: Request) -> Response:
        from .app import UnknownError

        sight, tile = sight_of(request), request.path_params["tile"]
        what, _, number = request.query_params.get("show", "heads").partition("-")
        most = {"heads": 1, "layers": 1, "head": sight.heads, "branch": len(sight.branches)}.get(what, 0)
        if number not in ("", *map(str, range(most))) or not most or not 0 <= tile < _tiles(sight):
            raise UnknownError
        marks = marks_of(sight, tile, what, int(number or 0))
        return Response(marks.tobytes(), media_type="application/octet-stream")

    path = "/api/slides/{slide_id}/attention"
    return [
        Route(path, models),
        Route(path + "/{model}", model),
        Route(path + "/{model}/{tile:int}", seen),
    ]


def marks_of(sight: "Sight", tile: int, what: str, number: int) -> np.ndarray:
    """What one tile sees, as a mark on each tile.

    Args:
        sight: What the tiles see.
        tile: The one that looks.
        what: `heads` for all heads, `head` for one, `branch` for one branch, `layers` for the way through all layers.
        number: Which head or branch.

    Returns:
        `(tiles,)` int8, -1 where nothing is seen. Of heads the first branch that sees the tile, 0 for patterns without
        branches; of a branch its number, and `IN_SEGMENT` more for what else is in the segment; of layers after how many of
        them the tile is within reach.
    """
    from ..attention_map.sight import CLS_TOKENS, layers_to_reach

    tiles, query = _tiles(sight), tile + CLS_TOKENS
    if what == "layers":
        reached = layers_to_reach(query, sight.tokens, sight.layers, sight.sees)[CLS_TOKENS:]
        return np.where(reached <= sight.layers, reached, -1).astype(np.int8)
    seen = sight.seen_by(tile)[:, :, CLS_TOKENS:]
    marks = np.full(tiles, -1, np.int8)
    if what == "branch":
        length = sight.branches[number][0]
        same = np.arange(CLS_TOKENS, sight.tokens) // length == query // length
        marks[same] = number + IN_SEGMENT
        marks[seen[number].any(0)] = number
        return marks
    visible = np.asarray(seen.any(1)) if what == "heads" else seen[:, number]
    for branch in reversed(range(len(visible))):
        marks[visible[branch]] = branch
    return marks


def _tiles(sight: "Sight") -> int:
    from ..attention_map.sight import CLS_TOKENS

    return sight.tokens - CLS_TOKENS


def _published_sight(name: str, tiles: int) -> "Sight | None":
    from ..attention_map.sight import sight_of_spec

    spec = load_slide_encoder_spec(name)
    if not isinstance(spec, SlideEncoderSpec):
        return None
    branches = tuple(zip(spec.segment_lengths, spec.dilated_ratios, strict=True))
    return sight_of_spec(spec, spec.heads, branches, tiles)


def _found(checkpoint: Path, results: Path) -> Path:
    """A checkpoint by the path that results name: from here, or from the folder that the results are in."""
    return next((path for path in (checkpoint, results.parent / checkpoint) if path.is_file()), checkpoint)


def _described(sight: "Sight") -> dict[str, Any]:
    return {
        "name": sight.name,
        "heads": sight.heads,
        "layers": sight.layers,
        "labels": list(sight.labels),
        "branches": list(sight.branches),
    }
