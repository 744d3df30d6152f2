"""A run folder, as training and testing leave it."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...data.table import read_table, typed
from ...errors import LongslideError
from ...prediction_columns import PredictionColumns
from ...task import Task

if TYPE_CHECKING:
    import pandas as pd

RUN_FACTS = "run.json"
"""What a run folder is known by."""

TRIALS = "trials.csv"
"""What a sweep has tried, and how it did: one row for each trial, fold and inner fold."""

_NAMES = ("patient_id", "slide_id", "level")  # text, also where it looks like numbers


@dataclass(frozen=True, repr=False)
class Run:
    """A finished run.

    Attributes:
        folder: Its folder.
        facts: The content of `run.json`.
        task: What was predicted.
        predictions: `predictions.csv`.
    """

    folder: Path
    facts: dict[str, Any]
    task: Task
    predictions: "pd.DataFrame"

    @classmethod
    def without_predictions(cls, folder: Path, task: Task, facts: dict[str, Any]) -> "Run":
        """A run that predicted nothing: it has neither a validation nor a test part, or another process predicts."""
        import pandas as pd

        return cls(folder, facts, task, pd.DataFrame(columns=["level", "fold", "part", "patient_id", "slide_id"]))

    @property
    def ok(self) -> bool:
        """Whether it does not count against the exit status: a run that has finished never does."""
        return True

    @property
    def checkpoints(self) -> list[Path]:
        """The best checkpoint; of a cross-validation that of each fold, in their order. None of a test."""
        folds = sorted(self.folder.glob("fold_*/best.ckpt"), key=lambda path: int(path.parent.name.split("_")[1]))
        return folds or sorted(self.folder.glob("best.ckpt"))

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, {self.task.kind}, {len(self.predictions)} predictions)"

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def aggregator(self) -> str:
        """Name of the model that pools the tiles."""
        return str(self.facts.get("aggregator", {}).get("name", ""))

    @property
    def parameters(self) -> int | None:
        """Number of the model's parameters; None where an older version wrote the run."""
        return self.facts.get("aggregator", {}).get("parameters")  # type: ignore[no-any-return]

    def noun(self, level: str) -> str:
        """What a row of a level is called: where the table names no patients, each slide stands for itself."""
        return "slide" if level == "slide" or self.facts.get("patient_column", "") is None else "patient"

    @property
    def validation_metric(self) -> str:
        """Name of what `val_metric` in `history.csv` is."""
        from ...models.classifier.selection import SELECTION_METRIC

        return SELECTION_METRIC[self.task.kind]

    @cached_property
    def cohort(self) -> "pd.DataFrame | None":
        """`cohort.csv`: the rows that were used, with all columns of the table; None if the run has none."""
        return self._table("cohort.csv")

    @cached_property
    def splits(self) -> "pd.DataFrame | None":
        """`splits.csv`: the part of each slide in each fold; None if the run has none."""
        return self._table("splits.csv")

    @cached_property
    def history(self) -> "pd.DataFrame | None":
        """`history.csv`: losses by epoch; None if the run trained nothing."""
        return self._table("history.csv")

    @cached_property
    def trials(self) -> "pd.DataFrame | None":
        """`trials.csv` of a sweep; None of another run."""
        return self._table(TRIALS)

    @cached_property
    def metrics(self) -> "pd.DataFrame | None":
        """`metrics.csv`; None if it is not there yet."""
        return self._table("metrics.csv")

    @property
    def configuration(self) -> str:
        """`config.yaml` as it is, or nothing."""
        path = self.folder / "config.yaml"
        return path.read_text(encoding="utf-8") if path.is_file() else ""

    def _table(self, name: str) -> "pd.DataFrame | None":
        path = self.folder / name
        return _read_table(path, _NAMES) if path.is_file() else None


def read_run(folder: str | Path) -> Run:
    """Read a run folder: `run.json` and `predictions.csv` at once, the rest when it is asked for.

    Args:
        folder: What `fit`, `crossval`, `sweep` or `test` wrote.

    Returns:
        The run.

    Raises:
        LongslideError: It is not a run folder, or the run has not finished.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise LongslideError(f"{folder}: no such folder; give one that longslide fit, crossval, sweep or test wrote")
    path = folder / RUN_FACTS
    if not path.is_file():
        raise LongslideError(
            f"{folder}: no {RUN_FACTS} in it; name a folder that longslide fit, crossval, sweep or test wrote"
        )
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        task = Task.from_dict(facts["task"])
    except (ValueError, KeyError, TypeError) as error:
        raise LongslideError(f"{path}: does not describe a run ({error}); run it again") from error
    if not (folder / "predictions.csv").is_file():
        raise LongslideError(
            f"{folder}: no predictions.csv in it: the run has not finished; the same command goes on with it"
        )
    return Run(folder, facts, task, _read_table(folder / "predictions.csv", PredictionColumns(task).text))


def _read_table(path: Path, text: Collection[str]) -> "pd.DataFrame":
    # Class names such as "NA" or "None" are names, not missing values.
    return typed(read_table(path, {"", "nan"}), text)
