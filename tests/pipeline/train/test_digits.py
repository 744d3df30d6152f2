"""The small version of benchmarks/digits.py: models find what there is to find, and nothing where there is nothing."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EPOCHS = {"contains": "5", "arrangement": "4", "permuted": "3"}


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    path = Path(__file__).parents[3] / "benchmarks" / "digits.py"
    spec = importlib.util.spec_from_file_location("digits", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bags(digits: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    digits.write_bags(folder / "contains", "contains", 280, tiles=(8, 12), nines=0.4)
    digits.write_bags(folder / "arrangement", "arrangement", 160, tiles=(16, 64))
    digits.write_bags(folder / "permuted", "permuted", 160, tiles=(8, 16))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("question", "model", "least", "most"),
    [
        ("contains", "abmil", 0.95, 1.0),
        ("contains", "longnet", 0.95, 1.0),
        ("arrangement", "longnet", 0.9, 1.0),
        ("arrangement", "abmil", 0.0, 0.7),
        ("arrangement", "mean", 0.0, 0.7),
        ("permuted", "abmil", 0.0, 0.7),
        ("permuted", "longnet", 0.0, 0.7),
    ],
)
def test_bags_of_digits(
    question: str, model: str, least: float, most: float, digits: ModuleType, bags: Path, tmp_path: Path
) -> None:
    words = ["--model.optimiser.learning_rate", "0.003"]
    words += ["--trainer.max_epochs", EPOCHS[question], "--trainer.accelerator", "cpu"]
    metrics = digits.train(bags / question, model, tmp_path / "run", *words)
    row = metrics[(metrics["metric"] == "auroc") & (metrics["level"] == "patient")].iloc[0]
    assert least <= row["value"] <= most
    if most < 1:
        assert row["low"] < 0.5 < row["high"], "chance must lie within the interval"
