"""How long a fold is trained: in steps that see so many bags, whatever the aggregator and the tiles."""

from pathlib import Path

import pandas as pd
import pytest
import yaml
from longslide.pipeline.cli import main
from training_cohort import quick, write_cohort


def steps_of(run: Path) -> dict[str, int]:
    [steps] = yaml.safe_load((run / "run.json").read_text())["steps"]
    return dict(steps)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("cohort")
    return write_cohort(folder, 40)


@pytest.mark.parametrize("aggregator", ["abmil", "longnet", "mean"])
def test_switching_the_aggregator_changes_neither_bags_nor_steps(
    aggregator: str, cohort: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = ["fit", "--config", "binary", *cohort, *quick(run), "--epochs", "2", "--min-steps", "20"]
    words += ["--model.aggregator", aggregator]
    assert main(words) == 0
    steps = steps_of(run)
    assert (steps["bags"], steps["batches"], steps["accumulate"], steps["steps_per_epoch"]) == (27, 4, 1, 4)
    assert steps["epochs"] == 5
    history = pd.read_csv(run / "history.csv")
    assert history["step"].tolist() == [4, 8, 12, 16, 20]
    said = capsys.readouterr().err
    assert "27 training bags, 4 steps per epoch of 6.75 bags each, at most 5 epochs (20 steps)" in said
    assert "only 4 optimiser steps per epoch" in said


def test_a_step_sees_its_bags_where_memory_holds_a_few_at_a_time(cohort: list[str], tmp_path: Path) -> None:
    """The same bags per step in one batch of 8 or in batches of a few, whose gradients are added up."""
    words = ["fit", "--config", "abmil", "--data.task", "binary", *cohort, "--trainer.max_epochs", "1"]
    assert main([*words, *quick(tmp_path / "few"), "--data.max-tokens", "30"]) == 0
    steps = steps_of(tmp_path / "few")
    assert steps["batches"] > 10
    assert steps["accumulate"] > 2
    assert steps["steps_per_epoch"] in (3, 4, 5)


def test_training_does_not_stop_before_its_least_steps(cohort: list[str], tmp_path: Path) -> None:
    words = ["fit", "--config", "mean", "--data.task", "binary", *cohort, *quick(tmp_path / "run")]
    words += ["--patience", "1", "--epochs", "3", "--min-steps", "40", "--model.optimiser.learning-rate", "1e-9"]
    assert main(words) == 0
    assert pd.read_csv(tmp_path / "run" / "history.csv")["step"].iloc[-1] >= 40


def test_batches_to_accumulate_follow_from_the_bags_of_a_step(
    cohort: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["fit", "--config", "mean", "--data.task", "binary", *cohort, *quick(tmp_path / "run")]
    assert main([*words, "--trainer.accumulate-grad-batches", "4"]) == 2
    assert "set --data.bags-per-step" in capsys.readouterr().err


def test_a_first_epoch_that_is_the_best_is_remarked(
    cohort: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["fit", "--config", "mean", "--data.task", "binary", *cohort, *quick(tmp_path / "run")]
    words += ["--trainer.max_epochs", "3", "--monitor", "val_loss", "--model.optimiser.learning-rate", "30"]
    assert main([*words, "--model.optimiser.warmup", "0"]) == 0
    remark = "the best epoch is the first: training did not improve on the validation part"
    assert remark in capsys.readouterr().err
    assert any(remark in note for note in yaml.safe_load((tmp_path / "run" / "run.json").read_text())["notes"])
