"""The report of a run: one HTML page that can be sent to a colleague."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...data.whole_file import write_whole
from ...errors import LongslideError
from ...evaluation.classification import Labels
from ...evaluation.evaluate import PRIMARY_METRIC, evaluate, headline_scope
from ...evaluation.outcomes import Outcomes, read_outcomes
from ...evaluation.regression import Values
from ...evaluation.scopes import select
from ...evaluation.survival import Survival, log_rank
from ...task import Task
from . import run_figures
from .methods import METHODS, methods_paragraph
from .mistakes import mistakes_table
from .page import Cell, Page, Picture, Table
from .pictures import calibration, calibration_of, class_curves, discrimination
from .run_folder import Run, read_run
from .run_tables import (
    chosen_table,
    cohort_table,
    folds_table,
    metrics_table,
    missing_slides,
    narrow_cell,
    per_class_table,
    settings_table,
    splits_table,
    trials_table,
)
from .wording import (
    MEAN_OVER_FOLDS,
    held_out,
    interval,
    intervals_text,
    metric_name,
    number,
    p_text,
    seen_warning,
    task_text,
)

if TYPE_CHECKING:
    import pandas as pd

MOST_CURVES = 8
"""Classes or labels that get curves of their own."""


def write_run_report(run: Path) -> Path:
    """Write `report.html` and `methods.txt` into a run folder.

    Args:
        run: The run folder; `metrics.csv` is made again in memory if it is not there.

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
    noun = read.noun(level)

    page = Page(read.name, _description(read))
    page.warning(seen_warning(read.facts.get("seen")))
    page.facts(_facts(read, here, rows, noun))
    _add_metrics(page, read, metrics, here, outcomes, level, noun)
    page.heading("Curves")
    pictures, notes = _pictures(read, rows, outcomes, level, noun)
    page.pictures(pictures)
    for note in notes:
        page.note(note)
    _add_subgroups(page, here, read.task, noun)
    mistakes, what = mistakes_table(read.predictions, read.task, level, noun)
    if mistakes is not None:
        page.heading("Worst mistakes")
        page.note(what, "Look at these slides first: labels are wrong more often than one expects.")
        page.table(mistakes)
    _add_selection(page, read)
    learning = _learning(read)
    if learning:
        page.heading("Training")
        page.pictures(learning)
    _add_cohort(page, read)
    methods = methods_paragraph(read, here)
    write_whole(read.folder / METHODS, f"{methods}\n".encode(), "--run")
    page.heading("Methods")
    page.note("For a paper, from the records of this run. In brackets: items of TRIPOD+AI (Collins et al. 2024).")
    page.text(methods)
    page.heading("Configuration")
    page.table(settings_table(read))
    if read.configuration:
        with page.details("config.yaml"):
            page.code(read.configuration)
    return page.write(read.folder / "report.html")


def _add_metrics(
    page: Page,
    run: Run,
    metrics: "pd.DataFrame",
    here: "pd.DataFrame",
    outcomes: Outcomes,
    level: str,
    noun: str,
) -> None:
    kind = run.task.kind
    page.heading("Metrics")
    page.table(metrics_table(here, run.task))
    folds = folds_table(here)
    page.note(
        held_out(run.facts.get("seen"), noun),
        intervals_text(here),
        "AUROC and AUPRC are means over the classes, each against the rest."
        if kind in ("multiclass", "ordinal")
        else "",
        f"Metrics are means over the labels, each over the {noun}s that have it." if kind == "multilabel" else "",
        "The Brier score is integrated up to the last time predicted within the follow-up, with inverse probability of "
        f"censoring weights; Kaplan-Meier's is that of the curve of the test {noun}s, the same for all of them. The "
        "time-dependent AUC is the mean over the times predicted."
        if kind == "survival"
        else "",
        MEAN_OVER_FOLDS if folds else "",
    )
    per_class = per_class_table(here, outcomes)
    if per_class is not None:
        page.heading(f"By {per_class.columns[0].lower()}", 3)
        page.table(per_class)
    if folds is not None:
        page.heading("By fold", 3)
        page.table(folds)
    slides = metrics_table(metrics[metrics["level"] == "slide"], run.task) if level == "patient" else None
    if slides is not None and noun == "patient":
        with page.details("Metrics of single slides"):
            page.table(slides)
            page.note("Slides of one patient count as one where the interval is made.")


