"""The tables of run reports and comparisons."""

from typing import TYPE_CHECKING, Any

import numpy as np

from ...evaluation.classification import Classes, Labels
from ...evaluation.evaluate import PRIMARY_METRIC
from ...evaluation.outcomes import Outcomes
from ...evaluation.survival import Survival
from ...task import CLASSIFICATION, Task
from .page import Cell, Table
from .run_folder import Run
from .wording import METHOD_NAMES, interval, metric_name, number

if TYPE_CHECKING:
    import pandas as pd


def metrics_table(metrics: "pd.DataFrame", task: Task) -> Table | None:
    """The metrics over classes or labels together, as the mean over folds and pooled, and what made the first interval."""
    scopes = {"mean": "Mean over folds", "pooled": "Pooled"}
    plain = metrics[metrics["scope"].isin(scopes) & ~metrics["metric"].str.contains(":")]
    if not len(plain):
        return None
    used = [scope for scope in scopes if (plain["scope"] == scope).any()]
    columns = [
        "Metric",
        *(scopes[scope] if len(used) > 1 else "Value, 95% interval" for scope in used),
    ]
    order = sorted(dict.fromkeys(plain["metric"]), key=lambda name: name != PRIMARY_METRIC[task.kind])
    rows: list[list[Cell]] = [
        [metric_name(metric), *(narrow_cell(plain, scope, metric) for scope in used), _method(plain, used[0], metric)]
        for metric in order
    ]
    return Table([*columns, "Interval by"], rows, columns[1:])


def _method(metrics: "pd.DataFrame", scope: str, metric: str) -> str:
    """What made the interval of a metric, as `Newcombe`; training's share is stated below the table."""
    chosen = metrics[(metrics["scope"] == scope) & (metrics["metric"] == metric)]
    method = str(chosen["method"].iloc[0]) if len(chosen) and isinstance(chosen["method"].iloc[0], str) else ""
    return METHOD_NAMES.get(method.partition(",")[0], "–")


def narrow_cell(metrics: "pd.DataFrame", scope: str, metric: str) -> Cell:
    """A metric of a scope with its interval below."""
    chosen = metrics[(metrics["scope"] == scope) & (metrics["metric"] == metric)]
    if not len(chosen):
        return "–"
    value, low, high = chosen.iloc[0][["value", "low", "high"]]
    return (number(value), interval(low, high)) if np.isfinite([low, high]).all() else number(value)


def per_class_table(metrics: "pd.DataFrame", outcomes: Outcomes) -> Table | None:
    """Classes or labels down, with how many patients are of each; metrics across, pooled."""
    rows = metrics[(metrics["scope"] == "pooled") & metrics["metric"].str.contains(":")]
    if not len(rows) or isinstance(outcomes, Survival):
        return None
    parts = rows["metric"].str.partition(":")
    names, of = list(dict.fromkeys(parts[0])), list(dict.fromkeys(parts[2]))
    table: list[list[Cell]] = []
    for label in of:
        if isinstance(outcomes, Labels):
            target = outcomes.target[:, outcomes.names.index(label)]
            n = f"{int(np.nansum(target)):,} of {int((~np.isnan(target)).sum()):,}"
        else:
            assert isinstance(outcomes, Classes)
            n = f"{int((outcomes.target == outcomes.names.index(label)).sum()):,} of {len(outcomes):,}"
        table.append([label, n, *(narrow_cell(rows, "pooled", f"{name}:{label}") for name in names)])
    columns = ["Label" if isinstance(outcomes, Labels) else "Class", "Positive", *(metric_name(name) for name in names)]
    return Table(columns, table, columns[1:])


def folds_table(metrics: "pd.DataFrame") -> Table | None:
    """Folds down, metrics across."""
    rows = metrics[metrics["scope"].str.startswith("fold_") & ~metrics["metric"].str.contains(":")]
    folds = list(dict.fromkeys(rows["scope"]))
    if len(folds) < 2:
        return None
    names = list(dict.fromkeys(rows["metric"]))
    columns = ["Fold", "n", *map(metric_name, names)]
    table: list[list[Cell]] = []
    for fold in folds:
        n = rows.loc[rows["scope"] == fold, "n"].iloc[0]
        table.append([fold.removeprefix("fold_"), f"{n:,}", *(narrow_cell(rows, fold, name) for name in names)])
    return Table(columns, table, columns[1:])


def cohort_table(run: Run) -> Table | None:
    """Patients and slides of each class, or the spread of a number."""
    cohort, task = run.cohort, run.task
    if cohort is None or not {"slide_id", "patient_id", *task.label} <= set(cohort):
        return None
    numeric = ["Patients", "Slides"]
    rows: list[list[Cell]] = []
    if task.kind in CLASSIFICATION or task.kind == "multilabel":
        for label in task.label:
            # Numbers come back as floats where some are missing.
            names = cohort[label].map(lambda value: f"{value:g}" if isinstance(value, float) else str(value))
            for value, group in cohort.groupby(names.where(cohort[label].notna(), "missing")):
                rows.append([label, str(value), f"{group['patient_id'].nunique():,}", f"{len(group):,}"])
        return Table(["Column", "Value", *numeric], rows, numeric)
    first = cohort.drop_duplicates("patient_id")
    for label in task.label:
        values = first[label]
        low, middle, high = values.quantile([0.25, 0.5, 0.75])
        spread = (
            f"{middle:.4g} ({low:.4g} to {high:.4g})"
            if values.nunique() > 2
            else f"{int(values.sum()):,} of {len(values):,}"
        )
        rows.append([label, f"{first['patient_id'].nunique():,}", f"{len(cohort):,}", spread])
    return Table(["Column", *numeric, "Median (quartiles), or number of events"], rows, numeric)


