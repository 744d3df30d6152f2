"""What a comparison says: tables on the terminal, and the page."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table as TerminalTable

from ...evaluation.classification import Classes
from ...evaluation.evaluate import LOWER_IS_BETTER, PRIMARY_METRIC, headline_scope
from ...evaluation.outcomes import read_outcomes
from ...evaluation.scopes import select
from ...plurals import count
from ...task import Task
from . import run_figures
from .page import Cell, Page, Picture, Table
from .pictures import calibration, calibration_of, class_curves, discrimination
from .run_folder import Run
from .run_tables import narrow_cell
from .wording import (
    NO_PROOF,
    interval,
    metric_name,
    number,
    p_text,
    seen_warning,
    task_text,
    with_interval,
)

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
    name = metric_name(primary)
    scope = headline_scope(differences)
    headline = differences[differences["scope"] == scope]
    several = len(runs) > 2
    noun = next(iter(runs.values())).noun(level)

    title = " vs. ".join(runs) if len(runs) < 4 else f"{len(runs)} runs compared"
    page = Page(title, f"{task_text(task)}, on the same {count(int(headline['n'].max()), f'test {noun}')}.")
    facts = []
    for run, metrics in values.items():
        first = _first(metrics, primary)
        small = interval(first["low"], first["high"]) if np.isfinite(first["low"]) else ""
        facts.append((run, number(first["value"]), f"{name} {small}"))
    for run, one in runs.items():
        if warning := seen_warning(one.facts.get("seen")):
            page.warning(f"{run}: {warning}")
    page.facts(facts)
    if left_out:
        many = "are" if left_out > 1 else "is"
        page.warning(f"{count(left_out, noun)} that not all runs were tested on {many} left out.")

    page.heading(f"Differences in {name}")
    page.table(_differences_table(headline[headline["metric"] == primary], with_metric=False, corrected=several))
    if scope == "mean":
        method = (
            "the jackknife over patients with what training on other patients would change (Nadeau & Bengio 2003). This "
            "difference, in the mean over folds, is the one to believe."
        )
    else:
        delong = "DeLong's, or " if (headline["test"] == "delong").any() else ""
        method = f"{delong}the jackknife over patients with Student's distribution."
    page.note(
        f"Paired: the same {noun}s are tested by all runs. Interval and p-value are of one method: {method}",
        "Holm's correction is for the number of pairs, within each metric." if several else "",
        NO_PROOF,
    )
    page.pictures(_pictures(predictions, level, task, values, headline, primary, noun))

    page.heading("Metrics")
    page.table(_values_table(values, primary, scope))
    lower = ", ".join(metric_name(metric) for metric in _metrics(values, primary) if metric in LOWER_IS_BETTER)
    of = "Mean over folds" if scope == "mean" else f"All test {noun}s"
    page.note(f"{of}, 95% intervals.", f"Lower is better for: {lower}." if lower else "")
    others = _differences_table(headline[headline["metric"] != primary], with_metric=True, corrected=several)
    if others is not None:
        with page.details("Differences in the other metrics"):
            page.table(others)
    if scope == "mean":
        with page.details("Differences with all folds pooled"):
            pooled = differences[differences["scope"] == "pooled"]
            page.table(_differences_table(pooled, with_metric=True, corrected=several))
            page.note(
                "Each fold has a model and a scale of its own, and these intervals and p-values take the trained models as "
                "given: they would not hold for models trained on other patients. Believe the difference in the mean over "
                "folds."
            )

    subgroups = _subgroups(values, differences, primary)
    if subgroups:
        page.heading("Subgroups")
    for column, of_column, between in subgroups:
        page.heading(f"{name} by {column}", 3)
        page.table(of_column)
        page.table(between)
        if between is not None:
            page.note("Holm's correction is for the number of pairs and subgroups together.")

    page.heading("Runs")
    folders: list[list[Cell]] = [
        [run, str(read.folder), task_text(read.task), read.aggregator] for run, read in runs.items()
    ]
    page.table(Table(["Run", "Folder", "Task", "Model"], folders, []))
    return page.write(path)


def _first(metrics: "pd.DataFrame", metric: str) -> "pd.Series[Any]":
    """The row of a metric that is the result."""
    return metrics[(metrics["scope"] == headline_scope(metrics)) & (metrics["metric"] == metric)].iloc[0]


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
    noun: str,
) -> list[Picture]:
    name = metric_name(primary)
    bars = [(run, *_first(metrics, primary)[["value", "low", "high"]]) for run, metrics in values.items()]
    pairs = [
        (f"{row['run_a']} − {row['run_b']}", row["difference"], row["low"], row["high"])
        for row in headline[headline["metric"] == primary].head(MOST_BARS).to_dict("records")
    ]
    caption = "Paired differences with 95% intervals: an interval that holds 0 does not distinguish the two runs."
    difference = run_figures.forest(pairs, f"Difference in {name}", 0.0)
    pictures = [
        Picture(*run_figures.forest(bars, name), f"{name} of each run", f"{name} with 95% intervals."),
        Picture(*difference, f"Differences in {name}", caption),
    ]
    if task.kind != "binary":
        return pictures
    outcomes = {run: read_outcomes(select(table, level), task) for run, table in predictions.items()}
    of_classes = {run: one for run, one in outcomes.items() if isinstance(one, Classes)}
    curves = {run: class_curves(one)[""] for run, one in of_classes.items() if class_curves(one)}
    pictures += discrimination(curves, {}, noun)
    calibrations = {run: calibration_of(one) for run, one in of_classes.items()}
    return [*pictures, calibration(calibrations, noun, task.classes[1])]


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
