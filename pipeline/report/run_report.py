"""The report of a run: one HTML page that can be sent to a colleague."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import LongslideError
from ...evaluation.classification import Classes, Labels
from ...evaluation.evaluate import PRIMARY_METRIC, evaluate, headline_scope
from ...evaluation.outcomes import Outcomes, read_outcomes
from ...evaluation.regression import Values
from ...evaluation.scopes import select
from ...evaluation.survival import Survival, log_rank
from ...task import Task
from . import run_figures
from .page import Picture, picture, write_page
from .run_figures import Curve
from .run_folder import Run, read_run
from .run_tables import (
    Cell,
    Table,
    cohort_table,
    folds_table,
    interval,
    metric_name,
    metrics_table,
    missing_slides,
    mistakes_table,
    narrow_cell,
    number,
    per_class_table,
    settings_table,
    splits_table,
    task_text,
)

if TYPE_CHECKING:
    import pandas as pd

MOST_CURVES = 8
"""Classes or labels that get curves of their own."""


def write_run_report(run: Path) -> Path:
    """Write `report.html` into a run folder.

    Args:
        run: The run folder; `metrics.csv` is made anew in memory if it is not there.

    Returns:
        The report.

    Raises:
        LongslideError: It is not the folder of a finished run, or the report cannot be written.
    """
    read = read_run(run)
    metrics = read.metrics
    if metrics is None:
        metrics = evaluate(read.predictions, read.task)
    level = "patient" if (metrics["level"] == "patient").any() else "slide"
    rows = select(read.predictions, level)
    if not len(rows):
        raise LongslideError(f"{read.folder}: predictions.csv has no rows of the test part; there is nothing to report")
    outcomes = read_outcomes(rows, read.task)
    here = metrics[metrics["level"] == level]
    pictures, notes = _pictures(read, rows, outcomes, level)
    return write_page(
        read.folder / "report.html",
        "run.html",
        title=read.name,
        description=_description(read),
        facts=_facts(read, here, rows),
        level=level,
        task_kind=read.task.kind,
        metrics=metrics_table(here, read.task),
        per_class=per_class_table(here, outcomes),
        folds=folds_table(here),
        slides=metrics_table(metrics[metrics["level"] == "slide"], read.task) if level == "patient" else None,
        subgroups=_subgroups(here, read.task),
        pictures=pictures,
        notes=notes,
        learning=_learning(read),
        mistakes=mistakes_table(read.predictions, read.task, level),
        cohort=cohort_table(read),
        splits=splits_table(read),
        missing=missing_slides(read),
        remarks=[str(note) for note in read.facts.get("notes") or []],
        settings=settings_table(read),
        configuration=read.configuration,
    )


def _subgroups(metrics: "pd.DataFrame", task: Task) -> "list[tuple[str, Picture, Table]]":
    """For each subgroup column: its name, a forest plot of the first metric, and a table."""
    result = []
    rows = metrics[metrics["scope"].str.startswith("subgroup:") & ~metrics["metric"].str.contains(":")]
    columns_of = rows["scope"].map(lambda scope: scope.removeprefix("subgroup:").partition("=")[0])
    primary = PRIMARY_METRIC[task.kind]
    for column in dict.fromkeys(columns_of):
        of_column = rows[columns_of == column]
        names = list(dict.fromkeys(of_column["metric"]))
        columns = [column, "n", *map(metric_name, names)]
        table: list[list[Cell]] = []
        bars = []
        for scope in dict.fromkeys(of_column["scope"]):
            value = scope.partition("=")[2]
            here = of_column[of_column["scope"] == scope]
            table.append([value, f"{here['n'].max():,}", *(narrow_cell(here, scope, name) for name in names)])
            first = here[here["metric"] == primary]
            if len(first) and np.isfinite(first.iloc[0]["value"]):
                bars.append((f"{value} (n = {here['n'].max()})", *first.iloc[0][["value", "low", "high"]]))
        whole = metrics[(metrics["scope"] == "pooled") & (metrics["metric"] == primary)]["value"].iloc[0]
        figure = run_figures.forest(bars, metric_name(primary), whole if np.isfinite(whole) else None)
        forest = picture(figure, f"{metric_name(primary)} by {column}", "The dashed line is the value of all patients.")
        result.append((column, forest, Table(columns, table, columns[1:])))
    return result


def _description(run: Run) -> str:
    folds = run.predictions.loc[run.predictions["part"] == "test", "fold"].nunique()
    text = task_text(run.task) + (f" with {run.aggregator}" if run.aggregator else "")
    return text + (f"; {folds}-fold cross-validation." if folds > 1 else ".")


def _facts(run: Run, metrics: "pd.DataFrame", rows: "pd.DataFrame") -> list[tuple[str, str, str]]:
    scope = headline_scope(metrics)
    first = metrics[metrics["scope"] == scope].set_index("metric")
    primary = PRIMARY_METRIC[run.task.kind]
    facts = []
    if primary in first.index:
        value, low, high = (float(first[column][primary]) for column in ("value", "low", "high"))
        small = f"95% interval {interval(low, high)}" if np.isfinite(low) else "no interval"
        small += "; mean over the folds" if scope == "mean" else ""
        facts.append((metric_name(primary), number(value), small))
    facts.append(("Test patients", f"{rows['patient_id'].nunique():,}", ""))
    slides = run.predictions[(run.predictions["level"] == "slide") & (run.predictions["part"] == "test")]
    if len(slides):
        facts.append(("Test slides", f"{slides['slide_id'].nunique():,}", ""))
    if run.task.kind == "binary":
        positives = rows.drop_duplicates("patient_id")["target"].astype(str).eq(run.task.classes[1])
        facts.append(
            (f"{run.task.classes[1]} patients", f"{positives.sum():,}", f"{positives.mean():.0%} of the test patients")
        )
    if run.task.kind == "survival":
        facts.append(
            ("Events", f"{int(rows.drop_duplicates('patient_id')['event'].sum()):,}", "among the test patients")
        )
    if run.aggregator:
        facts.append(("Model", run.aggregator, ""))
    return facts


def _pictures(run: Run, rows: "pd.DataFrame", outcomes: Outcomes, level: str) -> tuple[list[Picture], list[str]]:
    """The figures that fit the task, and remarks on them."""
    if isinstance(outcomes, Survival):
        return _survival_pictures(run, rows, outcomes, level)
    if isinstance(outcomes, Values):
        figure = run_figures.scatter(outcomes.target, outcomes.prediction, run.task.label[0])
        return [
            picture(figure, "Predicted against true values", "Each point is a patient; the dashed line is perfect.")
        ], []
    curves = class_curves(outcomes)
    notes = []
    total = len(outcomes.names)
    if total > 2 and len(curves) > MOST_CURVES:
        curves = dict(list(curves.items())[:MOST_CURVES])
        notes.append(f"Curves are drawn for the first {MOST_CURVES} of {total} classes.")
    pictures = []
    if curves:
        thin: list[Curve] = []
        if len(curves) == 1 and rows["fold"].nunique() > 1:
            target, score = next(iter(curves.values()))
            of_fold = [rows["fold"].to_numpy() == fold for fold in rows["fold"].unique()]
            thin = [(target[f], score[f]) for f in of_fold if 0 < target[f].sum() < f.sum()]
        caption = "Thin lines are the folds, the thick one all folds together." if thin else ""
        pictures.append(picture(run_figures.roc(curves, thin), "ROC curve", f"ROC. {caption}"))
        pictures.append(
            picture(
                run_figures.precision_recall(curves),
                "Precision-recall curve",
                "Precision and recall. Dotted: precision of a coin toss (the prevalence).",
            )
        )
    pictures.append(_calibration(outcomes, curves))
    if isinstance(outcomes, Classes):
        counts = np.zeros((total, total), np.int64)
        np.add.at(counts, (outcomes.target, outcomes.prediction), 1)
        caption = "Confusion matrix: counts, and their share of the true class."
        pictures.append(picture(run_figures.confusion(counts, outcomes.names), "Confusion matrix", caption))
    return pictures, notes


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


def _calibration(outcomes: Classes | Labels, curves: dict[str, Curve]) -> Picture:
    if isinstance(outcomes, Classes):
        confidence, correct = outcomes.confidence()
        binary = len(outcomes.names) == 2
        xlabel = f"Predicted probability of {outcomes.names[1]}" if binary else "Probability of the predicted class"
        ylabel = f"Share that is {outcomes.names[1]}" if binary else "Share that is right"
        figure = run_figures.calibration({"": (correct, confidence)}, xlabel, ylabel)
    else:
        figure = run_figures.calibration(curves, "Predicted probability", "Share that is positive")
    return picture(
        figure,
        "Calibration curve",
        "Calibration in bins of 0.1; larger points hold more patients, bins of fewer than 5 are not drawn.",
    )


def _survival_pictures(
    run: Run, rows: "pd.DataFrame", outcomes: Survival, level: str
) -> tuple[list[Picture], list[str]]:
    unit = run.task.label[0]
    groups, caption = {"all patients": (outcomes.event, outcomes.time)}, "Kaplan-Meier curve of the test patients."
    notes = []
    high = risk_groups(rows, select(run.predictions, level, "val"), run.facts)
    if high is None:
        notes.append(
            "There are no validation predictions to take a risk threshold from, so the patients are not split into groups "
            "(a threshold from the test patients themselves would flatter the model)."
        )
    elif 0 < high.sum() < len(high):
        groups = {
            name: (outcomes.event[chosen], outcomes.time[chosen])
            for name, chosen in (("low risk", ~high), ("high risk", high))
        }
        caption = "Kaplan-Meier curves; risk groups split at the median risk of the validation patients of each fold. "
        if rows["fold"].nunique() > 1:
            # A patient's group hangs on the outcomes of the others, so the test rejects too often (Simon et al. 2011).
            notes.append(
                "There is no log-rank test of risk groups from cross-validation: the models that make the groups have been "
                "trained on the other patients tested, and the p-value would be too small."
            )
        else:
            p = log_rank(outcomes.time, outcomes.event, high.astype(np.int64))
            caption += f"Log-rank test: p {'< 0.001' if p < 0.001 else f'= {p:.3f}'}." if np.isfinite(p) else ""
    else:
        notes.append(f"All test patients fall into one risk group ({'high' if high.all() else 'low'}).")
    figure = run_figures.survival_curves(groups, unit)
    return [picture(figure, "Kaplan-Meier curves", caption)], notes


def risk_groups(rows: "pd.DataFrame", validation: "pd.DataFrame", facts: dict[str, Any]) -> "np.ndarray | None":
    """Whether each test row is of high risk: above the median risk of its fold's validation patients.

    Args:
        rows: Test predictions.
        validation: Validation predictions of the same run.
        facts: `run.json`, whose `risk_threshold` is used where there are no validation predictions.

    Returns:
        `(n,)` bool, or None where no threshold is known. The median of the test patients is never used: it would depend on
        what is to be predicted.
    """
    medians = validation.groupby("fold")["risk"].median().to_dict() if len(validation) else {}
    stored = facts.get("risk_threshold")
    thresholds = [medians.get(fold, stored) for fold in rows["fold"]]
    if any(threshold is None for threshold in thresholds):
        return None
    return np.asarray(rows["risk"].to_numpy(np.float64) > np.array(thresholds, np.float64))


def _learning(run: Run) -> list[Picture]:
    history = run.history
    if history is None or not len(history) or not {"epoch", "fold"} <= set(history):
        return []
    pictures = []
    losses = {"train_loss": "training", "val_loss": "validation"}
    for columns, ylabel in ((losses, "Loss"), ({"val_metric": "validation"}, "Validation metric")):
        known = {
            column: name for column, name in columns.items() if column in history and history[column].notna().any()
        }
        if known:
            figure = run_figures.learning_curve(history, known, ylabel)
            caption = "Thin lines are the folds." if history["fold"].nunique() > 1 else ""
            pictures.append(picture(figure, f"{ylabel} by epoch", f"{ylabel} by epoch. {caption}"))
    return pictures
