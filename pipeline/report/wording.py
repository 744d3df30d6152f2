"""The words and numbers of pages and of the terminal: each name, each way to write a number, each sentence once."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ...plurals import count
from ...task import CLASSIFICATION, Task

if TYPE_CHECKING:
    import pandas as pd

METRIC_NAMES = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "balanced_accuracy": "Balanced accuracy",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "f1": "F1",
    "quadratic_kappa": "Quadratic kappa",
    "brier": "Brier score",
    "ece": "Calibration error",
    "log_loss": "Log-loss",
    "mae": "Mean absolute error",
    "r2": "R²",
    "spearman": "Spearman correlation",
    "c_index": "Concordance (c-index)",
    "integrated_brier": "Integrated Brier score",
    "c_index_uno": "Concordance, censoring weighted (Uno)",
    "time_auc": "Time-dependent AUC",
    "integrated_brier_km": "Integrated Brier score, Kaplan-Meier",
}

METHOD_NAMES = {
    "newcombe": "Newcombe",
    "mid-p": "exact, mid-P",
    "gaffke": "Gaffke",
    "mover": "MOVER",
    "jackknife": "jackknife",
}
"""What makes an interval."""

TASK_NAMES = {
    "binary": "Binary classification",
    "multiclass": "Classification",
    "multilabel": "Multi-label classification",
    "ordinal": "Ordinal classification",
    "regression": "Regression",
    "survival": "Survival",
}


def metric_name(metric: str) -> str:
    """The name of a metric as people write it: `auroc:tumour` is `AUROC, tumour`."""
    name, _, of = metric.partition(":")
    return METRIC_NAMES.get(name, name) + (f", {of}" if of else "")


def number(value: float) -> str:
    """A metric to three digits after the point, or fewer for large numbers; a dash if it is not defined."""
    if not np.isfinite(value):
        return "–"
    return f"{value:.3f}" if abs(value) < 100 else significant(value, 4)


def significant(value: float, digits: int, sign: Literal["-", "+"] = "-") -> str:
    """A number to so many digits, but never fewer than it has before the point: 12,345 and not 1.23e+04."""
    return f"{value:{sign},.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:{sign}.{digits}g}"


def probability(value: float, spread: float | None = None) -> str:
    """A probability to three digits, with its spread; what would read 0 or 1 is `< 0.001` or `> 0.999`."""
    if value >= 0.9995:
        return "> 0.999"
    if value < 0.0005:
        return "< 0.001"
    return f"{value:.3f}" + ("" if spread is None else f" ± {spread:.3f}")


def interval(low: float, high: float) -> str:
    """`0.870–0.948`, or `-0.020 to 0.110` where a dash could be taken for a minus."""
    return f"{number(low)}{'–' if low >= 0 else ' to '}{number(high)}"


def with_interval(value: float, low: float, high: float) -> str:
    """`0.912 (0.870–0.948)`."""
    return f"{number(value)} ({interval(low, high)})" if np.isfinite([low, high]).all() else number(value)


def p_text(p: float) -> str:
    """A p-value: three digits, `< 0.001` below that, a dash if there is none."""
    if not np.isfinite(p):
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def seen_mark(seen: Mapping[str, Any] | None) -> str:
    """The mark of a whole run: `yes` if any of its test slides were seen, `no`, or nothing where it was not checked.

    Args:
        seen: What `run.json` says under that key.
    """
    if seen and seen["slides"]:
        return "yes"
    return "no" if seen and seen["checked"] else ""


def seen_warning(seen: Mapping[str, Any] | None) -> str:
    """What must be said of a run whose test slides were seen in training; nothing otherwise."""
    if seen is None or seen_mark(seen) != "yes":
        return ""
    were = "was" if seen["slides"] == 1 else "were"
    return (
        f"This is no test: {count(seen['slides'], 'slide')} of {count(seen['patients'], 'patient')} {were} in the training "
        "or validation part of the model. Its numbers are better than those of new patients will be."
    )


def held_out(seen: Mapping[str, Any] | None, noun: str) -> str:
    """What is known of the test part; a sentence is said only of what was checked."""
    mark = seen_mark(seen)
    if mark == "yes":
        return ""
    if mark == "no":
        return (
            f"None of the test {noun}s was in training, model selection, calibration or the choice of thresholds: checked "
            "by patient, slide, image and features."
        )
    return f"Whether the test {noun}s were seen in training could not be checked: the checkpoint does not say."


def task_text(task: Task) -> str:
    """What was predicted, in a few words."""
    if task.kind == "survival":
        return f"Survival: time {task.label[0]}, event {task.label[1]}"
    text = f"{TASK_NAMES[task.kind]} of {', '.join(task.label[:6])}{', …' if len(task.label) > 6 else ''}"
    if task.kind == "binary":
        return f"{text}, positive class: {task.positive} (of {', '.join(task.classes)})"
    if task.kind in CLASSIFICATION:
        text += f" ({', '.join(task.classes[:6])}{', …' if len(task.classes) > 6 else ''})"
    return text


_MADE_BY = {
    "newcombe": "Newcombe's method 5 for AUROC, widened to DeLong's variance where that is larger",
    "mid-p": "Clopper and Pearson's with mid-P for proportions, average precision (by the number of positives) and metrics "
    "at the end of their scale",
    "gaffke": "Gaffke's for mean losses, which allows for the largest loss that the predictions could have had",
    "mover": "MOVER (Zou & Donner 2008) for means of metrics",
    "jackknife": "a jackknife with Student's quantile, on a scale without ends, for the rest",
}


def intervals_text(metrics: "pd.DataFrame") -> str:
    """How the intervals of a table of metrics were made: of the methods, those that are in it.

    Args:
        metrics: Rows of `metrics.csv`.
    """
    used = {str(method).partition(",")[0] for method in metrics["method"]}
    methods = [text for name, text in _MADE_BY.items() if name in used]
    if not methods:
        return "There are no intervals."
    biased = " The calibration error has none: small samples bias it upwards."
    return (
        f"95% intervals take patients, with all their slides, for the unit: {'; '.join(methods)}. Fewer than five patients "
        f"have none.{biased if (metrics['metric'] == 'ece').any() else ''}"
    )


MEAN_OVER_FOLDS = (
    "The mean over folds is the result: its interval also holds what training on other patients would change (Nadeau & "
    "Bengio 2003). “Pooled” ranks the patients of all folds together, although each fold has a model and a scale of its "
    "own, and its interval is of the patients only: it is too narrow."
)

NO_PROOF = (
    "A difference that is not significant is not a proof that the runs are equal: look at how wide its interval is."
)
