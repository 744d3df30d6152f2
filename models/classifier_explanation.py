"""What is explained of a classifier, and its tiles' scores by any of the methods."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import LongslideError
from .classifier import SlideClassifier
from .classifier_ensemble import ClassifierEnsemble
from .explain import (
    Method,
    PackedModel,
    TileScores,
    attention,
    class_log_odds,
    gradient_x_input,
    integrated_gradients,
    occlusion,
)
from .slide_encoder import SlideEncoder


@dataclass(frozen=True)
class ClassScores:
    """Scores of the tiles of one slide, mean over the classifiers of an ensemble.

    Attributes:
        method: How they were found.
        names: What each column speaks for: classes or labels (their log-odds), `value`, `risk`; or `attention`.
        scores: `(T, C)` float32 on the CPU.
        change: `(C,)` float32: what integrated gradients add up to, were the integral exact; None for other methods.
        completeness_error: `(C,)` float32, `|sum of scores - change|` of integrated gradients; None for other methods. The
            largest one of the classifiers.
    """

    method: Method
    names: tuple[str, ...]
    scores: Tensor
    change: Tensor | None = None
    completeness_error: Tensor | None = None


def explain_ensemble(
    ensemble: ClassifierEnsemble, tile_features: Tensor, grid_cells: Tensor, method: Method
) -> ClassScores:
    """Explain what an ensemble says of one slide.

    Args:
        ensemble: The classifiers.
        tile_features: `(T, D)` floating tile embeddings of one slide, on their device.
        grid_cells: `(T, 2)` int64 (column, row) of each tile.
        method: How.

    Returns:
        The scores.

    Raises:
        LongslideError: The method does not work for this model.
    """
    if ensemble.reads_slide_embedding:
        raise LongslideError(
            "this classifier reads slide embeddings, which have no tiles to explain; leave --explain out"
        )
    tile_features = tile_features.float()
    if method == "attention":
        found = [attention(classifier.aggregator, tile_features, grid_cells) for classifier in ensemble.classifiers]
        return ClassScores(method, ("attention",), torch.stack([one.scores for one in found]).mean(0))
    found = [_explain(classifier, tile_features, grid_cells, method) for classifier in ensemble.classifiers]
    scores = torch.stack([one.scores for one in found]).mean(0)
    changes = [one.change for one in found if one.change is not None]
    errors = [one.completeness_error for one in found if one.completeness_error is not None]
    change = torch.stack(changes).mean(0) if changes else None
    error = torch.stack(errors).amax(0) if errors else None
    task = ensemble.task
    if task.kind == "binary":  # explained once, for the second class: the first one's log-odds are their negative
        scores = torch.cat([-scores, scores], dim=1)
        change = None if change is None else torch.cat([-change, change])
        error = None if error is None else torch.cat([error, error])
    names: Sequence[str] = task.classes or ("risk" if task.kind == "survival" else "value",)
    return ClassScores(method, tuple(names), scores, change, error)


def _explain(classifier: SlideClassifier, tile_features: Tensor, grid_cells: Tensor, method: Method) -> TileScores:
    model = explained_numbers(classifier)
    # The mean training tile says nothing; a black one, all zeros, may say much.
    mean = classifier.training_features.get("mean")
    baseline = tile_features.new_zeros(tile_features.shape[1]) if mean is None else mean.to(tile_features)
    if method == "integrated-gradients":
        return integrated_gradients(model, tile_features, grid_cells, baseline=baseline)
    if method == "gradient-x-input":
        return gradient_x_input(model, tile_features, grid_cells, baseline=baseline)
    return occlusion(model, tile_features, grid_cells, baseline=baseline)


def explained_numbers(classifier: SlideClassifier) -> PackedModel:
    """What is explained of a classifier: calibrated log-odds of classes or labels, the value, or the risk.

    Returns:
        A function of the packed interface that gives `(B, C)`; for `binary` C is 1, the second class.
    """
    kind = classifier.task.kind
    temperature = classifier.temperature or 1.0

    def numbers(tile_features: Tensor, grid_cells: Tensor, cu_seqlens: Tensor) -> Tensor:
        outputs: Tensor = classifier(tile_features, grid_cells, cu_seqlens)
        if kind in ("binary", "multilabel"):
            return outputs / temperature
        if kind in ("multiclass", "ordinal"):
            return class_log_odds(classifier.objective.logits(outputs) / temperature)
        predictions = classifier.objective.predict(outputs)
        return predictions["value" if kind == "regression" else "risk"][:, None]

    return numbers


def recompute_layers(ensemble: ClassifierEnsemble) -> None:
    """Let slide encoders compute each layer again in the backward: a quarter slower, with one layer's memory."""
    for module in ensemble.modules():
        if isinstance(module, SlideEncoder):
            module.spec = replace(module.spec, checkpointing=True)
