"""Labels of a cohort: from the text of a table to the targets of a task."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import assert_never

import numpy as np
import pandas as pd

from ...errors import LongslideError
from ...plurals import count
from ...task import Task, TaskKind
from ..table import listed, require_columns

_TRUTH = {"False": 0.0, "True": 1.0, "false": 0.0, "true": 1.0, "FALSE": 0.0, "TRUE": 1.0}


def class_of(cell: str) -> str:
    """The class that a cell names: 1 where a spreadsheet wrote 1.0."""
    return re.sub(r"^(-?\d+)\.0+$", r"\1", cell)


def truth_of(cell: str) -> float:
    """1 or 0 for a cell that says whether a label or an event is there; NaN if it does not say so."""
    if cell in _TRUTH:
        return _TRUTH[cell]
    try:
        number = float(cell)
    except ValueError:
        return np.nan
    return number if number in (0, 1) else np.nan


@dataclass(frozen=True)
class LabelReader:
    """Reads label columns.

    Attributes:
        source: The table, for messages.
        frame: Its rows, all cells text; with `slide_id`.
        has_features: `(N,)` bool, the rows that count where a label is checked.
        label: Label columns.
        classes: Class names in their order; sorted if empty.
        renamed: Value in the table -> class name, where the two differ.
        all_classes: Refuse labels in which a class does not occur.
        positive: The positive class of a binary task; the last of the classes if None.
    """

    source: Path
    frame: pd.DataFrame
    has_features: np.ndarray
    label: tuple[str, ...]
    classes: tuple[str, ...]
    renamed: dict[str, str]
    all_classes: bool
    positive: str | None = None

    def read(
        self, kind: TaskKind, times: Sequence[float] | None, discrete_time: bool
    ) -> tuple[Task, np.ndarray, np.ndarray]:
        """The task, the targets of all rows, and which rows have a label.

        Raises:
            LongslideError: A column is not there, a cell is not what the task needs, or there is nothing to learn.
        """
        wanted = {"survival": 2, "multilabel": None}.get(kind, 1)
        if wanted is not None and len(self.label) != wanted:
            what = "two label columns, the time and the event" if wanted == 2 else "one label column"
            example = "'[time, event]'" if wanted == 2 else "label"
            raise LongslideError(
                f"a {kind} task needs {what}, not {', '.join(self.label) or 'none'}; give --data.label {example}"
            )
        require_columns(self.source, self.frame, self.label)
        if self.frame.loc[self.has_features, list(self.label)].isna().all(axis=None):
            raise LongslideError(f"{self.source}: {listed(self.label)} is empty for all slides that have features")
        match kind:
            case "binary" | "multiclass" | "ordinal":
                return self._classes(kind)
            case "multilabel":
                return self._labels()
            case "regression":
                return self._values()
            case "survival":
                return self._survival(times, discrete_time)
            case _:
                assert_never(kind)

    def _labels(self) -> tuple[Task, np.ndarray, np.ndarray]:
        targets = np.stack([self._numbers(name, truth=True) for name in self.label], axis=1)
        has_label = ~np.isnan(targets).all(axis=1)
        for column, name in zip(targets[has_label & self.has_features].T, self.label, strict=True):
            self._varies(name, column[~np.isnan(column)])
        return Task("multilabel", self.label, self.label), targets.astype(np.float32), has_label

    def _values(self) -> tuple[Task, np.ndarray, np.ndarray]:
        values = self._numbers(self.label[0])
        has_label = ~np.isnan(values)
        self._varies(self.label[0], values[has_label & self.has_features])
        return Task("regression", self.label), values, has_label

    def _classes(self, kind: TaskKind) -> tuple[Task, np.ndarray, np.ndarray]:
        name = self.label[0]
        cells = self.frame[name].map(class_of, na_action="ignore")
        cells = cells.map(lambda cell: self.renamed.get(cell, cell), na_action="ignore")
        has_label = cells.notna().to_numpy()
        present = list(cells[has_label & self.has_features].unique())
        if not self.classes and (alike := _spelt_alike(present)):
            raise LongslideError(
                f"{self.source}: column {name!r} has {' and '.join(map(repr, alike))}, which may be one class; spell them "
                "alike if they are, or else name all classes with --data.classes"
            )
        classes = self.classes or tuple(_in_order(present))
        if kind == "ordinal" and not self.classes and not all(_is_number(value) for value in classes):
            raise LongslideError(
                f"{self.source}: the classes of {name!r} are text, whose order is not known; confirm or correct it, from "
                f"low to high: --data.classes '[{', '.join(classes)}]'"
            )
        strange = cells[has_label & ~cells.isin(classes).to_numpy()]
        if len(strange):
            remedy = "add it with --data.classes" if self.all_classes else "spell the classes as in training"
            raise LongslideError(
                f"{self.source}: column {name!r} has {strange.iloc[0]!r} in "
                f"{count(int((strange == strange.iloc[0]).sum()), 'row')}, "
                f"not one of the classes {', '.join(classes)}; {remedy}, or empty those cells"
            )
        if kind == "binary" and len(classes) > 2:
            raise LongslideError(
                f"{self.source}: column {name!r} has {len(classes)} classes ({listed(classes, 6)}), a binary task has two; "
                "use --data.task multiclass, or empty the cells that say nothing"
            )
        absent = [value for value in classes if value not in present]
        if len(classes) < 2 or (self.all_classes and len(absent) == len(classes) - 1):
            raise LongslideError(
                f"{self.source}: column {name!r} has only one class ({(present or classes or ('none',))[0]}) among the "
                "slides with features; there is nothing to learn"
            )
        if self.all_classes and absent:
            raise LongslideError(
                f"{self.source}: no slide with features has the class {absent[0]!r} in column {name!r}; leave it out of "
                "--data.classes"
            )
        if self.positive is not None:
            positive = self.renamed.get(self.positive, self.positive)
            if positive not in classes:
                raise LongslideError(
                    f"--data.positive {self.positive} is none of the classes of {name!r} in {self.source}: "
                    f"{', '.join(classes)}"
                )
            classes = (*(value for value in classes if value != positive), positive)
        number = {value: index for index, value in enumerate(classes)}
        targets = cells.map(number).fillna(-1).to_numpy(np.int64)
        return Task(kind, self.label, classes), targets, has_label

    def _survival(self, times: Sequence[float] | None, discrete_time: bool) -> tuple[Task, np.ndarray, np.ndarray]:
        time, event = self._numbers(self.label[0]), self._numbers(self.label[1], truth=True)
        has_label = ~(np.isnan(time) | np.isnan(event))
        used = has_label & self.has_features
        if (time[has_label] < 0).any():
            slide = self.frame["slide_id"][has_label & (time < 0)].iloc[0]
            raise LongslideError(
                f"{self.source}: {self.label[0]!r} of {slide} is below 0; times count from the start of follow-up"
            )
        events = time[used & (event == 1)]
        if self.all_classes:
            if not len(events):
                raise LongslideError(
                    f"{self.source}: no slide with features has an event (1 in {self.label[1]!r}); there is nothing to learn"
                )
            self._varies(self.label[0], time[used])
        if times is None:
            times = interval_ends(events, discrete_time) if len(events) else ()
        if list(times) != sorted(set(times)) or (len(times) and times[0] <= 0):
            raise LongslideError(f"--data.times {', '.join(map(str, times))} must be above 0 and ascend")
        targets = np.stack([time, event], axis=1)
        return (
            Task("survival", self.label, times=tuple(map(float, times)), discrete_time=discrete_time),
            targets,
            has_label,
        )

    def _numbers(self, name: str, *, truth: bool = False) -> np.ndarray:
        """`(N,)` float64 of a column, NaN where it is empty; of one that says whether something is there, 0 and 1."""
        cells = self.frame[name]
        values = cells.map(truth_of, na_action="ignore") if truth else pd.to_numeric(cells, errors="coerce")
        numbers = values.to_numpy(np.float64, na_value=np.nan)
        wrong = cells.notna().to_numpy() & ~np.isfinite(numbers)
        if wrong.any():
            cell = cells[wrong].iloc[0]
            hint = "; write decimals with a point, and thousands without a comma" if "," in cell else ""
            raise LongslideError(
                f"{self.source}: {name!r} of {self.frame['slide_id'][wrong].iloc[0]} is {cell!r}, not "
                f"{'0 or 1' if truth else 'a finite number'}{hint}"
            )
        return numbers

    def _varies(self, name: str, values: np.ndarray) -> None:
        if self.all_classes and len(np.unique(values)) < 2:
            what = f"only {values[0]:g}" if len(values) else "no value"
            raise LongslideError(
                f"{self.source}: column {name!r} has {what} among the slides with features; there is nothing to learn"
            )


_WORDS = (
    "none",
    "negative",
    "benign",
    "very low",
    "low",
    "mild",
    "medium",
    "intermediate",
    "moderate",
    "high",
    "severe",
)
"""Words of grades, from low to high."""


def _in_order(values: Iterable[str]) -> list[str]:
    """Sorted: words of grades by their meaning, then texts with their numbers as numbers, G2 before G10."""

    def key(value: str) -> tuple[int, list[tuple[int, float, str]]]:
        word = _WORDS.index(value.lower()) if value.lower() in _WORDS else len(_WORDS)
        parts = [value] if _is_number(value) else re.findall(r"\d+|\D+", value)
        return word, [(0, float(part), "") if _is_number(part) else (1, 0.0, part) for part in parts]

    return sorted(values, key=key)


def _spelt_alike(values: Iterable[str]) -> list[str]:
    """The first values that differ in case, blanks or underscores alone."""
    groups: dict[str, list[str]] = {}
    for value in values:
        groups.setdefault(re.sub(r"[\s_]+", " ", value.casefold()), []).append(value)
    return next((group for group in groups.values() if len(group) > 1), [])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def interval_ends(events: np.ndarray, discrete_time: bool) -> tuple[float, ...]:
    """Quarters of the event times to two digits; with discrete time up to the last event, which must lie inside."""
    ends = [float(f"{value:.2g}") for value in np.quantile(events, (0.25, 0.5, 0.75))]
    if discrete_time:
        last = float(events.max())
        unit = 10.0 ** (np.floor(np.log10(last)) - 1) if last > 0 else 1.0
        ends.append(float(f"{np.ceil(last / unit - 1e-9) * unit:.6g}"))
    return tuple(sorted({end for end in ends if end > 0}))
