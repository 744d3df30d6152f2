"""What the best model of a fold gives for the patients that it was not trained on, calibrated on validation patients."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd
import torch

from ...data.cohort.datamodule import BagDataModule
from ...data.cohort.splits import Part
from ...models.checkpoint_file import read_checkpoint
from ...models.classifier.checkpoint import load_classifier
from ...models.classifier.classifier import SlideClassifier
from ...models.classifier.objective import Cox
from .checkpoint_io import WholeFileCheckpoints
from .prediction_table import Outputs, calibrate, prediction_rows, run_classifier
from .run import TrainingRun
from .training import Training


@dataclass(frozen=True)
class HeldOut:
    """The outputs of the best model of a fold for its validation and test part.

    Attributes:
        checkpoint: The model.
        data: The data of the fold.
        outputs: Of each part that is not empty.
    """

    checkpoint: Path
    data: BagDataModule
    outputs: dict[Part, Outputs]

    @classmethod
    def of(cls, training: Training) -> Self:
        """What the best model of a training gives."""
        return cls(training.folder / "best.ckpt", training.data, run_best_model(training))

    def patients(self, part: Part) -> np.ndarray:
        """`(N,)` the patient of each output of a part."""
        bags = self.data.bags(part)
        return np.array([bags[i].patient_id for i in self.outputs[part].index.tolist()], object)


def run_best_model(training: Training) -> dict[Part, Outputs]:
    """Run the best model on its validation and test part; Cox's baseline hazard, of the training part, goes into it."""
    best = training.folder / "best.ckpt"
    classifier = load_classifier(best)
    data = training.data.with_fold(training.data.fold)  # without the trainer: all bags, on this device
    device = training.trainer.strategy.root_device

    def outputs_of(part: Part) -> Outputs:
        precision = training.trainer.precision_plugin.forward_context()
        return run_classifier(classifier, data.in_order(part, device), device, precision)

    if isinstance(classifier.objective, Cox):
        fitted = outputs_of("train")
        classifier.objective.fit_baseline(fitted.raw.double(), fitted.target)
        store_calibration(best, classifier)
    parts: tuple[Part, ...] = ("val", "test")
    return {part: outputs_of(part) for part in parts if data.bags(part)}


def predict_held_out(fold: HeldOut, folds: Sequence[HeldOut], record: TrainingRun | None = None) -> list[pd.DataFrame]:
    """Calibrate the model of a fold, and make the rows of `predictions.csv` of its validation and test part.

    Thresholds are of the fold's own validation part if it is large enough, else of the loss; temperature and intercept, of
    which a small part tells little, of the validation parts of all folds, without the patients that this fold tests
    (`benchmarks/crossval_calibration.py`). They go into the checkpoint, and what was done into `run.json`.

    Args:
        fold: The fold.
        folds: All folds that are trained, this one too.
        record: The run.
    """
    classifier, number = load_classifier(fold.checkpoint), fold.data.fold
    weights = fold.data.class_weights
    thresholds = {} if weights is None else classifier.loss_thresholds(weights.tolist())
    if "val" in fold.outputs:
        pooled, patients = _untested(fold, folds)
        calibrated = calibrate(classifier, fold.outputs["val"], fold.patients("val"), pooled, patients, thresholds)
        if calibrated and record is not None:
            others = f" of all folds that fold {number} does not test" if len(folds) > 1 else ""
            record.facts.setdefault("calibration", {})[f"fold {number}"] = calibrated + others
    else:
        classifier.thresholds = thresholds or None
    store_calibration(fold.checkpoint, classifier)
    mixed = set(fold.data.cohort.mixed_patients)
    # In all folds or in none: a mean over folds must not lose the patients of one.
    of_patients = not any(mixed.intersection(one.patients(part)) for one in folds for part in one.outputs)
    return [
        prediction_rows(
            classifier,
            outputs,
            fold.data.bags(part),
            fold=number,
            part=part,
            seen=_yes if part == "val" else _no,
            of_patients=of_patients,
        )
        for part, outputs in fold.outputs.items()
    ]


def _untested(fold: HeldOut, folds: Sequence[HeldOut]) -> tuple[Outputs, int]:
    """The validation outputs of all folds, without the patients that this one tests; and how many patients they are of."""
    tested = set(fold.patients("test")) if "test" in fold.outputs else set()
    kept, patients = [], set()
    for one in folds:
        if "val" in one.outputs:
            of_row = one.patients("val")
            rows = torch.tensor([patient not in tested for patient in of_row])
            validation = one.outputs["val"]
            kept.append((validation.raw[rows], validation.target[rows], validation.index[rows]))
            patients |= set(of_row) - tested
    return Outputs(*(torch.cat(column) for column in zip(*kept, strict=True))), len(patients)


def _yes(patient_id: str, slide_id: str) -> bool:
    """The validation part has selected and calibrated the model."""
    return True


def _no(patient_id: str, slide_id: str) -> bool:
    """The test part shares no patient, image or features with the others, or the splits were refused."""
    return False


def store_calibration(path: Path, classifier: SlideClassifier) -> None:
    """Put temperature, intercept, thresholds and baseline hazard into a checkpoint, whole or not at all."""
    content = read_checkpoint(path)
    fitted = ("temperature", "intercept", "thresholds")
    content["longslide"] |= {name: getattr(classifier, name) for name in fitted}
    content["state_dict"] |= {f"objective.{name}": value for name, value in classifier.objective.state_dict().items()}
    WholeFileCheckpoints().save_checkpoint(content, path)
