"""Mistakes in what training is asked for: one line, before anything is trained."""

from pathlib import Path

import pandas as pd
import pytest
from longslide.data.cohort.options import DataOptions
from longslide.errors import LongslideError
from longslide.pipeline.cli import main
from longslide.pipeline.train.fit import fit
from training_cohort import BINARY, quick


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data.label", "no_such_column"], "no_such_column"),
        (["--model.aggregator", "longnet", "--model.checkpoint", "nowhere.ckpt"], "nowhere.ckpt: no such checkpoint"),
        (["--model.checkpoint", "some.ckpt"], "abmil has no slide encoder"),
        (["--model.aggregator", "longnet", "--model.aggregator.width", "30"], "width 30 must be a multiple of 4"),
        (["--model.aggregator.dropout", "7"], "dropout probability"),
        (["--model.aggregator.dropout", "much"], 'aggregator abmil: option "dropout": '),
        (
            ["--model.aggregator.wdth", "3"],
            "unexpected keyword argument 'wdth'; its options are width, attention_width",
        ),
        (["--model.aggregator", "mypkg.MyMIL"], "aggregator 'mypkg.MyMIL': no module mypkg"),
        (
            ["--trainer.accumulate_grad_batches", "2"],
            "--trainer.accumulate-grad-batches follows from the bags of a step; set --data.bags-per-step",
        ),
        (["--data.bags_per_step", "0"], "--data.bags-per-step 0 must be at least 1"),
        (["--subgroups", "site"], "there is no column 'site' in the cohort table"),
        (["--trainer.accelerator", "no-such-device"], "--trainer: "),
        (["--model.class_weights", "[1, 2, 3]"], "3 class weights for a binary task with 2 classes"),
    ],
)
def test_a_mistake_is_one_line_before_training(
    words: list[str], said: str, cohort: tuple[Path, list[str]], tmp_path: Path, capsys
) -> None:
    assert main(["fit", *BINARY, *cohort[1], *quick(tmp_path / "run"), *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("longslide fit: ")
    assert said in error


@pytest.mark.parametrize("command", ["fit", "crossval", "pretrain"])
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--trainer.max_epochs", "many"], "--trainer.max-epochs cannot be many"),
        (["--trainer.max-epcohs", "3"], "trainer.max_epcohs"),
        (["--trainer.precision", "17"], "--trainer.precision cannot be 17"),
    ],
)
def test_a_mistyped_option_of_the_trainer_is_one_line_and_status_2(
    command: str, words: list[str], said: str, cohort: tuple[Path, list[str]], tmp_path: Path, capsys
) -> None:
    task = [] if command == "pretrain" else ["--data.task", "binary"]
    with pytest.raises(SystemExit, match="2"):
        main([command, *task, *cohort[1], "--run", str(tmp_path / "run"), *words])
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"longslide {command}: ")
    assert said in line
    assert not (tmp_path / "run").exists()


def test_the_same_in_python_is_a_longslide_error(cohort: tuple[Path, list[str]], tmp_path: Path) -> None:
    data = DataOptions(cohort[0] / "features", cohort[0] / "cohort.csv", "binary", workers=0)
    with pytest.raises(LongslideError, match=r"--trainer\.max-epochs cannot be many"):
        fit(data, run=tmp_path / "run", trainer={"max_epochs": "many"})


def test_after_a_mistake_the_corrected_command_takes_the_same_run_folder(
    cohort: tuple[Path, list[str]], tmp_path: Path
) -> None:
    words = ["fit", *BINARY, *cohort[1], *quick(tmp_path / "run"), "--trainer.max_epochs", "1"]
    assert main([*words, "--data.label", "no_such_column"]) == 2
    assert main(words) == 0


def test_a_validation_part_of_one_class_is_refused_before_training_and_the_advice_works(
    cohort: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pd.read_csv(cohort[0] / "cohort.csv")
    table["site"] = table["label"] + (table["patient_id"].factorize()[0] % 6).astype(str)  # a site has one label
    table.to_csv(tmp_path / "cohort.csv", index=False)
    options = [*BINARY, *cohort[1], "--data.table", f"{tmp_path}/cohort.csv", "--data.keep_sites_apart", "true"]
    words = ["fit", *options, *quick(tmp_path / "run"), "--data.splits", str(tmp_path / "splits.csv")]
    assert main([*words, "--data.val_share", "0.01"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("longslide fit: fold_0: the validation part has only slides of class '")
    assert "by a larger --data.val_share" in line
    assert "--monitor val_loss" in line
    assert not (tmp_path / "run" / "history.csv").exists()
    assert not (tmp_path / "splits.csv").exists(), "splits that were refused would be those of the next run"
    assert main([*words, "--data.val_share", "0.5"]) == 0
    words = ["fit", *options, *quick(tmp_path / "other"), "--data.val_share", "0.01"]
    assert main([*words, "--monitor", "val_loss"]) == 0


def test_every_fold_has_been_looked_at_before_the_first_is_trained(
    cohort: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pd.read_csv(cohort[0] / "cohort.csv")
    positive = table.index[table["label"] == "positive"]
    table["fold_0"] = ["train", "train", "val", "test"] * 10
    table["fold_1"] = "train"
    table.loc[positive[:4], "fold_1"] = "val"
    table.loc[positive[4:6], "fold_1"] = "test"
    table.to_csv(tmp_path / "cohort.csv", index=False)
    words = ["crossval", *BINARY, *cohort[1], "--data.table", f"{tmp_path}/cohort.csv", *quick(tmp_path / "run")]
    assert main(words) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("longslide crossval: fold_1: the validation part has only slides of class 'positive'")
    assert not (tmp_path / "run" / "fold_0").exists()


def test_a_metric_that_few_validation_batches_leave_undefined_ends_the_run_in_one_line(
    cohort: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--data.max_tokens", "1", "--trainer.limit_val_batches", "0.25", "--monitor", "val_metric"]  # one of five
    assert main(["fit", *BINARY, *cohort[1], *quick(tmp_path / "run"), *few]) == 2
    assert "val_metric is not a number: drop --trainer.limit_val_batches" in capsys.readouterr().err.splitlines()[-1]


def test_a_run_folder_that_cannot_be_made_names_its_option(
    cohort: tuple[Path, list[str]], tmp_path: Path, capsys
) -> None:
    (tmp_path / "file").touch()
    assert main(["fit", *BINARY, *cohort[1], *quick(tmp_path / "file" / "run")]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].endswith("choose another --run")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fit"], "--data.features must be given"),
        (["fit", "--config", "no-such-recipe"], "neither a file nor a recipe; recipes are abmil, binary"),
        (["fit", "--config", "missing.yaml"], "missing.yaml: no such file"),
        (["fit", "--config", __file__], f"{__file__}, line 1, column 3: not YAML"),
        (["fit", "--data.features", "f", "--trainer.max_epochs", "many"], "f: no such folder of feature files"),
        (["fit", "--data.features", "f", "--model.abmil.wdth", "3"], "--model.abmil.wdth"),
        (["fit", "--data.features", "f", "--model.aggregator", "abml"], "no aggregator 'abml': there are longnet, "),
        (["crossval", "--data.features", "f", "--folds", "many"], "folds"),
        (["test", "--data.features", "f"], "--checkpoint must be given"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(words: list[str], said: str, capsys) -> None:
    try:
        status = main(words)
    except SystemExit as end:
        status = end.code
    assert status == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert said in lines[0]
