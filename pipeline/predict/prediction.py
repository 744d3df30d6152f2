"""Predictions as users get them: typed, a row of `predictions.csv`, JSON."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...data.table import csv_of, read_table, typed
from ...data.whole_file import write_whole
from ...prediction_columns import SEEN, PredictionColumns, time_text
from ...task import Task
from ..report.wording import probability, significant
from ..seen import seen_word

if TYPE_CHECKING:
    from ...models.classifier.ensemble import EnsemblePrediction

PREDICTIONS = "predictions.csv"


@dataclass(frozen=True)
class Prediction:
    """What was predicted of a slide, or of a patient from all of the patient's slides.

    What the task does not have, and all of it where there is no prediction, is None or empty.

    Attributes:
        level: `slide` or `patient`.
        slide_id: The slide; empty at patient level.
        patient_id: The patient, if the slide table says.
        status: `done`, `failed` or `skipped`.
        reason: Why it failed or was skipped, or a remark.
        predicted: The class.
        labels: The labels of a multilabel task that are predicted to be there.
        probability: Probability of each class or label.
        value: The value of a regression.
        risk: The risk of a survival task, higher for earlier events.
        survival: Probability of surviving each time.
        spread: Standard deviation over the classifiers of an ensemble: of the probability of each class or label, `value` or
            `risk`. Empty with one classifier.
        classifiers: Number of classifiers.
        seen: Whether it was in the training or validation part of a classifier; None where no checkpoint says.
        warnings: What makes the prediction doubtful.
    """

    level: Literal["slide", "patient"]
    slide_id: str
    patient_id: str = ""
    status: Literal["done", "failed", "skipped"] = "done"
    reason: str = ""
    predicted: str | None = None
    labels: tuple[str, ...] = ()
    probability: dict[str, float] | None = None
    value: float | None = None
    risk: float | None = None
    survival: dict[float, float] | None = None
    spread: dict[str, float] | None = None
    classifiers: int = 0
    seen: bool | None = None
    warnings: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether it does not count against the exit status."""
        return self.status != "failed"

    @property
    def numbers(self) -> dict[str, str]:
        """Each predicted number as it is shown, with its spread: by class or label, `value` or `risk`."""
        spread = self.spread or {}
        shown = {name: probability(value, spread.get(name)) for name, value in (self.probability or {}).items()}
        for name, value in (("value", self.value), ("risk", self.risk)):
            if value is not None:
                shown[name] = significant(value, 3) + (f" ± {significant(spread[name], 2)}" if name in spread else "")
        return shown

    @property
    def text(self) -> str:
        """The prediction in a few words."""
        shown = self.numbers
        if self.value is not None:
            return shown["value"]
        if self.risk is not None:
            return f"risk {shown['risk']}"
        if self.predicted is not None:
            return f"{self.predicted} {shown[self.predicted]}"
        return ", ".join(f"{name} {shown[name]}" for name in self.labels) or "no label"

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON; what the task does not have is left out."""
        content = {name: value for name, value in asdict(self).items() if value is not None}
        if self.survival is not None:
            content["survival"] = {time_text(time): value for time, value in self.survival.items()}
        return content

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Prediction":
        """What `to_dict` wrote, after it was JSON."""
        known = {field.name for field in fields(cls)}
        content = {name: value for name, value in content.items() if name in known}
        for name in ("labels", "warnings"):
            content[name] = tuple(content.get(name, ()))
        if content.get("survival") is not None:
            content["survival"] = {float(time): value for time, value in content["survival"].items()}
        return cls(**content)


def with_numbers(prediction: Prediction, task: Task, found: "EnsemblePrediction", classifiers: int) -> Prediction:
    """Fill in what an ensemble of so many classifiers found."""
    mean, spread = found.mean, found.spread
    result = replace(prediction, classifiers=classifiers)
    if "probability" in mean:
        names = task.classes
        assert found.predicted is not None
        result = replace(
            result,
            probability=dict(zip(names, mean["probability"].tolist(), strict=True)),
            spread=dict(zip(names, spread["probability"].tolist(), strict=True)) if spread else {},
        )
        if task.kind == "multilabel":
            there = found.predicted.tolist()
            return replace(result, labels=tuple(name for name, one in zip(names, there, strict=True) if one))
        return replace(result, predicted=names[int(found.predicted)])
    name = "value" if "value" in mean else "risk"
    result = replace(result, spread={name: float(spread[name])} if spread else {})
    if name == "value":
        return replace(result, value=float(mean["value"]))
    # Without a fitted baseline hazard a Cox model knows risks alone.
    known = bool(mean["survival"].isfinite().all())
    curve = dict(zip(task.times, mean["survival"].tolist(), strict=True)) if known else None
    return replace(result, risk=float(mean["risk"]), survival=curve)


def row(prediction: Prediction, task: Task) -> dict[str, Any]:
    """A prediction as a row of `predictions.csv`; `fold`, `part` and the targets are empty: nothing was held out."""
    columns = PredictionColumns(task)
    cells: dict[str, Any] = {
        "level": prediction.level,
        "patient_id": prediction.patient_id,
        "slide_id": prediction.slide_id,
        "classifiers": prediction.classifiers,
        SEEN: seen_word(prediction.seen),
        "warnings": "; ".join(prediction.warnings),
    }
    spread = prediction.spread or {}
    decisions: list[Any] = []
    if task.kind == "regression":
        scores, spreads = [prediction.value], [spread.get("value")]
    elif task.kind == "survival":
        curve = prediction.survival or {}
        scores, spreads = [prediction.risk, *map(curve.get, task.times)], [spread.get("risk")]
    else:
        of_class = prediction.probability or {}
        scores, spreads = [*map(of_class.get, task.classes)], [*map(spread.get, task.classes)]
        several = [int(name in prediction.labels) for name in task.classes]
        decisions = several if task.kind == "multilabel" else [prediction.predicted]
    for names, values in ((columns.decision, decisions), (columns.score, scores), (columns.spread, spreads)):
        cells |= dict(zip(names, values, strict=True))
    return cells


def write_predictions(output: Path, task: Task, predictions: Iterable[Prediction]) -> None:
    """Write `predictions.csv`, replacing it: slides first, then patients, each by name.

    Raises:
        LongslideError: It cannot be written.
    """
    ordered = sorted(predictions, key=lambda one: (one.level != "slide", one.slide_id, one.patient_id))
    write_whole(output / PREDICTIONS, csv_of(PredictionColumns(task).all, (row(one, task) for one in ordered)))


def read_predictions(path: Path, task: Task) -> list[Prediction]:
    """What `write_predictions` wrote, even if a spreadsheet has saved it since; none if there is no such file.

    Raises:
        LongslideError: It cannot be read.
    """
    if not path.is_file():
        return []
    columns = PredictionColumns(task)
    frame = columns.arrange(typed(read_table(path, {""}), columns.text))
    return [of_row(cells, task) for cells in frame.astype(object).where(frame.notna(), None).to_dict("records")]


def of_row(cells: Mapping[Any, Any], task: Task) -> Prediction:
    """The prediction that is in a row of `predictions.csv`, by the names of `PredictionColumns`; None for an empty cell."""
    columns = PredictionColumns(task)
    decision, score, spread = (
        [cells[name] for name in names] for names in (columns.decision, columns.score, columns.spread)
    )
    result = Prediction(
        cells["level"],
        cells["slide_id"] or "",
        cells["patient_id"] or "",
        classifiers=int(cells["classifiers"] or 0),
        seen={"yes": True, "no": False}.get(cells[SEEN]),
        warnings=tuple((cells["warnings"] or "").split("; ")) if cells["warnings"] else (),
    )
    names = task.classes or ("value" if task.kind == "regression" else "risk",)
    spreads = {name: float(value) for name, value in zip(names, spread, strict=True) if value is not None}
    if task.kind == "regression":
        return replace(result, value=score[0], spread=spreads)
    if task.kind == "survival":
        curve = {time: value for time, value in zip(task.times, score[1:], strict=True) if value is not None}
        return replace(result, risk=score[0], survival=curve or None, spread=spreads)
    result = replace(result, probability=dict(zip(names, map(float, score), strict=True)), spread=spreads)
    if task.kind == "multilabel":
        return replace(result, labels=tuple(name for name, one in zip(names, decision, strict=True) if one))
    return replace(result, predicted=decision[0])
