"""A leak detector: nothing that is kept of a training run depends on the labels or features of the test part."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from longslide.data.features.feature_file import read_features, write_features
from longslide.pipeline.cli import main
from training_cohort import quick, write_cohort

TASKS = {
    "binary": ["--data.label", "label"],
    "multiclass": ["--data.label", "grade"],
    "ordinal": ["--data.label", "grade", "--data.classes", "[low, middle, high]"],
    "multilabel": ["--data.label", "[mutated, metastatic]"],
    "regression": ["--data.label", "score"],
    "survival": ["--data.label", "[months, died]"],
    "discrete": ["--data.label", "[months, died]", "--data.discrete_time", "true"],
}


def replace_test_part_by_noise(folder: Path) -> None:
    """Draw features of the slides whose `split` is test anew, and their labels from the other slides'."""
    random = np.random.default_rng(9)
    table = pd.read_csv(folder / "cohort.csv", dtype=str)
    test = np.flatnonzero(table["split"] == "test")
    for slide in table["slide_id"].iloc[test]:
        path = folder / "features" / f"{slide}.h5"
        features = read_features(path)
        noise = random.normal(5, 9, features.features.shape).astype(np.float32)
        path.unlink()
        write_features(path, dataclasses.replace(features, features=noise))
    labels = ["label", "grade", "mutated", "metastatic", "score", "months", "died"]
    rest = table.loc[table["split"] != "test", labels]
    table.loc[test, labels] = rest.sample(len(test), random_state=9).to_numpy()
    table.loc[test, "months"] = random.uniform(50, 500, len(test)).round(1).astype(str)
    table.loc[test, "score"] = random.uniform(50, 500, len(test)).round(1).astype(str)
    table.to_csv(folder / "cohort.csv", index=False)


def plain(value: Any) -> Any:
    """Tensors as lists, wherever they are."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


@pytest.mark.slow
@pytest.mark.parametrize("kind", TASKS)
def test_noise_in_place_of_the_test_part_changes_nothing_that_is_kept_of_training(kind: str, tmp_path: Path) -> None:
    write_cohort(tmp_path / "real", 90)
    table = pd.read_csv(tmp_path / "real" / "cohort.csv", dtype=str)
    part = np.array(["train"] * 20 + ["val"] * 55 + ["test"] * 15)  # enough validation patients for a temperature
    table["split"] = np.random.default_rng(4).permutation(part)
    table.to_csv(tmp_path / "real" / "cohort.csv", index=False)
    shutil.copytree(tmp_path / "real", tmp_path / "noise")
    replace_test_part_by_noise(tmp_path / "noise")
    words = ["--config", "abmil", "--model.aggregator.width", "16", "--trainer.max_epochs", "3", *TASKS[kind]]
    words += ["--data.task", "survival" if kind == "discrete" else kind, "--data.workers", "0"]
    kept = []
    for name in ("real", "noise"):
        data = ["--data.table", f"{tmp_path}/{name}/cohort.csv", "--data.features", f"{tmp_path}/{name}/features"]
        assert main(["fit", *words, *data, *quick(tmp_path / f"{name}-run")]) == 0
        content = torch.load(tmp_path / f"{name}-run" / "best.ckpt", weights_only=True)
        rows = pd.read_csv(tmp_path / f"{name}-run" / "predictions.csv", dtype=str)
        kept.append((content, rows[rows["part"] == "val"], rows[rows["part"] == "test"]))
    (real, validation, test), (noise, its_validation, its_test) = kept
    assert real["epoch"] == noise["epoch"]
    assert real["state_dict"].keys() == noise["state_dict"].keys()
    for name, value in real["state_dict"].items():
        assert torch.equal(value, noise["state_dict"][name]), name
    facts, others = (dict(one["longslide"]) for one in (real, noise))
    if kind in ("binary", "multiclass", "ordinal"):
        assert facts["temperature"] is not None
    if kind in ("binary", "multilabel"):
        assert facts["thresholds"]
    for one in (facts, others):
        one.pop("cases")  # digests with a salt of each checkpoint's own, and the digests of the test part
    assert plain(facts) == plain(others)
    pd.testing.assert_frame_equal(validation, its_validation)
    assert not test.reset_index(drop=True).equals(its_test.reset_index(drop=True)), "the noise did reach the test part"
