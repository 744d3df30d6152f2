"""The layers of a slide: a number, a class or a colour for each of its tiles, drawn over the pixels."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..predict.explain import score_ends
from ..predict.overlay import score_limit
from .content import SlideContent

LayerKind = Literal["signed", "unsigned", "categories", "colours"]


@dataclass(frozen=True)
class Layer:
    """One value for each tile of the grid.

    Attributes:
        key: Its name in URLs, unique for a slide.
        title: What a person reads.
        group: Layers of one group stand together, such as those of one method.
        kind: `signed` and `unsigned` numbers are drawn in a colour map, `categories` in one colour each, `colours` as they
            are.
        values: The values, or what finds them when the page asks for them.
            Of numbers `(N,)` float32, NaN for none; of categories `(N,)` int32, -1 for none; of colours `(N, 3)` uint8.
        limit: Of numbers: where the colours end, `-limit` or 0 to `limit`.
        ends: What the lowest and the highest values mean; names of the categories.
        unit: Of numbers: their unit.
        about: What the values mean, in a sentence or two for the page.
    """

    key: str
    title: str
    group: str
    kind: LayerKind
    values: np.ndarray | Callable[[], np.ndarray]
    limit: float = 1.0
    ends: tuple[str, ...] = ()
    unit: str = ""
    about: str = ""

    def description(self) -> dict[str, Any]:
        """All but the values, in plain types."""
        return {
            name: getattr(self, name) for name in ("key", "title", "group", "kind", "limit", "ends", "unit", "about")
        }

    def packed(self) -> bytes:
        """The values as the page reads them: little-endian float32, int32 or bytes."""
        kind = {"categories": "<i4", "colours": "u1"}.get(self.kind, "<f4")
        values = self.values if isinstance(self.values, np.ndarray) else self.values()
        return np.ascontiguousarray(values, kind).tobytes()


def scores_of_predict(content: SlideContent) -> Iterator[Layer]:
    """The scores that `predict --explain` wrote, one layer for each class and method; first the one of the overlay."""
    grid = content.grid
    if grid is None:
        return
    rows = {place: row for row, place in enumerate(map(tuple, grid.coords.tolist()))}
    several = len({scores.method for scores in content.scores}) < len(content.scores)
    for number, scores in enumerate(content.scores):
        place = [rows.get(corner, -1) for corner in map(tuple, scores.coords.tolist())]
        known = np.array(place) >= 0
        group = scores.method.replace("-", " ") + (f" ({scores.folder.name})" if several else "")
        signed = scores.method != "attention"
        for name in sorted(scores.columns, key=lambda name: name != scores.shown):
            values = np.full(len(grid.coords), np.nan, np.float32)
            values[np.array(place)[known]] = scores.columns[name][known]
            finite = scores.columns[name][np.isfinite(scores.columns[name])]
            yield Layer(
                f"score-{number}-{list(scores.columns).index(name)}",
                name,
                group,
                "signed" if signed else "unsigned",
                values,
                score_limit(finite),
                score_ends(name, signed),
                *_meaning(scores.method, name),
            )


def _meaning(method: str, name: str) -> tuple[str, str]:
    """The unit of the scores of a method, and what they mean."""
    if method == "attention":
        return "", "The model's attention weight: where it looks, and not for or against which class."
    unit, what = ("", f"the {name}") if name in ("value", "risk") else ("log-odds", f"the log-odds of {name}")
    return unit, {
        "integrated-gradients": f"How much each tile raises or lowers {what}, against a slide of mean training tiles "
        "(integrated gradients). All tiles together make up the difference.",
        "gradient-x-input": f"A quick estimate of how much each tile raises or lowers {what} (gradient x input); blind "
        "where the model saturates.",
        "occlusion": f"How much {what} would be lost if the tiles around each place were mean training tiles (occlusion).",
    }.get(method, "")


def blur_of_tiles(content: SlideContent) -> Iterator[Layer]:
    """How blurred each tile is."""
    if content.grid is not None and content.features is not None and content.features.blur is not None:
        yield Layer(
            "blur",
            "blur",
            "quality",
            "unsigned",
            content.features.blur,
            1.0,
            ("sharp", "blurred"),
            "",
            "0: sharp, 1: blurred.",
        )


LAYER_SOURCES: list[Callable[[SlideContent], Iterable[Layer]]] = [scores_of_predict, blur_of_tiles]
"""What gives the layers of a slide, in the order in which the page offers them. A layer is added here."""


def layers_of(content: SlideContent) -> dict[str, Layer]:
    """All layers of a slide by their keys."""
    return {layer.key: layer for source in LAYER_SOURCES for layer in source(content)}
