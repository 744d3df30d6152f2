"""The columns of `predictions.csv`: written and read by this one grammar, whichever command makes the file."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, assert_never

from .task import CLASSIFICATION, Task

if TYPE_CHECKING:
    import pandas as pd

IDENTITY = ("level", "fold", "part", "patient_id", "slide_id")
"""What a row is of. `part` is `val` or `test`; `fold` and `part` are empty where nothing was held out."""

SEEN = "seen_in_training"
"""Whether it was in the training or validation part of a classifier: `yes`, `no`, or nothing where no checkpoint says."""

REMARKS = ("classifiers", SEEN, "warnings")
"""How many classifiers the row is the mean of, whether they had seen it, and what makes it doubtful."""

_TARGET, _PREDICTION, _PROBABILITY = "target", "prediction", "probability"
_TIME, _EVENT, _RISK, _SURVIVAL, _SPREAD = "time", "event", "risk", "survival", "spread"


@dataclass(frozen=True)
class PredictionColumns:
    """The columns that a task has.

    | task | `target` | `decision` | `score` |
    |---|---|---|---|
    | binary, multiclass, ordinal | `target` | `prediction` (class names) | `probability_<class>` |
    | multilabel | `target_<label>` | `prediction_<label>` (0 or 1) | `probability_<label>` |
    | regression | `target` | | `prediction` |
    | survival | `time`, `event` | | `risk`, `survival_<time>` |

    Attributes:
        task: The task.
    """

    task: Task

    @property
    def target(self) -> list[str]:
        """What was true."""
        match self.task.kind:
            case "multilabel":
                return [f"{_TARGET}_{name}" for name in self.task.classes]
            case "survival":
                return [_TIME, _EVENT]
            case "binary" | "multiclass" | "ordinal" | "regression":
                return [_TARGET]
            case _:
                assert_never(self.task.kind)

    @property
    def decision(self) -> list[str]:
        """What the scores come to: a class, or whether each label is there."""
        match self.task.kind:
            case "multilabel":
                return [f"{_PREDICTION}_{name}" for name in self.task.classes]
            case "binary" | "multiclass" | "ordinal":
                return [_PREDICTION]
            case "regression" | "survival":
                return []
            case _:
                assert_never(self.task.kind)

    @property
    def score(self) -> list[str]:
        """The numbers that a classifier gives: of each class or label, the value, or the risk and the survival curve."""
        match self.task.kind:
            case "regression":
                return [_PREDICTION]
            case "survival":
                return [_RISK, *(f"{_SURVIVAL}_{time_text(time)}" for time in self.task.times)]
            case "binary" | "multiclass" | "multilabel" | "ordinal":
                return [f"{_PROBABILITY}_{name}" for name in self.task.classes]
            case _:
                assert_never(self.task.kind)

    @property
    def spread(self) -> list[str]:
        """Standard deviation over the classifiers of an ensemble: of each probability, of the value, or of the risk."""
        of = self.task.classes or (_RISK if self.task.kind == "survival" else _PREDICTION,)
        return [f"{_SPREAD}_{name}" for name in of]

    @property
    def text(self) -> frozenset[str]:
        """Columns that hold names, whatever they look like: `007`, `1` or `NA` may be an id or a class."""
        names = {_TARGET, _PREDICTION} if self.task.kind in CLASSIFICATION else set()
        return frozenset(names | {"level", "part", "patient_id", "slide_id", SEEN, "warnings"})

    @property
    def all(self) -> list[str]:
        """Every column, in the order of the file."""
        return [*IDENTITY, *self.target, *self.decision, *self.score, *self.spread, *REMARKS]

    def arrange(self, rows: "pd.DataFrame") -> "pd.DataFrame":
        """The rows with every column in its place; those that are not there are empty."""
        return rows.reindex(columns=self.all)


def time_text(time: float) -> str:
    """A time as a column and a file name it: 12.0 is `12`."""
    return f"{time:.15g}"


def survival_times(columns: Iterable[str]) -> dict[str, float]:
    """Those of the columns that hold survival, and the time of each."""
    prefix = f"{_SURVIVAL}_"
    return {name: float(name.removeprefix(prefix)) for name in columns if name.startswith(prefix)}
