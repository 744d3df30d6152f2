"""Paired comparison of runs: a table to read, one to keep, and a page to send."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...data.table import csv_of_frame
from ...data.whole_file import write_whole
from ...errors import LongslideError
from ...prediction_columns import survival_times
from ...ranges import checked
from ...task import Task
from ..batch.ledger import make_output_folder
from .run_folder import Run, read_run

if TYPE_CHECKING:
    import pandas as pd

TABLE, PAGE = "comparison.csv", "comparison.html"


@dataclass(frozen=True)
class ComparedRun:
    """A run in a comparison.

    Attributes:
        name: Its name there.
        metric: The first metric of the task.
        value: Its value: the mean over the folds, or that of the test patients if there is one fold.
        low: Lower end of the 95% interval; NaN if there is none.
        high: Upper end.
        n: Test patients.
    """

    name: str
    metric: str
    value: float
    low: float
    high: float
    n: int

    @property
    def ok(self) -> bool:
        """A run that was compared counts as done."""
        return True


@checked
def compare(
    runs: Sequence[str | Path],
    output: str | Path = Path("comparison"),
    subgroups: str = "",
    common_patients: bool = False,
) -> list[ComparedRun]:
    """Compare runs on the same test patients: every metric with its interval, and the paired differences.

    Args:
        runs: Run folders of `longslide fit`, `crossval` or `test`; two or more.
        output: Folder for `comparison.csv` and `comparison.html`.
        subgroups: Columns of the cohort table to compare by, separated by commas; numbers are cut at their quartiles.
        common_patients: Compare on the patients that all runs were tested on, where they differ.

    Returns:
        One result per run, in their order.

    Raises:
        LongslideError: Fewer than two runs, no run folders, other tasks, other patients or other targets.
    """
    output = Path(output)
    named = _named([read_run(folder) for folder in runs])
    task = _shared_task(named)
    predictions = {name: run.predictions for name, run in named.items()}
    left_out = 0
    if common_patients:
        predictions, left_out = _on_common_patients(predictions)
    level = _shared_level(predictions)
    predictions = _on_common_times(predictions)
    cohort = next((run.cohort for run in named.values() if run.cohort is not None), None)
    make_output_folder(output)

    from ...evaluation import compare_predictions, evaluate
    from ...evaluation.evaluate import PRIMARY_METRIC, headline_scope
    from .compare_report import print_comparison, write_comparison_page

    groups = [column.strip() for column in subgroups.split(",") if column.strip()]
    differences = compare_predictions(predictions, task, cohort=cohort, subgroups=groups, level=level)
    values = {
        name: evaluate(table[table["level"] == level], task, cohort=cohort, subgroups=groups)
        for name, table in predictions.items()
    }
    write_whole(output / TABLE, csv_of_frame(_one_table(values, differences)))
    page = write_comparison_page(output / PAGE, named, predictions, task, values, differences, left_out, level)
    print_comparison(values, differences, task, level)
    print(f"see {page} and {output / TABLE}")
    results = []
    for name, metrics in values.items():
        first = metrics[
            (metrics["scope"] == headline_scope(metrics)) & (metrics["metric"] == PRIMARY_METRIC[task.kind])
        ].iloc[0]
        results.append(
            ComparedRun(
                name, first["metric"], float(first["value"]), float(first["low"]), float(first["high"]), int(first["n"])
            )
        )
    return results


def _named(runs: Sequence[Run]) -> dict[str, Run]:
    """Runs by the name of their folder, or by as much of the path as distinguishes them."""
    folders = [run.folder.resolve() for run in runs]
    if len(set(folders)) < len(folders):
        raise LongslideError("the same run is named twice; a comparison needs different runs")
    if len(runs) < 2:
        raise LongslideError("a comparison needs two or more run folders")
    for depth in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return dict(zip(names, runs, strict=True))


def _shared_task(runs: Mapping[str, Run]) -> Task:
    (first, run), *others = runs.items()
    for name, other in others:
        for what in ("kind", "label", "classes"):
            ours, theirs = getattr(run.task, what), getattr(other.task, what)
            if ours != theirs:
                texts = [value if isinstance(value, str) else ", ".join(value) for value in (ours, theirs)]
                raise LongslideError(
                    f"{first} and {name} are not of the same task: {what} is {texts[0]} and {texts[1]}"
                )
    return run.task


def _shared_level(predictions: "Mapping[str, pd.DataFrame]") -> str:
    """`patient` if all runs predict patients, else `slide`."""
    levels = {name: set(table.loc[table["part"] == "test", "level"]) for name, table in predictions.items()}
    for level in ("patient", "slide"):
        if all(level in own for own in levels.values()):
            return level
    texts = [f"{name} has {' and '.join(sorted(own)) or 'none'}" for name, own in levels.items()]
    raise LongslideError(f"the runs have no test predictions of one level, patients or slides: {', '.join(texts)}")


def _on_common_patients(predictions: "dict[str, pd.DataFrame]") -> "tuple[dict[str, pd.DataFrame], int]":
    """The test patients that all runs have, and how many others there are."""
    tested: dict[str, set[str]] = {
        name: set(table.loc[table["part"] == "test", "patient_id"]) for name, table in predictions.items()
    }
    every: set[str] = set().union(*tested.values())
    common = {patient for patient in every if all(patient in patients for patients in tested.values())}
    if not common:
        raise LongslideError("the runs have no test patient in common; nothing can be compared")
    kept = {name: table[table["patient_id"].isin(common)] for name, table in predictions.items()}
    return kept, len(every) - len(common)


def _on_common_times(predictions: "dict[str, pd.DataFrame]") -> "dict[str, pd.DataFrame]":
    """Only the times at which every run predicts survival: Brier scores over other times are other scores."""
    every = [set(survival_times(map(str, table))) for table in predictions.values()]
    common = set(every[0]).intersection(*every)
    return {
        name: table.drop(columns=list(own - common))
        for (name, table), own in zip(predictions.items(), every, strict=True)
    }


def _one_table(values: "Mapping[str, pd.DataFrame]", differences: "pd.DataFrame") -> "pd.DataFrame":
    """`comparison.csv`: the metrics of each run, then the differences; `against` is empty for the former."""
    import pandas as pd

    of_runs = [metrics.assign(run=name, against="", p=None, p_holm=None) for name, metrics in values.items()]
    pairs = differences.rename(columns={"run_a": "run", "run_b": "against", "difference": "value", "test": "method"})
    columns = ["scope", "metric", "run", "against", "value", "low", "high", "method", "p", "p_holm", "n"]
    return pd.DataFrame(
        [row for table in (*of_runs, pairs) for row in table[columns].to_dict("records")], columns=columns
    )
