"""The figures that several pages show, with their captions."""

from collections.abc import Mapping

from ...evaluation.classification import Classes, Labels
from . import run_figures
from .page import Picture
from .run_figures import Curve


def class_curves(outcomes: Classes | Labels) -> dict[str, Curve]:
    """For each class or label that has both kinds of rows: whether a row is positive, and its score. One curve without a
    name for a binary task."""
    if isinstance(outcomes, Labels):
        each = [(name, outcomes.label(index)[1]) for index, name in enumerate(outcomes.names)]
        found = {name: (rows.target == 1, rows.probability[:, 1]) for name, rows in each}
    elif len(outcomes.names) == 2:
        found = {"": (outcomes.target == 1, outcomes.probability[:, 1])}
    else:
        names = enumerate(outcomes.names)
        found = {name: (outcomes.target == c, outcomes.probability[:, c]) for c, name in names}
    return {name: (target, score) for name, (target, score) in found.items() if 0 < target.sum() < len(target)}


def discrimination(curves: Mapping[str, Curve], folds: Mapping[str, Curve], noun: str) -> list[Picture]:
    """ROC and precision-recall curves.

    Args:
        curves: Curves by the name of the class, label or run.
        folds: Those of the folds, drawn thin.
        noun: What a row is: `patient` or `slide`.
    """
    if not curves:
        return []
    pooled = "Thin lines are the folds, the thick one all folds together." if folds else ""
    n = max(len(target) for target, _ in curves.values())
    return [
        Picture(*run_figures.roc(curves, folds), "ROC curve", f"ROC of {n:,} test {noun}s. {pooled}"),
        Picture(
            *run_figures.precision_recall(curves),
            "Precision-recall curve",
            "Precision and recall. Dotted: the prevalence, which is the precision of a guess.",
        ),
    ]


def calibration(curves: Mapping[str, Curve], noun: str, positive: str | None) -> Picture:
    """A calibration curve.

    Args:
        curves: Name -> whether each prediction holds, and its probability.
        noun: What a row is: `patient` or `slide`.
        positive: The class whose probability it is; None for that of the predicted class or of each label.
    """
    of = f"Predicted probability of {positive}" if positive else "Predicted probability"
    share = f"Share that is {positive}" if positive else "Share that is right"
    return Picture(
        *run_figures.calibration(curves, of, share),
        "Calibration curve",
        f"Calibration in bins of 0.1; larger points hold more {noun}s, bins of fewer than {run_figures.SMALLEST_BIN} are "
        "drawn only where there is no larger one.",
    )


def calibration_of(outcomes: Classes) -> Curve:
    """Whether each prediction holds, and its probability: of the positive class, or of the predicted one of several."""
    confidence, correct = outcomes.confidence()
    return correct, confidence
