"""What a comparison says: tables on the terminal, and the page."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table as TerminalTable

from ...evaluation.classification import Classes
from ...evaluation.evaluate import LOWER_IS_BETTER, PRIMARY_METRIC, headline_scope
from ...evaluation.outcomes import read_outcomes
from ...evaluation.scopes import select
from ...task import Task
from . import run_figures
from .page import Picture, picture, write_page
from .run_figures import Curve
from .run_folder import Run
from .run_report import class_curves
from .run_tables import Cell, Table, interval, metric_name, narrow_cell, number, task_text, with_interval

if TYPE_CHECKING:
    import pandas as pd

MOST_BARS = 24
"""Rows of a forest plot."""


def print_comparison(values: "Mapping[str, pd.DataFrame]", differences: "pd.DataFrame", task: Task, level: str) -> None:
    """Print the metrics of each run and the differences in the first metric."""
    console = Console(highlight=False)
    primary = PRIMARY_METRIC[task.kind]
    n = int(next(iter(values.values()))["n"].max())
    table = TerminalTable(title=f"{n} test {level}s, 95% intervals", title_justify="left", box=SIMPLE)
    table.add_column("")
    for name in values:
        table.add_column(escape(name), justify="right")
    for metric in _metrics(values, primary):
        table.add_row(metric_name(metric), *(_terminal_cell(metrics, metric) for metrics in values.values()))
    console.print(table)
    for scope in _scopes(differences):
        pairs = differences[(differences["scope"] == scope) & (differences["metric"] == primary)]
        table = TerminalTable(
            title=escape(f"Difference in {metric_name(primary)}, {_scope_name(scope)}"),
            title_justify="left",
            box=SIMPLE,
        )
        for column in ("", "difference (95% interval)", "p", "p (Holm)"):
            table.add_column(column, justify="left" if not column else "right")
        for row in pairs.to_dict("records"):
            shown = with_interval(row["difference"], row["low"], row["high"])
            table.add_row(escape(f"{row['run_a']} - {row['run_b']}"), shown, p_text(row["p"]), p_text(row["p_holm"]))
        console.print(table)


def write_comparison_page(
    path: Path,
    runs: Mapping[str, Run],
    predictions: "Mapping[str, pd.DataFrame]",
    task: Task,
    values: "Mapping[str, pd.DataFrame]",
    differences: "pd.DataFrame",
    left_out: int,
    level: str,
) -> Path:
    """Write the page of a comparison.

    Args:
        path: The HTML file.
        runs: The runs by name.
        predictions: Their predictions, of the patients that are compared.
        task: The task they share.
        values: Their metrics.
        differences: The differences between all pairs.
        left_out: Patients that not all runs were tested on.
        level: `patient` or `slide`.

    Returns:
        `path`.
    """
    primary = PRIMARY_METRIC[task.kind]
    scope = headline_scope(differences)
    headline = differences[differences["scope"] == scope]
    several = len(runs) > 2
    facts = []
    for name, metrics in values.items():
        first = metrics[(metrics["scope"] == scope) & (metrics["metric"] == primary)].iloc[0]
        small = interval(first["low"], first["high"]) if np.isfinite(first["low"]) else ""
        facts.append((name, number(first["value"]), f"{metric_name(primary)} {small}"))
    return write_page(
        path,
        "comparison.html",
        title=" vs. ".join(runs) if len(runs) < 4 else f"{len(runs)} runs compared",
        description=f"{task_text(task)}, on the same {int(headline['n'].max()):,} test {level}s.",
        facts=facts,
        left_out=left_out,
        primary=metric_name(primary),
        mean_first=scope == "mean",
        values=_values_table(values, primary, scope),
        lower=", ".join(metric_name(m) for m in _metrics(values, primary) if m in LOWER_IS_BETTER),
        differences=_differences_table(headline[headline["metric"] == primary], with_metric=False, corrected=several),
        delong=(headline["test"] == "delong").any(),
        several=several,
        pictures=_pictures(predictions, level, task, values, headline, primary),
        others=_differences_table(headline[headline["metric"] != primary], with_metric=True, corrected=several),
        pooled=_differences_table(differences[differences["scope"] == "pooled"], with_metric=True, corrected=several)
        if scope == "mean"
        else None,
        subgroups=_subgroups(values, differences, primary),
        folders=[(name, str(run.folder), task_text(run.task), run.aggregator) for name, run in runs.items()],
    )


def p_text(p: float) -> str:
    """A p-value: three digits, `< 0.001` below that, a dash if there is none."""
    if not np.isfinite(p):
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _metrics(values: "Mapping[str, pd.DataFrame]", primary: str) -> list[str]:
    """The metrics over all classes or labels, the first one first."""
    names = dict.fromkeys(metric for metrics in values.values() for metric in metrics["metric"] if ":" not in metric)
    return sorted(names, key=lambda name: name != primary)


def _terminal_cell(metrics: "pd.DataFrame", metric: str) -> str:
    cell = narrow_cell(metrics, headline_scope(metrics), metric)
    return cell if isinstance(cell, str) else f"{cell[0]}\n[dim]{cell[1]}[/]"


def _scopes(differences: "pd.DataFrame") -> list[str]:
    return sorted(dict.fromkeys(differences["scope"]), key=lambda scope: (scope != "mean", scope != "pooled"))


def _scope_name(scope: str) -> str:
    if scope.startswith("subgroup:"):
        return scope.removeprefix("subgroup:").replace("=", " = ", 1)
    return {"mean": "mean over folds", "pooled": "all test patients"}.get(scope, scope)


def _values_table(values: "Mapping[str, pd.DataFrame]", primary: str, scope: str) -> Table:
    rows: list[list[Cell]] = [
        [metric_name(metric), *(narrow_cell(metrics, scope, metric) for metrics in values.values())]
        for metric in _metrics(values, primary)
    ]
    return Table(["Metric", *values], rows, list(values))


def _differences_table(differences: "pd.DataFrame", *, with_metric: bool, corrected: bool) -> Table | None:
    if not len(differences):
        return None
    numeric = ["Difference (95% interval)", "p", *(["p (Holm)"] if corrected else [])]
    columns = [*(["Metric"] if with_metric else []), "Runs", *numeric, "Test"]
    rows: list[list[Cell]] = []
    for row in differences.to_dict("records"):
        cells: list[Cell] = [metric_name(row["metric"])] if with_metric else []
        cells += [
            f"{row['run_a']} − {row['run_b']}",
            with_interval(row["difference"], row["low"], row["high"]),
            p_text(row["p"]),
        ]
        cells += [p_text(row["p_holm"])] if corrected else []
        rows.append([*cells, {"delong": "DeLong", "nadeau-bengio": "Nadeau-Bengio"}.get(row["test"], row["test"])])
    return Table(columns, rows, numeric)


def _pictures(
    predictions: "Mapping[str, pd.DataFrame]",
    level: str,
    task: Task,
    values: "Mapping[str, pd.DataFrame]",
    headline: "pd.DataFrame",
    primary: str,
) -> list[Picture]:
    name = metric_name(primary)
    bars = []
    for run, metrics in values.items():
        first = metrics[(metrics["scope"] == headline_scope(metrics)) & (metrics["metric"] == primary)].iloc[0]
        bars.append((run, first["value"], first["low"], first["high"]))
    pictures = [picture(run_figures.forest(bars, name), f"{name} of each run", f"{name} with 95% intervals.")]
    pairs = [
        (f"{row['run_a']} − {row['run_b']}", row["difference"], row["low"], row["high"])
        for row in headline[headline["metric"] == primary].head(MOST_BARS).to_dict("records")
    ]
    caption = "Paired differences with 95% intervals: an interval that holds 0 does not tell the two runs apart."
    pictures.append(picture(run_figures.forest(pairs, f"Difference in {name}", 0.0), f"Differences in {name}", caption))
    if task.kind == "binary":
        curves: dict[str, Curve] = {}
        calibration: dict[str, Curve] = {}
        for run, table in predictions.items():
            outcomes = read_outcomes(select(table, level), task)
            assert isinstance(outcomes, Classes)
            curve = class_curves(outcomes).get("")
            if curve is not None:
                curves[run] = curve
            confidence, correct = outcomes.confidence()
            calibration[run] = (correct, confidence)
        if curves:
            pictures.append(picture(run_figures.roc(curves), "ROC curves", "ROC, folds pooled."))
            caption = "Precision and recall. Dotted: the prevalence."
            pictures.append(picture(run_figures.precision_recall(curves), "Precision-recall curves", caption))
        of, is_so = f"Predicted probability of {task.classes[1]}", f"Share that is {task.classes[1]}"
        figure = run_figures.calibration(calibration, of, is_so)
        pictures.append(
            picture(figure, "Calibration curves", "Calibration in bins of 0.1; larger points hold more patients.")
        )
    return pictures


def _subgroups(
    values: "Mapping[str, pd.DataFrame]", differences: "pd.DataFrame", primary: str
) -> list[tuple[str, Table, Table | None]]:
    """For each subgroup column: its name, the first metric of each run by value, and the differences."""
    result = []
    scopes = [scope for scope in _scopes(differences) if scope.startswith("subgroup:")]
    for column in dict.fromkeys(scope.removeprefix("subgroup:").partition("=")[0] for scope in scopes):
        of_column = [scope for scope in scopes if scope.startswith(f"subgroup:{column}=")]
        rows: list[list[Cell]] = []
        for scope in of_column:
            n = next(iter(values.values())).query("scope == @scope and metric == @primary")["n"].max()
            cells = [narrow_cell(metrics, scope, primary) for metrics in values.values()]
            rows.append([scope.partition("=")[2], f"{n:,}", *cells])
        table = Table([column, "n", *values], rows, ["n", *values])
        chosen = differences[differences["scope"].isin(of_column) & (differences["metric"] == primary)]
        between = _differences_table(chosen, with_metric=False, corrected=True)
        if between is not None:
            between.columns.insert(0, column)
            for row, scope in zip(between.rows, chosen["scope"], strict=True):
                row.insert(0, scope.partition("=")[2])
        result.append((column, table, between))
    return result
