"""What is to be predicted: the facts of a task that data, models and evaluation share."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, assert_never, get_args

from .errors import LongslideError

TaskKind = Literal["binary", "multiclass", "multilabel", "ordinal", "regression", "survival"]

CLASSIFICATION: tuple[TaskKind, ...] = ("binary", "multiclass", "ordinal")
"""Kinds with one class per patient, out of `classes`."""


@dataclass(frozen=True)
class Task:
    """A prediction task.

    Attributes:
        kind: What kind of target it is.
        label: Columns of the cohort table that hold the target: one; for `multilabel` one per label; for `survival` the time
            and the event (1 or 0).
        classes: Class names in their order: the negative class first for `binary`, from low to high for `ordinal`; the
            label names for `multilabel`; empty for `regression` and `survival`.
        times: Right ends of the time intervals of discrete-time survival, ascending, in the units of the table; for Cox the
            times at which survival is reported.
        discrete_time: Whether survival is modelled by discrete hazards; by Cox's partial likelihood otherwise.
    """

    kind: TaskKind
    label: tuple[str, ...]
    classes: tuple[str, ...] = ()
    times: tuple[float, ...] = ()
    discrete_time: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(TaskKind):
            raise LongslideError(f"task {self.kind!r} is none of {', '.join(get_args(TaskKind))}")
        for name in ("label", "classes", "times"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def outputs(self) -> int:
        """Numbers that a model gives for each bag: one logit for `binary`, one per class or label, one per threshold
        between classes for `ordinal`, the value, the log-risk, or one logit per time interval."""
        match self.kind:
            case "multiclass" | "multilabel":
                return len(self.classes)
            case "ordinal":
                return len(self.classes) - 1
            case "survival":
                return len(self.times) if self.discrete_time else 1
            case "binary" | "regression":
                return 1
            case _:
                assert_never(self.kind)

    @property
    def positive(self) -> str:
        """The positive class of a binary task."""
        return self.classes[-1]

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON and checkpoints."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Task":
        """The task that `to_dict` wrote."""
        return cls(**content)
