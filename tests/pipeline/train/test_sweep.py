"""`longslide sweep`: a grid nested in a cross-validation, whose choice of a fold knows nothing of its test patients."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from commands import Command, longslide
from longslide import DataOptions, LongslideError, sweep
from longslide.data.cohort.datamodule import BagDataModule
from longslide.pipeline.cli import main
from longslide.pipeline.train.grid import read_grid
from longslide.pipeline.train.sweep import choose
from training_cohort import quick, write_cohort


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Feature files, and a table with splits into two folds."""
    folder = tmp_path_factory.mktemp("cohort")
    write_cohort(folder, 48, slides_a_patient=2)
    table = pd.read_csv(folder / "cohort.csv")
    number = table["patient_id"].factorize()[0]
    for fold in range(2):
        table[f"fold_{fold}"] = np.where(number % 2 == fold, "test", np.where(number % 8 < 2, "val", "train"))
    table.to_csv(folder / "cohort.csv", index=False)
    return folder


GRID = ["--grid.model.optimiser.learning-rate", "1e-2,1e-5", "--grid.model.class-weights", "none,balanced"]


def words(cohort: Path, run: Path, *more: str) -> list[str]:
    return [
        *("sweep", "--config", "mean", "--data.task", "binary", "--data.workers", "0", "--inner-folds", "2"),
        *("--data.table", f"{cohort}/cohort.csv", "--data.features", f"{cohort}/features"),
        *("--model.aggregator.width", "8", "--epochs", "2", "--min-steps", "4", *quick(run, *more)),
    ]


