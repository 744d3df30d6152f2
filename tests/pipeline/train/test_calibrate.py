"""What calibration on the validation part does to the predictions of other patients."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from longslide.evaluation.classification import Classes
from longslide.models.aggregators.registry import AggregatorChoice
from longslide.models.classifier.classifier import SlideClassifier, TrainingFacts
from longslide.models.classifier.options import ClassifierOptions
from longslide.pipeline.cli import main
from longslide.pipeline.train.prediction_table import Outputs, calibrate
from longslide.task import Task
from training_cohort import quick, write_cohort

TASKS = {
    "binary": Task("binary", ("y",), ("no", "yes")),
    "multiclass": Task("multiclass", ("y",), ("a", "b", "c")),
    "ordinal": Task("ordinal", ("y",), ("low", "medium", "high")),
}


def draw(kind: str, n: int, seed: int, sharpness: float) -> Outputs:
    """Raw outputs of a model that is `sharpness` times too sure, and the true classes."""
    random = np.random.default_rng(seed)
    latent = random.normal(size=n)
    seen = latent + 0.7 * random.normal(size=n)
    if kind == "binary":
        target, raw = latent > 0.8, 2 * (seen[:, None] - 0.8)
    elif kind == "ordinal":
        target, raw = np.digitize(latent, [-0.5, 0.5]), 2 * (seen[:, None] - [-0.5, 0.5])
    else:
        target, raw = np.digitize(latent, [-0.5, 0.5]), -2 * np.abs(seen[:, None] - [-1.0, 0.0, 1.0])
    return Outputs(torch.tensor(sharpness * raw).float(), torch.tensor(target.astype(np.int64)), torch.arange(n))


@pytest.mark.parametrize("patients", [3, 10, 20, 49, 60])
@pytest.mark.parametrize("sharpness", [0.3, 1.0, 30.0])
@pytest.mark.parametrize("kind", sorted(TASKS))
def test_calibration_changes_no_decision_costs_no_rank_and_no_log_loss(
    kind: str, sharpness: float, patients: int
) -> None:
    """On 3 to 20 patients it once went to 0.05 or 20: log-loss 0.285 to 1.386, AUROC down by 0.023 (ties in float32),
    quadratic kappa 0.526 to 0.000 (every patient in the middle class)."""
    task = TASKS[kind]
    choice = AggregatorChoice("mean", {"width": 4})
    classifier = SlideClassifier(TrainingFacts(task, 3), ClassifierOptions(choice)).eval()
    validation, others = draw(kind, patients, 1, sharpness), draw(kind, 2000, 2, sharpness)

    def outcomes() -> Classes:
        predicted = {name: value.numpy() for name, value in classifier.predict(others.raw.double()).items()}
        assert predicted["probability"].dtype == np.float64
        target = others.target.numpy()
        return Classes(target, predicted["prediction"], predicted["probability"], task.classes, kind == "ordinal")

    settled = {"yes": 0.4} if kind == "binary" else {}
    said = calibrate(classifier, validation, np.arange(patients), validation, patients, settled)
    after = outcomes()
    threshold = dict(classifier.thresholds or {})
    if patients < 50:
        assert classifier.temperature is None
        assert said == f"none: {patients} validation patients, fewer than 50"
        assert threshold == pytest.approx(settled), "not the best one of so few"
        return
    assert 0.5 <= classifier.temperature <= 5
    assert said.startswith(f"temperature {classifier.temperature:.2f}")
    assert said.endswith("from 60 validation patients")
    if kind == "binary":  # the threshold as it is without the calibration
        log_odds = np.log(threshold["yes"] / (1 - threshold["yes"]))
        log_odds = (log_odds - classifier.intercept) * classifier.temperature
        classifier.thresholds = {"yes": float(1 / (1 + np.exp(-log_odds)))}
    classifier.temperature, classifier.intercept = None, 0.0
    before = outcomes()
    assert (after.prediction == before.prediction).all()
    for name in ("auroc", "quadratic_kappa", "balanced_accuracy"):
        if name in before.scores():
            tolerance = 1e-12 if len(task.classes) == 2 or name != "auroc" else 0.02  # of three, ranks are of ratios
            assert after.scores()[name].value >= before.scores()[name].value - tolerance
    assert after.scores()["log_loss"].value < before.scores()["log_loss"].value + 0.03


@pytest.mark.slow
def test_a_fold_is_calibrated_on_the_validation_patients_of_all_folds_that_it_does_not_test(tmp_path: Path) -> None:
    write_cohort(tmp_path, 150)
    words = [
        "--config",
        "mean",
        "--data.task",
        "binary",
        "--data.label",
        "label",
        "--data.workers",
        "0",
        "--folds",
        "3",
    ]
    words += ["--data.table", f"{tmp_path}/cohort.csv", "--data.features", f"{tmp_path}/features", "--epochs", "2"]
    words += ["--min-steps", "20", "--data.val-share", "0.3"]
    assert main(["crossval", *words, *quick(tmp_path / "run")]) == 0
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    splits = pd.read_csv(tmp_path / "run" / "splits.csv", dtype=str)
    for fold in range(3):
        validated = splits.loc[(splits[["fold_0", "fold_1", "fold_2"]] == "val").any(axis=1), "patient_id"]
        tested = splits.loc[splits[f"fold_{fold}"] == "test", "patient_id"]
        n = len(set(validated) - set(tested))
        said = facts["calibration"][f"fold {fold}"]
        assert said.endswith(f" from {n} validation patients of all folds that fold {fold} does not test")
        stored = torch.load(tmp_path / "run" / f"fold_{fold}" / "best.ckpt", weights_only=True)["longslide"]
        assert said.startswith(f"temperature {stored['temperature']:.2f}")
        own = set(splits.loc[splits[f"fold_{fold}"] == "val", "patient_id"])
        assert 50 <= n > len(own), "more than the fold's own"
