"""Explanations of predictions: scores of a feature file's tiles, and their pictures, tables and GeoJSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely

from ...data.features.feature_file import read_features
from ...data.features.features import Features
from ...data.features.preprocessing import Preprocessing
from ...data.slides.slide import Slide
from ...data.table import csv_of
from ...data.whole_file import write_picture, write_whole
from ...errors import LongslideError
from .checkpoint_features import check_exist, trained_on
from .gallery import write_gallery
from .geojson import regions_to_geojson, tiles_to_geojson, to_geojson
from .overlay import AGAINST_COLOUR, FOR_COLOUR, STRONG, draw_overlay, score_limit, tile_raster

if TYPE_CHECKING:
    import torch

    from ...models.classifier.ensemble import ClassifierEnsemble
    from ...models.explain.methods import Method
    from .prediction import Prediction


@dataclass(frozen=True)
class Explanation:
    """How much each tile of a slide speaks for or against what was predicted.

    Attributes:
        slide_id: The slide.
        method: How the scores were found.
        names: What each column of the scores speaks for: classes or labels (in log-odds), `value`, `risk`; or `attention`,
            which speaks for nothing and is never below 0.
        scores: `(N, C)` float32.
        coords: `(N, 2)` int64 top-left corner (x, y) of each tile in level-0 pixels.
        tile_size_level0: Edge of a tile in level-0 pixels; None where the feature file does not say.
        change: Of integrated gradients, by name: what was predicted less what is for a slide of mean tiles.
        completeness_error: Of integrated gradients, by name: how far the scores' sum is from the change.
    """

    slide_id: str
    method: "Method"
    names: tuple[str, ...]
    scores: np.ndarray
    coords: np.ndarray
    tile_size_level0: int | None
    change: dict[str, float] | None = None
    completeness_error: dict[str, float] | None = None

    @property
    def signed(self) -> bool:
        """Whether scores below 0 speak against."""
        return self.method != "attention"


def explain(
    features: str | Path | Features,
    checkpoint: str | Path | Sequence[str | Path],
    method: "Method" = "integrated-gradients",
    device: str = "auto",
) -> Explanation:
    """Explain what a classifier says of a slide, tile by tile.

    Args:
        features: Feature file of the slide, or its content.
        checkpoint: Checkpoint of a classifier, a run folder (of a cross-validation: all its folds), or several.
        method: `integrated-gradients`, `gradient-x-input`, `occlusion` or, of models that have them, `attention`.
        device: `auto`, or a torch device such as `cuda:1` or `cpu`.

    Returns:
        The scores of each tile for each class; the mean over several checkpoints.

    Raises:
        LongslideError: The features or a checkpoint cannot be used, or the model has no attention.
    """
    paths = [Path(path) for path in ([checkpoint] if isinstance(checkpoint, str | Path) else checkpoint)]
    check_exist(paths)
    if not isinstance(features, Features):
        features = read_features(features)

    from ...models.classifier.ensemble import load_ensemble
    from ..embed.tile_embedding import resolve_device

    torch_device = resolve_device(device)
    ensemble = load_ensemble(paths).to(torch_device)
    if ways := Preprocessing.of(features).unlike_training(trained_on(ensemble)):
        raise LongslideError(f"{features.slide_id}: the features are not like those of training ({'; '.join(ways)})")
    return explain_features(ensemble, features, method, torch_device)


def explain_features(
    ensemble: "ClassifierEnsemble", features: Features, method: "Method", device: "torch.device"
) -> Explanation:
    """Explain what an ensemble says of a slide.

    Args:
        ensemble: The classifiers, on `device`.
        features: The slide's features.
        method: How; see `explain`.
        device: Where to run.

    Returns:
        The scores, mean over the classifiers.

    Raises:
        LongslideError: The method does not work for this model, or the slide does not fit in the device's memory.
    """
    import torch

    from ...models.explain.classifier import explain_ensemble, recompute_layers

    tile_features = torch.from_numpy(features.features).to(device)
    grid_cells = torch.from_numpy(features.cells).to(device)
    found = None
    for last_try in (False, True):
        try:
            found = explain_ensemble(ensemble, tile_features, grid_cells, method)
            break
        except torch.OutOfMemoryError as error:
            if last_try:
                less = "" if method == "occlusion" else "occlusion needs less, "
                raise LongslideError(
                    f"{features.slide_id}: {method} of {len(features.coords):,} tiles does not fit in the memory of "
                    f"{device}; {less}a CPU is slower but has more"
                ) from error
        recompute_layers(ensemble)  # outside the handler: the error's traceback keeps the failed pass's tensors
        torch.cuda.empty_cache()
    assert found is not None
    names = found.names

    def by_name(values: "torch.Tensor | None") -> dict[str, float] | None:
        return None if values is None else dict(zip(names, values.tolist(), strict=True))

    return Explanation(
        slide_id=features.slide_id,
        method=method,
        names=names,
        scores=found.scores.numpy(),
        coords=features.coords,
        tile_size_level0=features.tile_size_level0,
        change=by_name(found.change),
        completeness_error=by_name(found.completeness_error),
    )


def shown_name(explanation: Explanation, prediction: "Prediction") -> str:
    """The column that pictures show: of two classes the second one, whichever is predicted, so that a colour means the same
    on every slide; else what is predicted."""
    names = explanation.names
    if len(names) <= 2 and not prediction.labels:
        return names[-1]
    if prediction.predicted in names:
        return str(prediction.predicted)
    probability = prediction.probability or {}
    return max(names, key=lambda name: probability.get(name, 0.0))


def write_explanation(
    folder: Path,
    explanation: Explanation,
    prediction: "Prediction",
    slide: Slide | None,
    thumbnail: np.ndarray | None,
    tissue: str | None = None,
) -> dict[str, Any]:
    """Write `tiles.csv`, and, where the feature file has level-0 pixels, `tiles.geojson` with the tissue too; with the slide
    also `overlay.png`, `.svg` and `.pdf`, and `gallery/`.

    Args:
        folder: Where to; it exists.
        explanation: The scores.
        prediction: What they explain.
        slide: The open slide, if it can be read.
        thumbnail: `(h, w, 3)` uint8 RGB, `Slide.thumbnail`, if there is one.
        tissue: Tissue contours as GeoJSON in level-0 pixels, if they are known.

    Returns:
        What was written, in plain types for JSON.

    Raises:
        LongslideError: A tile of the gallery cannot be read.
    """
    name = shown_name(explanation, prediction)
    shown = explanation.scores[:, explanation.names.index(name)]
    limit = score_limit(shown)
    _write_table(folder / "tiles.csv", explanation)
    written: dict[str, Any] = {
        "method": explanation.method,
        "shows": name,
        "limit": limit,
        "change": explanation.change,
        "completeness_error": explanation.completeness_error,
        "gallery": [],
    }
    size = explanation.tile_size_level0
    if size is None:  # the coordinates are cells of a grid whose place on the slide is not known
        return written
    threshold = STRONG * limit
    regions = [(shown, f"for {name}" if explanation.signed else "attention", FOR_COLOUR)]
    if explanation.signed:
        regions.append((-shown, f"against {name}", AGAINST_COLOUR))
    scores = {column: explanation.scores[:, number] for number, column in enumerate(explanation.names)}
    collection = tiles_to_geojson(explanation.coords, size, scores)
    for values, title, colour in regions:
        collection += regions_to_geojson(explanation.coords, size, values, threshold, name=title, colour=colour)
    collection += [] if tissue is None else json.loads(tissue).get("features", [])
    write_whole(folder / "tiles.geojson", to_geojson(collection).encode())
    if slide is None or thumbnail is None:
        return written
    height, width = thumbnail.shape[:2]
    scale = np.array([width, height]) / slide.bounds[2:]
    overlay = draw_overlay(
        thumbnail,
        tile_raster(explanation.coords, size, shown, slide.bounds, (width, height)),
        title=f"{explanation.slide_id}\n{prediction.text}, scores by {explanation.method.replace('-', ' ')}",
        mm_per_px=slide.mpp.value / 1000 * slide.bounds[2] / width,
        limit=limit,
        ends=score_ends(name, explanation.signed),
        unit=score_unit(name, explanation.method),
        signed=explanation.signed,
        tissue=[(ring - slide.bounds[:2]) * scale for ring in _rings(tissue)],
    )
    write_picture(folder / "overlay.png", overlay.pixels())
    write_whole(folder / "overlay.svg", overlay.svg())
    write_whole(folder / "overlay.pdf", overlay.pdf())
    gallery = write_gallery(folder / "gallery", slide, explanation.coords, size, shown)
    return written | {"gallery": [asdict(tile) for tile in gallery]}


def _rings(tissue: str | None) -> list[np.ndarray]:
    """Outlines and holes of GeoJSON polygons, `(n, 2)` each."""
    if tissue is None:
        return []
    rings = [
        ring
        for polygon in shapely.get_parts(shapely.from_geojson(tissue))
        for ring in (polygon.exterior, *polygon.interiors)
    ]
    return [np.asarray(ring.coords) for ring in rings]


def score_unit(name: str, method: str) -> str:
    """What the scores of a column are measured in."""
    if method == "attention":
        return "attention weight"
    return name if name in ("value", "risk") else "log-odds"


def score_ends(name: str, signed: bool) -> tuple[str, str]:
    """What the lowest and the highest scores of a column mean."""
    if not signed:
        return "little attention", "much"
    if name in ("value", "risk"):
        return f"lowers the {name}", f"raises the {name}"
    return f"against {name}", f"for {name}"


def _write_table(path: Path, explanation: Explanation) -> None:
    """One row per tile: x and y in level-0 pixels, one column of scores per name."""
    columns = ["x", "y", *(f"score_{name}" for name in explanation.names)]
    rows = (
        dict(zip(columns, [*place, *(f"{score:.6g}" for score in scores)], strict=True))
        for place, scores in zip(explanation.coords.tolist(), explanation.scores.tolist(), strict=True)
    )
    write_whole(path, csv_of(columns, rows))