@pytest.fixture(scope="module")
def finished(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("sweep") / "run"
    assert main(words(cohort, run, *GRID)) == 0
    return run


def test_a_fold_chooses_the_highest_mean_then_the_lowest_loss_then_the_first() -> None:
    rows = [
        # trial, fold, inner_fold, val_metric, val_loss
        (0, 0, 0, 0.9, 0.5), (0, 0, 1, 0.5, 0.5),
        (1, 0, 0, 0.8, 0.5), (1, 0, 1, 0.8, 0.5),
        (0, 1, 0, 0.7, 0.4), (0, 1, 1, 0.7, 0.4),
        (1, 1, 0, 0.6, 0.1), (1, 1, 1, 0.8, 0.1),
        (0, 2, 0, 0.7, 0.4), (1, 2, 0, 0.7, 0.4),
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=["trial", "fold", "inner_fold", "val_metric", "val_loss"])
    assert choose(table) == [1, 1, 0]


def test_inner_folds_divide_the_patients_that_are_not_tested(cohort: Path) -> None:
    options = DataOptions(cohort / "features", cohort / "cohort.csv", "binary", workers=0)
    data = BagDataModule(options, inner_folds=3)
    for fold in range(2):
        test = data.splits[f"fold_{fold}"] == "test"
        inner = data.inner_splits(fold)
        assert (inner.loc[test, ["fold_0", "fold_1", "fold_2"]] == "").all(axis=None)
        rest = inner[~test]
        assert ((rest[["fold_0", "fold_1", "fold_2"]] == "val").sum(axis=1) == 1).all()
        for column in ("fold_0", "fold_1", "fold_2"):
            assert (rest.groupby("patient_id")[column].nunique() == 1).all()
        assert not data.with_fold(fold, 1).bags("test")


def test_a_sweep_is_a_cross_validation_whose_folds_have_chosen(finished: Path, cohort: Path) -> None:
    trials = pd.read_csv(finished / "trials.csv")
    assert len(trials) == 4 * 2 * 2
    assert set(trials["model.optimiser.learning_rate"]) == {1e-2, 1e-5}
    facts = json.loads((finished / "run.json").read_text())
    assert [one["trial"] for one in facts["chosen"]] == choose(trials)
    predictions = pd.read_csv(finished / "predictions.csv")
    test = predictions[(predictions["part"] == "test") & (predictions["level"] == "patient")]
    assert sorted(test["patient_id"]) == sorted({f"p{i}" for i in range(24)})
    metrics = pd.read_csv(finished / "metrics.csv")
    assert np.isfinite(metrics.query("scope == 'mean' and level == 'patient' and metric == 'auroc'")["low"]).all()
    history = pd.read_csv(finished / "history.csv")
    for one in facts["chosen"]:
        highest = history.loc[history["fold"] == one["fold"], "learning_rate"].max()
        assert (highest > 1e-4) == (one["model.optimiser.learning_rate"] == "0.01"), "it trained with what it chose"
    page = (finished / "report.html").read_text()
    assert "Selection" in page
    assert "model.optimiser.learning_rate" in page
    methods = (finished / "methods.txt").read_text()
    assert "Of 4 combinations of model.optimiser.learning_rate, model.class_weights, each fold chose one" in methods
    assert "The highest learning rate was" not in methods or len({one["trial"] for one in facts["chosen"]}) == 1
    assert not list((finished / "trials").rglob("*.ckpt")), "a grid over large models would fill the disk"


def test_the_labels_of_test_patients_change_nothing_that_their_fold_chooses_by(
    finished: Path, cohort: Path, tmp_path: Path
) -> None:
    table = pd.read_csv(cohort / "cohort.csv")
    tested = table["fold_0"] == "test"
    other = table["label"].map({"negative": "positive", "positive": "negative"})
    table.loc[tested, "label"] = other[tested]
    (tmp_path / "features").symlink_to(cohort / "features")
    table.to_csv(tmp_path / "cohort.csv", index=False)
    assert main(words(tmp_path, tmp_path / "run", *GRID)) == 0
    was, now = (pd.read_csv(run / "trials.csv") for run in (finished, tmp_path / "run"))
    pd.testing.assert_frame_equal(now[now["fold"] == 0], was[was["fold"] == 0])
    assert not now[now["fold"] == 1].equals(was[was["fold"] == 1]), "they are training patients there"


def test_without_inner_folds_the_model_of_the_chosen_trial_is_that_of_the_fold(cohort: Path, tmp_path: Path) -> None:
    grid = ["--grid.model.optimiser.learning-rate", "1e-2,1e-5"]
    assert main(words(cohort, tmp_path / "run", *grid, "--inner-folds", "1")) == 0
    chosen = json.loads((tmp_path / "run" / "run.json").read_text())["chosen"]
    for number, rate in enumerate(("1e-2", "1e-5")):
        run = tmp_path / f"cv{number}"
        command = words(cohort, run, "--model.optimiser.learning-rate", rate)
        command = [
            "crossval",
            *command[1 : command.index("--inner-folds")],
            *command[command.index("--inner-folds") + 2 :],
        ]
        assert main(command) == 0
        for one in chosen:
            if one["trial"] == number:
                ours, theirs = (pd.read_csv(folder / "history.csv") for folder in (tmp_path / "run", run))
                pd.testing.assert_frame_equal(
                    ours[ours["fold"] == one["fold"]].reset_index(drop=True),
                    theirs[theirs["fold"] == one["fold"]].reset_index(drop=True),
                )


@pytest.mark.slow
def test_a_sweep_that_was_killed_goes_on_and_ends_as_if_it_had_not_been(
    finished: Path, cohort: Path, tmp_path: Path
) -> None:
    command = words(cohort, tmp_path / "run", *GRID)
    running = Command(command)
    running.wait_for("trial 2, fold 0")
    running.kill()
    running.wait()
    known = pd.read_csv(tmp_path / "run" / "trials.csv")
    assert 0 < len(known) < 16
    done = longslide(*command)
    assert done.returncode == 0, done.stderr
    assert "trial 0, fold 0" not in done.stderr, "what was trained is not trained again"
    for name in ("trials.csv", "predictions.csv", "metrics.csv"):
        ours, theirs = (pd.read_csv(folder / name) for folder in (tmp_path / "run", finished))
        pd.testing.assert_frame_equal(ours, theirs)


@pytest.mark.slow
def test_a_sweep_on_two_devices_and_on_a_ray_cluster_is_that_of_one_process(cohort: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs ray: pip install 'longslide[cluster]'")
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1, **small)
        grid = ["--grid.model.optimiser.learning-rate", "1e-2,1e-5"]
        for name, place in {"one": [], "two": ["--devices", "cpu,cpu"], "ray": ["--ray", cluster.address]}.items():
            command = words(cohort, tmp_path / name, *grid, *place)
            if place:
                at = command.index("--trainer.accelerator")
                del command[at : at + 2]
            done = longslide(*command)
            assert done.returncode == 0, done.stderr
            for file in ("trials.csv", "predictions.csv", "metrics.csv"):
                assert (tmp_path / name / file).read_bytes() == (tmp_path / "one" / file).read_bytes(), (name, file)
    finally:
        cluster.shutdown()


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ([], "no grid: give values to try, such as --grid.model.optimiser.learning-rate 1e-4,3e-4"),
        (["--grid.model.nope", "1,2"], "--grid: model.nope=1: Group 'model' does not accept option 'nope'"),
        (
            ["--grid.model.checkpoint.x", "1,2"],
            "model.checkpoint.x=1: 'checkpoint' is one value, it has no options in it",
        ),
        (["--grid.data.max-tokens.x", "1,2"], "data.max_tokens.x=1: 'max_tokens' is one value"),
        (["--grid.nope", "1,2"], "--grid.nope: a grid may have options of model and trainer, ema, epochs, "),
        (["--grid.data.features", "a,b"], "--grid.data.features: a grid may have options of model and trainer"),
        (["--grid.seed", "1,2"], "--grid.seed: a grid may have options of model and trainer"),
        (["--grid.model.head-dropout", "0,much"], "head_dropout=much: --model.head-dropout cannot be much"),
        (["--grid.model.head-dropout", "0,1.5"], "head_dropout=1.5: --model.head-dropout 1.5 must be at least 0 and"),
        (["--grid.epochs", "0,2"], "epochs=0: --epochs 0 must be at least 1"),
        (["--grid.model.aggregator", "mean,abml"], "aggregator=abml: no aggregator 'abml'"),
        (["--grid.model.aggregator", "mean,linear-probe"], "linear-probe reads slide embeddings, the others tiles"),
        (["--grid.model.aggregator.wdth", "1,2"], "trial 0 (--model.aggregator.wdth 1): "),
        (["--grid.trainer.max-epochs", "many"], "--trainer.max-epochs cannot be many"),
        (["--grid.epochs", "2,2"], "--grid.epochs has the value 2 twice"),
        (["--grid.epochs", "[]"], "--grid.epochs has no values"),
        (["--grid.epochs", "2,3", "--inner-folds", "40"], "the inner folds of fold 0: class "),
        (
            ["--grid.epochs", "2,3", "--inner-folds", "1", "--data.table", "{cohort}/no_val.csv"],
            "fold 0 has no validation part to choose by: take --inner-folds 2 or more",
        ),
        (["--grid.epochs", "2,3", "--folds", "1"], "--folds 1 must be at least 2"),
    ],
)
def test_a_grid_that_cannot_be_is_one_line_before_training(
    grid: list[str], said: str, cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pd.read_csv(cohort / "cohort.csv", dtype=str)
    table.replace({"fold_0": {"val": "train"}, "fold_1": {"val": "train"}}).to_csv(cohort / "no_val.csv", index=False)
    grid = [word.format(cohort=cohort) for word in grid]
    assert main(words(cohort, tmp_path / "run", *grid)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("longslide sweep: ")
    assert said in lines[-1]
    assert not (tmp_path / "run" / "trials").exists()
    assert main(words(cohort, tmp_path / "run", *grid, "--epochs", "0")) == 2, "the folder is still free"
    assert "with other options" not in capsys.readouterr().err


def test_another_grid_in_the_folder_of_a_sweep_is_refused(
    finished: Path, cohort: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(cohort, finished, "--grid.model.optimiser.learning-rate", "1e-2,1e-4", *GRID[2:])) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert (
        "holds a run that finished, with other options (--grid.model.optimiser.learning-rate was [0.01, 1e-05]" in line
    )


def test_without_ray_one_line_says_what_to_install(cohort: Path, tmp_path: Path) -> None:
    (tmp_path / "ray.py").write_text("raise ModuleNotFoundError('No module named ray', name='ray')")
    command = words(cohort, tmp_path / "run", "--grid.epochs", "2,3", "--ray", "auto")
    del command[command.index("--trainer.accelerator") : command.index("--trainer.accelerator") + 2]
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    ended = longslide(*command, env=os.environ | {"PYTHONPATH": paths})
    assert ended.returncode == 2
    last = ended.stderr.strip().splitlines()[-1]
    assert last == "longslide sweep: --ray needs the package ray: pip install 'longslide[cluster]'"


def test_a_grid_is_the_same_nested_or_with_dots() -> None:
    nested: dict[str, Any] = {"model": {"optimiser": {"learning_rate": [1e-4, 3e-4]}}, "epochs": [1, 2]}
    assert read_grid(nested) == read_grid({"model.optimiser.learning-rate": "1e-4,3e-4", "epochs": "1,2"})


def test_a_grid_stands_in_yaml_with_dots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = {"model.optimiser.learning_rate": [1e-4, 3e-4], "model.aggregator": ["abmil", "transmil"]}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"data": {"features": "f"}, "grid": grid}))
    with pytest.raises(SystemExit, match="0"):
        main(["sweep", "--config", str(tmp_path / "sweep.yaml"), "--print-config"])
    assert yaml.safe_load(capsys.readouterr().out)["grid"] == grid


def test_in_python_a_grid_is_a_mapping(cohort: Path, tmp_path: Path) -> None:
    data = DataOptions(cohort / "features", cohort / "cohort.csv", "binary", workers=0)
    with pytest.raises(LongslideError, match=r"--grid\.model\.optimiser\.learning-rate has the value 0.01 twice"):
        sweep(data, grid={"model.optimiser.learning_rate": [1e-2, 0.01]}, run=tmp_path / "run")