def splits_table(run: Run) -> Table | None:
    """Patients and slides by part of each fold, with the patients of each class below."""
    splits, cohort, task = run.splits, run.cohort, run.task
    if splits is None or "patient_id" not in splits:
        return None
    folds = [name for name in map(str, splits) if name.startswith("fold_")]
    parts = [part for part in ("train", "val", "test") if any((splits[fold] == part).any() for fold in folds)]
    labels = None
    if task.kind in CLASSIFICATION and cohort is not None and task.label[0] in cohort:
        labels = cohort.set_index("slide_id")[task.label[0]]
    rows: list[list[Cell]] = []
    for fold in folds:
        cells: list[Cell] = [fold.removeprefix("fold_")]
        for part in parts:
            chosen = splits[splits[fold] == part]
            text = f"{chosen['patient_id'].nunique():,} / {len(chosen):,}"
            if labels is None:
                cells.append(text)
            else:
                of_class = chosen.groupby(chosen["slide_id"].map(labels).astype(str))["patient_id"].nunique()
                cells.append((text, ", ".join(f"{count:,} {name}" for name, count in of_class.items())))
        rows.append(cells)
    columns = ["Fold", *({"train": "Training", "val": "Validation", "test": "Test"}[part] for part in parts)]
    return Table(columns, rows, columns[1:])


def chosen_table(run: Run) -> Table | None:
    """What each fold of a sweep has chosen; None of another run."""
    chosen = run.facts.get("chosen") or []
    if not chosen:
        return None
    columns = [name for name in chosen[0] if name != "fold"]
    rows: list[list[Cell]] = [[f"fold {one['fold']}", *(str(one[name]) for name in columns)] for one in chosen]
    return Table(["Fold", *columns], rows, columns)


def trials_table(run: Run) -> Table | None:
    """The mean validation metric of every trial of a sweep in each fold; None of another run."""
    table = run.trials
    if table is None or not run.facts.get("chosen"):
        return None
    options = [name for name in run.facts["chosen"][0] if name not in ("fold", "trial")]
    means = table.groupby(["trial", "fold"])["val_metric"].mean().unstack()
    chosen = {(one["trial"], one["fold"]) for one in run.facts["chosen"]}
    firsts = table.groupby("trial")[options].first()
    rows: list[list[Cell]] = []
    for trial, of_folds in means.to_dict("index").items():
        values = [f"{value:.3f}{' *' if (trial, fold) in chosen else ''}" for fold, value in of_folds.items()]
        rows.append([str(trial), *(str(firsts[name][trial]) for name in options), *values])
    folds = [f"fold {fold}" for fold in means.columns]
    return Table(["Trial", *options, *folds], rows, folds)


def missing_slides(run: Run) -> list[tuple[str, list[str]]]:
    """Slides that are in the table or the folder but not in the run."""
    found = []
    for key, name in (
        ("without_features", "Slides without features"),
        ("without_label", "Features without a label"),
    ):
        slides = run.facts.get(key) or []
        if slides:
            found.append((name, [str(slide) for slide in slides]))
    return found


_OF_A_SLIDE_ENCODER = ("name", "weights", "tile_encoder", "layers", "width", "heads", "ffn_width", "dilated_ratios")


def settings_table(run: Run) -> Table:
    """What `run.json` says of the run, without what is stated elsewhere."""
    stated_elsewhere = {
        "seen",
        "task",
        "aggregator",
        "without_features",
        "without_label",
        "notes",
        "counts",
        "finished",
        "trained_folds",
        "chosen",
    }
    built = run.facts.get("aggregator") or {}
    encoder = {name: value for name, value in (built.get("architecture") or {}).items() if name in _OF_A_SLIDE_ENCODER}
    model = {
        "model": built.get("name"),
        "model options": built.get("options"),
        "slide encoder": encoder,
        "parameters": built.get("parameters"),
    }
    others = {name: value for name, value in run.facts.items() if name not in stated_elsewhere}
    facts = {name: _fact(value) for name, value in (model | others).items()}
    rows: list[list[Cell]] = [[name.replace("_", " "), text] for name, text in facts.items() if text]
    return Table(["Setting", "Value"], rows, [])


def _fact(value: Any) -> str:
    """A value of JSON in words; nothing for null."""
    if isinstance(value, dict):
        parts = {str(name).replace("_", " "): _fact(inner) for name, inner in value.items()}
        return ", ".join(f"{name} {text}" for name, text in parts.items() if text)
    if isinstance(value, list):
        return ", ".join(map(_fact, value))
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else str(value)
