"""Which tiles of a slide one tile sees under the dilated attention of a slide encoder, for the page to draw."""

from typing import TYPE_CHECKING

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ...models.slide_encoder.spec import SlideEncoderSpec, list_slide_encoders, load_slide_encoder_spec

if TYPE_CHECKING:
    from .app import Site

IN_SEGMENT = 64
"""Added to a branch's number for tiles of the segment that are not seen."""


def attention_routes(site: "Site") -> list[Route]:
    """The slide encoders that there are, and what a tile sees."""

    def encoders(request: Request) -> Response:
        specs = [load_slide_encoder_spec(name) for name in list_slide_encoders()]
        return JSONResponse({"encoders": [_described(spec) for spec in specs if isinstance(spec, SlideEncoderSpec)]})

    def seen(request: Request) -> Response:
        from .app import UnknownError

        grid = site.content(site.slide(request)).features
        name = request.query_params.get("encoder", "gigapath")
        tile = request.path_params["tile"]
        if grid is None or not 0 <= tile < len(grid.coords) or name not in list_slide_encoders():
            raise UnknownError
        what, _, number = request.query_params.get("show", "heads").partition("-")
        spec = load_slide_encoder_spec(name)
        if not isinstance(spec, SlideEncoderSpec):
            raise UnknownError
        most = {"heads": 1, "layers": 1, "head": spec.heads, "branch": len(spec.segment_lengths)}.get(what, 0)
        if number not in ("", *map(str, range(most))) or not most:
            raise UnknownError
        found = marks_of(len(grid.coords), tile, spec, what, int(number or 0))
        return Response(found.tobytes(), media_type="application/octet-stream")

    return [Route("/api/encoders", encoders), Route("/api/slides/{slide_id}/attention/{tile:int}", seen)]


def marks_of(tiles: int, tile: int, spec: SlideEncoderSpec, what: str, number: int) -> np.ndarray:
    """What one tile sees, as a mark on each tile.

    Args:
        tiles: Tiles of the slide.
        tile: The one that looks.
        spec: The slide encoder.
        what: `heads` for all heads, `head` for one, `branch` for one branch, `layers` for the way through all layers.
        number: Which head or branch.

    Returns:
        `(tiles,)` int8, -1 where nothing is seen. Of heads the first branch that sees the tile; of a branch its number, and
        `IN_SEGMENT` more for what else is in the segment; of layers after how many of them the tile is within reach.
    """
    from ..attention_map.sight import CLS_TOKENS, layers_to_reach, sight_of_spec

    branches = tuple(zip(spec.segment_lengths, spec.dilated_ratios, strict=True))
    sight = sight_of_spec(spec, spec.heads, branches, tiles)
    tokens, query = sight.tokens, tile + CLS_TOKENS
    if what == "layers":
        reached = layers_to_reach(query, tokens, sight.layers, sight.sees)[CLS_TOKENS:]
        return np.where(reached <= sight.layers, reached, -1).astype(np.int8)
    seen = sight.seen_by(tile)[:, :, CLS_TOKENS:]
    marks = np.full(tiles, -1, np.int8)
    if what == "branch":
        length = branches[number][0]
        same = np.arange(CLS_TOKENS, tokens) // length == query // length
        marks[same] = number + IN_SEGMENT
        marks[seen[number].any(0)] = number
        return marks
    visible = np.asarray(seen.any(1)) if what == "heads" else seen[:, number]
    for branch in reversed(range(len(branches))):
        marks[visible[branch]] = branch
    return marks


def _described(spec: SlideEncoderSpec) -> dict[str, object]:
    branches = zip(spec.segment_lengths, spec.dilated_ratios, strict=True)
    return {"name": spec.name, "heads": spec.heads, "layers": spec.layers, "branches": list(branches)}
