"""The run folder while a run goes on: what it trains, whether it may go on, and what it leaves."""

import json
import logging
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ...data.table import csv_of_frame, read_table, typed
from ...data.whole_file import write_whole
from ...errors import LongslideError
from ...plurals import count
from ...prediction_columns import SEEN
from ...task import Task
from ...version import __version__
from ...yaml_file import read_yaml
from ..batch.claims import ClaimedError, lock_folder, take
from ..batch.ledger import make_output_folder
from ..log_file import event
from ..report.run_folder import Run, read_run
from ..report.wording import seen_mark, seen_warning
from .settings import first_process

if TYPE_CHECKING:
    import pandas as pd

    from ...data.cohort.cohort import Cohort
    from ...data.cohort.datamodule import BagDataModule

HELD_OUT = {"checked": True, "slides": 0, "patients": 0}
"""What a run says of its own test part: its splits have no patient, image or features in two parts, or are refused."""

HISTORY = "history.csv"

EVALUATION = frozenset({"subgroups"})
"""Options that say how predictions are evaluated, not how they are made: a run may go on with others."""

_PACKAGES = ("torch", "lightning", "numpy", "pandas", "scikit-learn", "torchmetrics")


class TrainingRun:
    """A run folder from the start of a run to its end.

    Args:
        folder: The run folder.
        configuration: What `config.yaml` holds: every option, in plain types.
        subgroups: Columns of the cohort table to evaluate by.

    Attributes:
        facts: What `run.json` holds.
        finished: Whether the run is there already, with nothing left to train.
        trained: Folds whose training is done.
        remarks: What was remarked of their training.

    Raises:
        LongslideError: A run of another configuration is there, or one whose files cannot be read.
    """

    def __init__(self, folder: Path, configuration: Mapping[str, Any], subgroups: Sequence[str] = ()) -> None:
        self.folder = folder
        self.subgroups = list(subgroups)
        self._configuration = dict(configuration)
        self._began = time.monotonic()
        before = self._read()
        self.finished = bool(before.get("finished"))
        self._there = bool(before)  # without run.json its input was refused, and other options are what it needs
        self._configuration_before = self._read_configuration() if before else {}
        binding, asked = (
            {name: value for name, value in options.items() if name not in EVALUATION}
            for options in (self._configuration_before or self._configuration, self._configuration)
        )
        if different := _different(binding, asked):
            what = "finished" if self.finished else "was stopped"
            remedy = "" if self.finished else "give the same options to go on with it, "
            raise LongslideError(
                f"{folder}: holds a run that {what}, with other options ({'; '.join(different[:3])}); {remedy}choose "
                "another --run, or delete the folder"
            )
        self.facts: dict[str, Any] = (before if self.finished else {}) | {
            "started": before.get("started", datetime.now(UTC).isoformat(timespec="seconds")),
            "seconds": before.get("seconds", 0.0) if self.finished else 0.0,
            "finished": self.finished,
        }
        self.trained: list[int] = list(before.get("trained_folds", []))
        self.remarks: list[str] = list(before.get("remarks", []))
        self._seconds_before = float(before.get("seconds", 0.0))

    def _read(self) -> dict[str, Any]:
        path = self.folder / "run.json"
        if not path.is_file():
            return {}
        try:
            content = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise LongslideError(f"{path}: not readable ({error}); delete the folder to start again") from error
        return content if isinstance(content, dict) else {}

    def _read_configuration(self) -> dict[str, Any]:
        path = self.folder / "config.yaml"
        if not path.is_file():
            return {}
        try:
            content = read_yaml(path, "configuration")
        except LongslideError as error:
            raise LongslideError(f"{error}; delete the folder to start again") from error
        return content if isinstance(content, dict) else {}

    def check_cohort(self, cohort: "Cohort") -> None:
        """Refuse to go on with another cohort than the run has begun with.

        Raises:
            LongslideError: `cohort.csv` is there, and not of this cohort.
        """
        path = self.folder / "cohort.csv"
        if self._there and path.is_file() and path.read_bytes() != csv_of_frame(cohort.rows):
            raise LongslideError(
                f"{path}: the run has begun with another table or other feature files than there are now; choose another "
                "--run, or delete the folder"
            )

    def begin(self, cohort: "Cohort") -> None:
        """Make the folder, and write `config.yaml` and `cohort.csv`.

        Args:
            cohort: The cohort, which is known to be sound.

        Raises:
            LongslideError: The folder cannot be written to, or the run has begun with another cohort.
        """
        self.check_cohort(cohort)
        make_output_folder(self.folder, "--run")
        self._write_configuration()
        self._write("cohort.csv", csv_of_frame(cohort.rows))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the folder: what two processes trained there would be of neither.

        Raises:
            LongslideError: Another process trains there.
        """
        try:
            held = take(lock_folder(self.folder) / ".run.lock")
        except ClaimedError as error:
            raise LongslideError(
                f"{self.folder}: {error.who} is at work there; wait until it has ended, or choose another --run"
            ) from error
        try:
            yield
        finally:
            held.release()

    def describe(self, *folds: "BagDataModule", **facts: Any) -> None:
        """Write `run.json` and `splits.csv`.

        Args:
            *folds: The data of each fold that is trained.
            **facts: What else is to be in `run.json`.

        Raises:
            LongslideError: A subgroup column is not in the table, or has too many values; or the run has begun with other
                splits.
        """
        import torch

        from ...evaluation.scopes import subgroup_of_slide
        from ..embed.slide_embedding import unlike_recommended

        data = folds[-1]
        cohort = data.cohort
        for column in self.subgroups:
            subgroup_of_slide(cohort.rows, column)
        unlike = unlike_recommended(data.survey.preprocessing)
        if unlike and unlike not in self.remarks:
            self.remark(unlike)
        self.facts |= {
            "task": None if cohort.task is None else data.task.to_dict(),
            "preprocessing": data.preprocessing,
            "without_features": list(cohort.without_features),
            "without_label": list(cohort.without_label),
            "patient_column": cohort.patient_column,
            "notes": [*dict.fromkeys(note for fold in folds for note in fold.notes), *self.remarks],
            "versions": {"python": platform.python_version(), "longslide": __version__}
            | {name: version(name) for name in _PACKAGES},
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
            **facts,
        }
        splits = csv_of_frame(data.splits)
        path = self.folder / "splits.csv"
        if self._there and path.is_file() and path.read_bytes() != splits:
            raise LongslideError(
                f"{path}: the run has begun with other splits than there are now; choose another --run, or delete the folder"
            )
        self._write("splits.csv", splits)
        self.write()

    def remark(self, text: str) -> None:
        """Print a remark, and record it in `run.json`."""
        print(text, file=sys.stderr)
        event("remark", text, level=logging.WARNING)
        self.remarks.append(text)
        self.facts["notes"] = [*self.facts.get("notes", []), text]

    def fold_trained(self, fold: int, folder: Path, remark: str) -> None:
        """Record that a fold is trained.

        Args:
            fold: The fold.
            folder: Where it was trained; its history goes into that of the run.
            remark: What is to be remarked of its training, if anything is.
        """
        if remark:
            self.remark(remark)
        if folder != self.folder and (folder / HISTORY).is_file():
            self._join_history(fold, folder / HISTORY)
        self.trained = sorted({*self.trained, fold})
        self.write()

    def _join_history(self, fold: int, path: Path) -> None:
        import pandas as pd

        rows = [typed(read_table(path, ("", "nan")))]
        if (self.folder / HISTORY).is_file():
            whole = typed(read_table(self.folder / HISTORY, ("", "nan")))
            rows.append(whole[whole["fold"] != fold])
        joined = pd.concat(rows, ignore_index=True).sort_values(["fold", "epoch"], kind="stable")
        self._write(HISTORY, csv_of_frame(joined))

    def write(self) -> None:
        """Write `run.json`: whole, or not at all."""
        self.facts |= {"trained_folds": self.trained, "remarks": self.remarks}
        if not self.finished:
            self.facts["seconds"] = round(self._seconds_before + time.monotonic() - self._began, 1)
        self._write("run.json", json.dumps(self.facts, indent=2, default=str) + "\n")

    def finish(self, predictions: "Sequence[pd.DataFrame]", task: Task, cohort: "pd.DataFrame") -> Run:
        """Write predictions, metrics and report, and mark the run as finished.

        Args:
            predictions: Rows of `predictions.csv`, of all folds and parts.
            task: The task.
            cohort: The rows used.

        Returns:
            The finished run.
        """
        import pandas as pd

        if predictions:
            table = pd.concat(predictions, ignore_index=True)
            self._write("predictions.csv", csv_of_frame(table))
            self._evaluate(table, task, cohort)
        self.finish_without_predictions()
        return read_run(self.folder) if predictions else Run.without_predictions(self.folder, task, self.facts)

    def say_finished(self, cohort: "Cohort") -> None:
        """Say that the run has finished before.

        Raises:
            LongslideError: The cohort that is asked for now is another one.
        """
        self.check_cohort(cohort)
        print(f"{self.folder}: finished already", file=sys.stderr)

    def again(self, cohort: "Cohort") -> Run:
        """The run that has finished before; evaluated again if other options for that are given now.

        Args:
            cohort: The cohort that is asked for now.

        Raises:
            LongslideError: It is another cohort, or the files of the run cannot be read.
        """
        self.say_finished(cohort)
        if not (self.folder / "predictions.csv").is_file():
            return Run.without_predictions(self.folder, Task.from_dict(self.facts["task"]), self.facts)
        run = read_run(self.folder)
        if _different(self._configuration_before, self._configuration) and first_process():
            self._write_configuration()
            self._evaluate(run.predictions, run.task, cohort.rows)
        return read_run(self.folder)

    def _evaluate(self, predictions: "pd.DataFrame", task: Task, cohort: "pd.DataFrame") -> None:
        """Write metrics and report, if there is a test part."""
        from ...evaluation import evaluate
        from ..report.run_report import write_run_report

        if (predictions["part"] == "test").any():
            metrics = evaluate(predictions, task, cohort=cohort, subgroups=self.subgroups or None)
            metrics[SEEN] = seen_mark(self.facts.get("seen"))
            self._write("metrics.csv", csv_of_frame(metrics))
            self.write()
            write_run_report(self.folder)

    def finish_without_predictions(self) -> None:
        """Mark the run as finished."""
        self.facts["finished"] = True
        self.write()

    def _write_configuration(self) -> None:
        self._write("config.yaml", yaml.safe_dump(self._configuration, sort_keys=False, allow_unicode=True))

    def _write(self, name: str, content: str | bytes) -> None:
        write_whole(self.folder / name, content.encode() if isinstance(content, str) else content, "--run")


def print_metrics(run: Run) -> None:
    """Print what came out: the metrics of the held-out patients (the mean over folds), and where the report is."""
    from ...evaluation.evaluate import headline_scope

    metrics = run.metrics
    if metrics is None:
        print(f"no test part, so there is nothing to report; the model is {run.folder / 'best.ckpt'}")
        return
    scope = headline_scope(metrics)
    first = metrics[metrics["scope"] == scope]
    level = "patient" if (first["level"] == "patient").any() else "slide"
    rows = first[(first["level"] == level) & ~first["metric"].str.contains(":")]
    for row in rows.itertuples():
        ends = f" (95% {row.low:.3f} to {row.high:.3f})" if isinstance(row.method, str) and row.method else ""
        over = ", mean over folds" if scope == "mean" else ""
        print(f"{row.metric:>20} {row.value:.3f}{ends}, {count(int(str(row.n)), run.noun(level))}{over}")
        facts = {"scope": scope, "metric": row.metric, "value": row.value, "low": row.low, "high": row.high, "n": row.n}
        event("metric", f"{row.metric} {row.value:.3f}{ends}{over}", facts | {"unit": level})
    if warning := seen_warning(run.facts.get("seen")):
        print(warning)
    print(f"see {run.folder / 'report.html'}")


def _different(old: Any, new: Any, key: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        names = [*old, *(name for name in new if name not in old)]
        return [line for name in names for line in _different(old.get(name), new.get(name), f"{key}.{name}".strip("."))]
    return [] if old == new else [f"--{key.replace('_', '-')} was {old}, is now {new}"]
