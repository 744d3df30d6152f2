"""Classifier checkpoints: read without unpickling, built again without the training data."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import LongslideError
from ...task import Task
from ..aggregators.registry import AGGREGATORS
from ..checkpoint_file import read_description
from .classifier import SlideClassifier, TrainingFacts


def check_preprocessing(
    path: str | Path, classifier: SlideClassifier, preprocessing: Mapping[str, Any], feature_dim: int
) -> None:
    """Refuse features that a classifier was not trained on.

    Args:
        path: The classifier's checkpoint, for the message.
        classifier: The classifier.
        preprocessing: What made the features: `tile_encoder`, `tile_weights`, `mpp`, `tile_px`, ...; None where not known.
        feature_dim: Length of an embedding.

    Raises:
        LongslideError: They are of another encoder, other weights, another resolution or another length.
    """
    trained = classifier.facts.preprocessing
    names = ("tile_encoder", "tile_weights", "mpp", "tile_px", "slide_encoder", "slide_weights", "pool")
    for name in names:
        then, now = trained.get(name), preprocessing.get(name)
        alike = (
            math.isclose(then, now, rel_tol=0.01) if isinstance(then, float) and isinstance(now, float) else then == now
        )
        if then is not None and now is not None and not alike:
            raise LongslideError(
                f"{path}: trained on features with {name} {then}, but these have {now}; embed the slides as those were"
            )
    if feature_dim != classifier.facts.feature_dim:
        raise LongslideError(
            f"{path}: reads embeddings of length {classifier.facts.feature_dim}, but these have {feature_dim}"
        )


def load_classifier(path: str | Path) -> SlideClassifier:
    """Load a classifier.

    Args:
        path: A `.ckpt` that `longslide fit` or `crossval` wrote.

    Returns:
        The classifier, on the CPU and in evaluation mode.

    Raises:
        LongslideError: No such file, a truncated one, one with pickled code, one of a newer Longslide, or no classifier; or
            one whose aggregator is code outside Longslide that is not imported.
    """
    description = read_description(Path(path))
    if description is None:
        raise LongslideError(f"{path}: not a checkpoint of `longslide fit`")
    if description.get("kind") != "classifier":
        raise LongslideError(
            f"{path}: a checkpoint of {description.get('kind')!r}, not of a classifier; `longslide fit "
            "--model.checkpoint` trains a classifier from it"
        )
    made = description["aggregator"]
    try:
        architecture = {"architecture": made["architecture"]} if made["architecture"] else {}
        options = made["options"] | architecture
        classifier = SlideClassifier(
            TrainingFacts(
                task=Task.from_dict(description["task"]),
                feature_dim=description["feature_dim"],
                target_mean=description["target"]["mean"],
                target_std=description["target"]["std"],
                preprocessing=description["preprocessing"],
            ),
            aggregator=AGGREGATORS.create(made["name"], description["feature_dim"], by_stranger=True, **options),
        )
        classifier.load_state_dict(description["state_dict"])
    except LongslideError as error:
        raise LongslideError(f"{path}: {error}") from error
    except (KeyError, TypeError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise LongslideError(f"{path}: does not fit this version of Longslide: {reason}") from error
    for attribute in ("temperature", "thresholds", "training_features", "fold", "slide_ids"):
        setattr(classifier, attribute, description[attribute])
    if "level0_mpp" in classifier.training_features:  # its name in earlier checkpoints
        classifier.training_features["slide_mpp"] = classifier.training_features.pop("level0_mpp")
    classifier.bag_unit = description.get("bag_unit", "slide")
    return classifier.eval()
