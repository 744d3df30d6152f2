"""Raw outputs of a classifier -> the rows of `predictions.csv`, of slides and of patients."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, assert_never

import numpy as np
import pandas as pd
import torch
from scipy.special import expit, logit
from torch import Tensor

from ...data.cohort.bags import Bag
from ...evaluation.calibration import FEWEST_CALIBRATED, Calibration, best_threshold, fit_calibration
from ...models.aggregators.slide_encoder import use_cuda_graphs
from ...models.classifier.classifier import SlideClassifier
from ...models.classifier.selection import class_of
from ...plurals import count
from ...prediction_columns import SEEN, PredictionColumns
from ...task import CLASSIFICATION
from ..seen import seen_word


@dataclass(frozen=True)
class Outputs:
    """What a classifier gives for some bags.

    Attributes:
        raw: `(N, n_outputs)` float32 raw outputs, on the CPU.
        target: The targets, as the task has them.
        index: `(N,)` int64 number of each bag.
    """

    raw: Tensor
    target: Tensor
    index: Tensor


def run_classifier(
    classifier: SlideClassifier,
    batches: Iterable[dict[str, Tensor]],
    device: torch.device,
    precision: AbstractContextManager[Any] | None = None,
) -> Outputs:
    """Raw outputs of all bags.

    Args:
        classifier: Moved to the device, in evaluation mode.
        batches: Batches with targets.
        device: Where to run.
        precision: The context to run in, such as autocast.
    """
    classifier.to(device).eval()
    use_cuda_graphs(classifier)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    with torch.inference_mode(), precision or nullcontext():
        for batch in batches:
            moved = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
            parts.append((classifier.outputs_of(moved).float(), batch["target"], batch["index"]))
    classifier.cpu()
    raw, target, index = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    return Outputs(raw, target, index)


def calibrate(
    classifier: SlideClassifier,
    validation: Outputs,
    validated: np.ndarray,
    pooled: Outputs,
    patients: int,
    thresholds: dict[str, float],
) -> str:
    """Fit thresholds (of survival the median risk) and, where there are enough patients, the calibration on validation bags.

    Thresholds are fitted before temperature and intercept and carried along: no decision about a bag changes. Of fewer than
    `FEWEST_CALIBRATED` validation patients they are those of the loss (`SlideClassifier.loss_thresholds`), which are better
    then (`benchmarks/thresholds.py`).

    Args:
        classifier: The classifier, which keeps them.
        validation: Its outputs for the validation bags, for the thresholds.
        validated: `(N,)` the patient of each of these.
        pooled: Outputs for temperature and intercept: these, or more of models that are trained alike.
        patients: How many patients they are of.
        thresholds: Those of the loss.

    Returns:
        What was done about the probabilities, in a sentence; nothing for tasks without.
    """
    classifier.temperature, classifier.intercept = None, 0.0
    raw = validation.raw.double()
    task, target = classifier.task, validation.target.numpy()
    thresholds = dict(thresholds)
    if task.kind == "survival":
        risk = classifier.predict(raw)["risk"]
        classifier.thresholds = {"risk": float(risk.quantile(0.5))}
    if task.kind == "multilabel":
        probability = classifier.predict(raw)["probability"].numpy()
        for i, name in enumerate(task.classes):
            known = ~np.isnan(target[:, i])
            if len(np.unique(validated[known])) >= FEWEST_CALIBRATED:
                thresholds[name] = best_threshold(target[known, i] == 1, probability[known, i])
        classifier.thresholds = thresholds
    if task.kind not in CLASSIFICATION:
        return ""
    if task.kind == "binary" and len(np.unique(validated)) >= FEWEST_CALIBRATED:
        positive = classifier.predict(raw)["probability"].numpy()[:, 1]
        thresholds = {task.classes[1]: best_threshold(target == 1, positive)}

    def probability_by(calibration: Calibration) -> np.ndarray:
        return np.asarray(classifier.objective.predict(pooled.raw.double(), *calibration)["probability"].numpy())

    found = fit_calibration(probability_by, pooled.target.numpy(), patients, intercept=task.kind == "binary")
    temperature, intercept = found or Calibration(1.0)
    if found is not None:
        classifier.temperature, classifier.intercept = found
    if task.kind == "binary":
        classifier.thresholds = {
            name: float(expit(logit(threshold) / temperature + intercept)) for name, threshold in thresholds.items()
        }
    if found is None:
        return f"none: {count(patients, 'validation patient')}, fewer than {FEWEST_CALIBRATED}"
    shift = f" and intercept {intercept:+.2f}" if intercept else ""
    return f"temperature {temperature:.2f}{shift} from {count(patients, 'validation patient')}"


def prediction_rows(
    classifier: SlideClassifier,
    outputs: Outputs,
    bags: Sequence[Bag],
    *,
    fold: int,
    part: str,
    seen: Callable[[str, str], bool | None],
    of_patients: bool = True,
) -> pd.DataFrame:
    """Rows of `predictions.csv`.

    A bag of one slide gives a row of level `slide`. Rows of level `patient` are the means of a patient's bags.

    Args:
        classifier: The calibrated classifier.
        outputs: Its outputs.
        bags: The bags that they are numbered by.
        fold: The fold.
        part: `val` or `test`.
        seen: Whether a patient and slide were in the training or validation part; the slide is empty for a patient.
        of_patients: Whether there are rows of level `patient`: not where slides of one patient have different targets.
    """
    task = classifier.task
    columns = PredictionColumns(task)
    of_rows = [bags[i] for i in outputs.index.tolist()]
    target = _targets(columns, np.stack([np.asarray(bag.target) for bag in of_rows]))
    predicted = {name: value.double().numpy() for name, value in classifier.predict(outputs.raw.double()).items()}
    values = pd.DataFrame(_scores(columns, predicted), columns=columns.score)
    table = pd.DataFrame({"fold": fold, "part": part, "patient_id": [bag.patient_id for bag in of_rows]})
    table = pd.concat([table, target, values], axis="columns")
    patients = table.groupby("patient_id", sort=False)
    levels = []
    if all(len(bag.slide_ids) == 1 for bag in of_rows):
        levels.append(table.assign(level="slide", slide_id=[bag.slide_ids[0] for bag in of_rows]))
    if of_patients:
        means = patients[list(values)].mean()
        firsts = patients[["fold", "part", *target]].first()
        levels.append(firsts.join(means).reset_index().assign(level="patient", slide_id=""))
    rows = pd.concat(levels, ignore_index=True)
    rows = _decide(columns, rows, classifier.thresholds)
    marks = [seen(patient, slide) for patient, slide in zip(rows["patient_id"], rows["slide_id"], strict=True)]
    return columns.arrange(rows.assign(classifiers=1, **{SEEN: list(map(seen_word, marks))}))


def _targets(columns: PredictionColumns, target: np.ndarray) -> pd.DataFrame:
    """As the table has them: class names, and numbers with all their digits."""
    task = columns.task
    if task.kind in CLASSIFICATION:
        return pd.DataFrame({columns.target[0]: [task.classes[int(i)] for i in target]})
    frame = pd.DataFrame(target.reshape(len(target), -1), columns=columns.target)
    return frame.astype({columns.target[1]: int}) if task.kind == "survival" else frame


def _scores(columns: PredictionColumns, predictions: dict[str, np.ndarray]) -> np.ndarray:
    """What is averaged over the bags of a patient, `(n, columns)`."""
    match columns.task.kind:
        case "binary" | "multiclass" | "multilabel" | "ordinal":
            return predictions["probability"]
        case "regression":
            return predictions["value"][:, None]
        case "survival":
            return np.concatenate([predictions["risk"][:, None], predictions["survival"]], axis=1)
        case _:
            assert_never(columns.task.kind)


def _decide(columns: PredictionColumns, rows: pd.DataFrame, thresholds: dict[str, float] | None) -> pd.DataFrame:
    """Add what the probabilities come to."""
    task = columns.task
    if not columns.decision:
        return rows
    probability = torch.from_numpy(rows[columns.score].to_numpy(np.float64, copy=True))
    decided = class_of(task, probability, thresholds).numpy()
    if task.kind == "multilabel":
        rows[columns.target] = rows[columns.target].astype("Int64")  # 0, 1 or empty, where they were 0.0, 1.0 or NaN
        return pd.concat([rows, pd.DataFrame(decided, columns=columns.decision)], axis="columns")
    return rows.assign(**{columns.decision[0]: [task.classes[i] for i in decided]})