def _add_subgroups(page: Page, metrics: "pd.DataFrame", task: Task, noun: str) -> None:
    """For each subgroup column a forest plot of the first metric, and a table."""
    rows = metrics[metrics["scope"].str.startswith("subgroup:") & ~metrics["metric"].str.contains(":")]
    columns_of = rows["scope"].map(lambda scope: scope.removeprefix("subgroup:").partition("=")[0])
    primary = PRIMARY_METRIC[task.kind]
    if len(rows):
        page.heading("Subgroups")
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
        drawing = run_figures.forest(bars, metric_name(primary), whole if np.isfinite(whole) else None)
        page.heading(f"By {column}", 3)
        caption = f"The dashed line is the value of all test {noun}s."
        page.pictures([Picture(*drawing, f"{metric_name(primary)} by {column}", caption)])
        page.table(Table(columns, table, columns[1:]))


def _add_selection(page: Page, run: Run) -> None:
    """What a sweep has chosen, and from what."""
    trials = trials_table(run)
    if trials is None:
        return
    page.heading("Selection")
    page.table(chosen_table(run))
    inner = run.facts["inner_folds"]
    over = f"mean over {inner} inner folds of" if inner > 1 else "of"
    page.note(
        f"Validation {run.validation_metric} of each trial, {over} the training and validation patients of the fold; * was "
        "chosen. The test patients of a fold had no part in this. These values are the best of several: what to report are "
        "the metrics above."
    )
    page.table(trials)


def _add_cohort(page: Page, run: Run) -> None:
    cohort, splits, missing = cohort_table(run), splits_table(run), missing_slides(run)
    remarks = [str(note) for note in run.facts.get("notes") or []]
    if not (cohort or splits or missing or remarks):
        return
    page.heading("Cohort")
    page.table(cohort)
    for remark in remarks:
        page.note(remark)
    if splits is not None:
        noun = run.noun("patient")
        classes = f", and {noun}s of each class" if run.task.kind in ("binary", "multiclass", "ordinal") else ""
        page.heading(f"Splits: {'patients / ' if noun == 'patient' else ''}slides{classes}", 3)
        page.table(splits)
    for name, slides in missing:
        with page.details(f"{name}: {len(slides)}"):
            page.code(", ".join(slides))


def _description(run: Run) -> str:
    folds = run.predictions.loc[run.predictions["part"] == "test", "fold"].nunique()
    text = task_text(run.task) + (f" with {run.aggregator}" if run.aggregator else "")
    return text + (f"; {folds}-fold cross-validation." if folds > 1 else ".")


def _facts(run: Run, metrics: "pd.DataFrame", rows: "pd.DataFrame", noun: str) -> list[tuple[str, str, str]]:
    scope = headline_scope(metrics)
    first = metrics[metrics["scope"] == scope].set_index("metric")
    primary = PRIMARY_METRIC[run.task.kind]
    facts = []
    if primary in first.index:
        value, low, high = (float(first[column][primary]) for column in ("value", "low", "high"))
        small = f"95% interval {interval(low, high)}" if np.isfinite(low) else "no interval"
        small += "; mean over the folds" if scope == "mean" else ""
        facts.append((metric_name(primary), number(value), small))
    if run.noun("patient") == "patient":
        facts.append(("Test patients", f"{rows['patient_id'].nunique():,}", ""))
    slides = run.predictions[(run.predictions["level"] == "slide") & (run.predictions["part"] == "test")]
    if len(slides):
        facts.append(("Test slides", f"{slides['slide_id'].nunique():,}", ""))
    one_each = rows.drop_duplicates("patient_id") if noun == "patient" else rows
    if run.task.kind == "binary":
        positives = one_each["target"].astype(str).eq(run.task.classes[1])
        facts.append(
            (f"{run.task.classes[1]} {noun}s", f"{positives.sum():,}", f"{positives.mean():.0%} of the test {noun}s")
        )
    if run.task.kind == "survival":
        facts.append(("Events", f"{int(one_each['event'].sum()):,}", f"among the test {noun}s"))
    if run.aggregator:
        facts.append(("Model", run.aggregator, f"{parameters:,} parameters" if (parameters := run.parameters) else ""))
    return facts


