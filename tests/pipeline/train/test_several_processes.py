"""Training by several processes."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from commands import longslide
from training_cohort import write_cohort


def trained(words: list[str], devices: str) -> subprocess.CompletedProcess[str]:
    if devices == "1":
        done = longslide(*words)
    else:  # Lightning starts the second process as the first was started
        done = subprocess.run([sys.executable, "-m", "longslide", *words], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_two_processes_that_share_each_slide_train_as_one(tmp_path: Path) -> None:
    cohort = write_cohort(tmp_path, 30)
    words = ["fit", "--data.task", "binary", "--data.label", "label", *cohort, "--model.aggregator", "longnet"]
    small = {"layers": 2, "width": 32, "heads": 4, "ffn_width": 32, "dropout": 0, "drop_path": 0}
    words += [word for name, value in small.items() for word in (f"--model.aggregator.{name}", str(value))]
    words += ["--trainer.max_epochs", "3", "--data.max_tokens", "60", "--trainer.enable_progress_bar", "false"]
    shared = "{class_path: longslide.SequenceParallelStrategy, init_args: {sequence_parallel_size: 2}}"
    tables = []
    for devices, more in (("1", []), ("2", ["--trainer.strategy", shared])):
        run = tmp_path / f"run{devices}"
        command = [*words, "--trainer.accelerator", "cpu", "--run", str(run)]
        command += ["--trainer.devices", devices, *more]
        trained(command, devices)
        tables.append((pd.read_csv(run / "history.csv"), pd.read_csv(run / "predictions.csv")))
    (one, its_predictions), (two, predictions) = tables
    pd.testing.assert_frame_equal(two, one, rtol=1e-3)
    pd.testing.assert_frame_equal(predictions, its_predictions, rtol=1e-3)


@pytest.mark.slow
def test_two_processes_give_the_rows_and_nearly_the_numbers_of_one(tmp_path: Path) -> None:
    write_cohort(tmp_path, 120)
    words = ["fit", "--config", "mean", "--data.task", "binary", "--data.label", "label", "--data.workers", "0"]
    words += ["--data.table", f"{tmp_path}/cohort.csv", "--data.features", f"{tmp_path}/features", "--epochs", "3"]
    words += ["--min-steps", "30", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    tables = []
    for devices in ("1", "2"):  # two communicate by gloo
        run = tmp_path / f"run{devices}"
        command = [*words, "--trainer.devices", devices, "--run", str(run)]
        done = trained(command, devices)
        assert "sync_dist" not in done.stderr
        tables.append(
            (pd.read_csv(run / "predictions.csv"), pd.read_csv(run / "metrics.csv"), pd.read_csv(run / "history.csv"))
        )
    (one, its_metrics, its_history), (two, metrics, history) = tables
    identity = ["level", "part", "patient_id", "slide_id", "target"]
    pd.testing.assert_frame_equal(one[identity], two[identity])
    assert not two.duplicated(["level", "patient_id", "slide_id"]).any()
    assert (one["probability_positive"] - two["probability_positive"]).abs().max() < 0.05, "dropout draws other values"
    columns = ["scope", "level", "metric", "n"]
    pd.testing.assert_frame_equal(its_metrics[columns], metrics[columns])
    assert history["step"].tolist() == its_history["step"].tolist()
