"""What is explained of a classifier, and its tiles' scores by any of the methods."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...errors import LongslideError
from ..aggregators.slide_encoder import use_cuda_graphs
from ..classifier.classifier import SlideClassifier
from ..classifier.ensemble import ClassifierEnsemble
from ..slide_encoder.encoder import SlideEncoder
from ..slide_encoder.published import PublishedSlideEncoder
from .methods import (
    METHODS,
    Method,
    PackedModel,
    TileScores,
    attention,
    class_log_odds,
    gradient_x_input,
    integrated_gradients,
    occlusion,
)


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


def check_method(ensemble: ClassifierEnsemble, method: str) -> None:
    """Refuse a method that does not work for all of an ensemble, before it is asked to explain anything.

    Raises:
        LongslideError: There is no such method, or a classifier has not what it needs; names the model, and what works.
    """
    if method not in METHODS:
        raise LongslideError(f"no way to explain {method!r}; there are {', '.join(METHODS)}")
    for classifier, source in zip(ensemble.classifiers, ensemble.sources, strict=True):
        model = f"{source}: {classifier.aggregator_name}"
        if classifier.aggregator.reads_slide_embedding:
            raise LongslideError(f"{model} reads slide embeddings, which have no tiles to explain; leave --explain out")
        if method == "attention" and not hasattr(classifier.aggregator, "attention_weights"):
            others = ", ".join(other for other in METHODS if other != method)
            raise LongslideError(f"{model} has no attention weights to show; --explain it by one of {others}")


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
    check_method(ensemble, method)
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
    by = {"integrated-gradients": integrated_gradients, "gradient-x-input": gradient_x_input, "occlusion": occlusion}
    # Occlusion is a difference of nearly equal numbers: 0.1 to 0.2% off with a slide encoder, several percent without one.
    coarse = method != "occlusion" or any(isinstance(module, SlideEncoder) for module in classifier.modules())
    with _tf32(tile_features.is_cuda and coarse):
        return by[method](model, tile_features, grid_cells, baseline=baseline)


@contextmanager
def _tf32(cuda: bool) -> Iterator[None]:
    """Products of float32 by the GPU's matrix units, with 10 bits of mantissa: several times as fast."""
    if not cuda:
        yield
        return
    products: Any = (
        torch.backends.cuda.matmul
    )  # the older torch.set_float32_matmul_precision cannot be asked after this one
    before = products.fp32_precision
    products.fp32_precision = "tf32"
    try:
        yield
    finally:
        products.fp32_precision = before


def explained_numbers(classifier: SlideClassifier) -> PackedModel:
    """What is explained of a classifier: calibrated log-odds of classes or labels, the value, or the risk.

    Returns:
        A function of the packed interface that gives `(B, C)`; for `binary` C is 1, the second class.
    """
    kind = classifier.task.kind
    temperature, intercept = classifier.temperature or 1.0, classifier.intercept

    def numbers(tile_features: Tensor, grid_cells: Tensor, cu_seqlens: Tensor) -> Tensor:
        outputs: Tensor = classifier(tile_features, grid_cells, cu_seqlens)
        if kind in ("binary", "multilabel"):
            return outputs / temperature + intercept
        if kind in ("multiclass", "ordinal"):
            return class_log_odds(classifier.objective.logits(outputs, classifier.temperature))
        predictions = classifier.objective.predict(outputs)
        return predictions["value" if kind == "regression" else "risk"][:, None]

    return numbers


def recompute_layers(ensemble: ClassifierEnsemble) -> None:
    """Let slide encoders compute each layer again in the backward: a quarter slower, with one layer's memory."""
    for module in ensemble.modules():
        if isinstance(module, SlideEncoder):
            module.spec = replace(module.spec, checkpointing=True)
        elif isinstance(module, PublishedSlideEncoder):
            module.checkpointing = True
    use_cuda_graphs(ensemble)  # anew: the memory of those there are is wanted