def _pictures(
    run: Run, rows: "pd.DataFrame", outcomes: Outcomes, level: str, noun: str
) -> tuple[list[Picture], list[str]]:
    """The figures that fit the task, and remarks on them."""
    if isinstance(outcomes, Survival):
        return _survival_pictures(run, rows, outcomes, level, noun)
    if isinstance(outcomes, Values):
        drawing = run_figures.scatter(outcomes.target, outcomes.prediction, run.task.label[0])
        caption = f"Each point is a {noun}; the dashed line is perfect."
        return [Picture(*drawing, "Predicted against true values", caption)], []
    curves = class_curves(outcomes)
    notes = []
    total = len(outcomes.names)
    if total > 2 and len(curves) > MOST_CURVES:
        curves = dict(list(curves.items())[:MOST_CURVES])
        notes.append(f"Curves are drawn for the first {MOST_CURVES} of {total} classes.")
    folds: dict[str, run_figures.Curve] = {}
    if len(curves) == 1 and rows["fold"].nunique() > 1:
        target, score = next(iter(curves.values()))
        for fold in rows["fold"].unique():
            own = rows["fold"].to_numpy() == fold
            if 0 < target[own].sum() < own.sum():
                folds[f"fold {fold}"] = (target[own], score[own])
    pictures = discrimination(curves, folds, noun)
    if isinstance(outcomes, Labels):
        return [*pictures, calibration(curves, noun, None)], notes
    positive = outcomes.names[1] if total == 2 else None
    pictures.append(calibration({"": calibration_of(outcomes)}, noun, positive))
    counts = np.zeros((total, total), np.int64)
    np.add.at(counts, (outcomes.target, outcomes.prediction), 1)
    caption = f"Confusion matrix: test {noun}s, and their share of the true class."
    pictures.append(Picture(*run_figures.confusion(counts, outcomes.names), "Confusion matrix", caption))
    return pictures, notes


def _survival_pictures(
    run: Run, rows: "pd.DataFrame", outcomes: Survival, level: str, noun: str
) -> tuple[list[Picture], list[str]]:
    unit = run.task.label[0]
    groups, caption = {f"all {noun}s": (outcomes.event, outcomes.time)}, f"Kaplan-Meier curve of the test {noun}s."
    notes = []
    high = risk_groups(rows, select(run.predictions, level, "val"), run.facts)
    if high is None:
        notes.append(
            f"There are no validation predictions to take a risk threshold from, so the {noun}s are not split into groups "
            f"(a threshold from the test {noun}s themselves would flatter the model)."
        )
    elif 0 < high.sum() < len(high):
        groups = {
            name: (outcomes.event[chosen], outcomes.time[chosen])
            for name, chosen in (("low risk", ~high), ("high risk", high))
        }
        caption = f"Kaplan-Meier curves; risk groups split at the median risk of the validation {noun}s of each fold. "
        if rows["fold"].nunique() > 1:
            # A patient's group hangs on the outcomes of the others, so the test rejects too often (Simon et al. 2011).
            notes.append(
                "There is no log-rank test of risk groups from cross-validation: the models that make the groups have been "
                f"trained on the other {noun}s tested, and the p-value would be too small."
            )
        else:
            p = p_text(log_rank(outcomes.time, outcomes.event, high.astype(np.int64)))
            caption += "" if p == "–" else f"Log-rank test: p {p if p.startswith('<') else f'= {p}'}."
    else:
        notes.append(f"All test {noun}s fall into one risk group ({'high' if high.all() else 'low'}).")
    return [Picture(*run_figures.survival_curves(groups, unit), "Kaplan-Meier curves", caption)], notes


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
    metric = f"Validation {run.validation_metric}"
    losses = {"train_loss": "training", "val_loss": "validation"}
    for columns, ylabel in ((losses, "Loss"), ({"val_metric": "validation"}, metric)):
        known = {
            column: name for column, name in columns.items() if column in history and history[column].notna().any()
        }
        if known:
            caption = "Thin lines are the folds." if history["fold"].nunique() > 1 else ""
            drawing = run_figures.learning_curve(history, known, ylabel)
            pictures.append(Picture(*drawing, f"{ylabel} by epoch", f"{ylabel} by epoch. {caption}"))
    return pictures
