"""Classifier checkpoints: read without unpickling, built again without the training data."""

from pathlib import Path

from ...errors import LongslideError
from ...task import Task
from ..aggregators.registry import AGGREGATORS
from ..checkpoint_file import read_description
from .cases import CaseRecord
from .classifier import SlideClassifier, TrainingFacts


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
            aggregator=AGGREGATORS.create(made["name"], description["feature_dim"], from_file=True, **options),
        )
        classifier.load_state_dict(description["state_dict"])
    except LongslideError as error:
        raise LongslideError(f"{path}: {error}") from error
    except (KeyError, TypeError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise LongslideError(f"{path}: does not fit this version of Longslide: {reason}") from error
    for attribute in ("temperature", "thresholds", "training_features", "fold", "slide_ids"):
        setattr(classifier, attribute, description[attribute])
    classifier.intercept = description.get("intercept", 0.0)
    if "level0_mpp" in classifier.training_features:  # its name in earlier checkpoints
        classifier.training_features["slide_mpp"] = classifier.training_features.pop("level0_mpp")
    classifier.bag_unit = description.get("bag_unit", "slide")
    cases = description.get("cases")
    classifier.cases = None if cases is None else CaseRecord.from_dict(cases)
    return classifier.eval()
