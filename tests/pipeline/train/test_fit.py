"""Training as users do it: recipes, run folders, resume, cross-validation, test on another cohort."""

import dataclasses
import json
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from commands import Command, longslide
from longslide.data.features.feature_file import read_features, write_features
from longslide.models.classifier.checkpoint import load_classifier
from longslide.pipeline.cli import main
from longslide.pipeline.report.report import report
from longslide.prediction_columns import PredictionColumns
from training_cohort import BINARY, quick, write_cohort


@pytest.fixture(scope="module")
def finished(cohort: tuple[Path, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    run = tmp_path_factory.mktemp("runs") / "abmil"
    words = ["--trainer.max_epochs", "12", "--model.optimiser.learning_rate", "0.003", "--data.test_share", "0.3"]
    assert main(["fit", *BINARY, *cohort[1], *quick(run), *words]) == 0
    return run


@pytest.mark.slow
def test_a_run_leaves_what_comparison_report_and_inference_need(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        *("config.yaml", "run.json", "splits.csv", "cohort.csv", "history.csv", "predictions.csv", "metrics.csv"),
        *("report.html", "methods.txt", "figures", "best.ckpt", "last.ckpt"),
    }
    facts = json.loads((finished / "run.json").read_text())
    assert facts["task"]["classes"] == ["negative", "positive"]
    assert facts["aggregator"]["name"] == "abmil"
    assert facts["finished"]
    assert {row["part"] for row in facts["counts"]} == {"train", "val", "test"}
    history = pd.read_csv(finished / "history.csv")
    assert history["epoch"].tolist() == list(range(len(history)))
    assert history["train_loss"].iloc[-1] < history["train_loss"].iloc[0]
    predictions = pd.read_csv(finished / "predictions.csv")
    assert set(predictions["level"]) == {"slide", "patient"}
    splits = pd.read_csv(finished / "splits.csv")
    test = predictions[(predictions["part"] == "test") & (predictions["level"] == "slide")]
    assert set(test["slide_id"]) == set(splits["slide_id"][splits["fold_0"] == "test"])
    metrics = pd.read_csv(finished / "metrics.csv")
    auroc = metrics[(metrics["metric"] == "auroc") & (metrics["level"] == "patient")]["value"]
    assert auroc.iloc[0] > 0.9, "the class is plain to see in the features"


@pytest.mark.slow
def test_outside_a_terminal_lines_say_how_training_goes(cohort: tuple[Path, list[str]], tmp_path: Path) -> None:
    done = longslide("fit", *BINARY, *cohort[1], "--run", tmp_path / "run", "--trainer.accelerator", "cpu")
    assert done.returncode == 0, done.stderr
    history = pd.read_csv(tmp_path / "run" / "history.csv")
    lines = [line for line in done.stderr.splitlines() if line.startswith("fold 0, epoch ")]
    assert 2 <= len(lines) <= len(history), "the first, the last, and those more than a second apart"
    assert lines[0].startswith(f"fold 0, epoch 0/2: train_loss {history['train_loss'][0]:.3g}, val_loss ")
    assert f"val_metric (AUROC) {history['val_metric'][0]:.3g}, best val_loss" in lines[0]
    assert " steps/s, at most " in lines[0]
    assert lines[0].endswith(" left")
    assert lines[-1].startswith("fold 0, epoch 2/2: ")
    assert f"best val_loss {history['val_loss'].min():.3g}" in lines[-1]
    assert "\u2501" not in done.stdout, "no bar"


def test_the_checkpoint_is_plain_tensors_and_says_all_that_inference_needs(finished: Path) -> None:
    content = torch.load(finished / "best.ckpt", weights_only=True)["longslide"]
    assert content["preprocessing"] == {
        "tile_encoder": "toy",
        "tile_weights": "toy weights",
        "tile_mpp": 0.5,
        "tile_px": 256,
        "overlap": 0,
        "precision": "float32",
        "min_tissue": 0.1,
        "tissue_method": "otsu",
    }
    assert content["thresholds"].keys() == {"positive"}
    assert content["temperature"] is None, "4 validation patients are too few to fit one"
    assert content["training_features"]["dim"] == 6
    assert content["slide_ids"]["train"] > content["slide_ids"]["val"] > 0
    torch.load(finished / "last.ckpt", weights_only=True)


def test_the_checkpoint_predicts_what_the_run_predicted(finished: Path, cohort: tuple[Path, list[str]]) -> None:
    from longslide.data.features.feature_file import read_features

    classifier = load_classifier(finished / "best.ckpt")
    predictions = pd.read_csv(finished / "predictions.csv")
    for row in predictions[predictions["level"] == "slide"].head(4).itertuples():
        features = read_features(cohort[0] / "features" / f"{row.slide_id}.h5")
        tiles = torch.from_numpy(features.features)
        cu_seqlens = torch.tensor([0, len(tiles)], dtype=torch.int32)
        with torch.inference_mode():
            outputs = classifier(tiles, torch.from_numpy(features.cells), cu_seqlens)
        predicted = classifier.predict(outputs)
        assert predicted["probability"][0, 1].item() == pytest.approx(row.probability_positive, abs=1e-5)
        assert classifier.task.classes[int(predicted["prediction"][0])] == row.prediction


def test_a_small_validation_part_chooses_no_threshold(finished: Path) -> None:
    """Of five patients the best one is chance; the loss, whose class weights are balanced, says 0.5."""
    assert load_classifier(finished / "best.ckpt").thresholds == {"positive": pytest.approx(0.5)}
    text = (finished / "methods.txt").read_text("utf-8")
    assert "The decision threshold was the share of positives in the training loss." in text


def test_a_finished_run_is_not_overwritten(finished: Path, cohort: tuple[Path, list[str]], capsys) -> None:
    before = (finished / "best.ckpt").read_bytes()
    assert main(["fit", *BINARY, *cohort[1], *quick(finished)]) == 2
    error = capsys.readouterr().err
    assert "holds a run that finished, with other options" in error
    assert "Traceback" not in error
    assert (finished / "best.ckpt").read_bytes() == before


def test_a_finished_run_asked_for_again_is_there(finished: Path, cohort: tuple[Path, list[str]], capsys) -> None:
    before = {path: path.read_bytes() for path in finished.glob("*.*")}
    assert main(["fit", "--config", str(finished / "config.yaml")]) == 0
    said = capsys.readouterr()
    assert "finished already" in said.err
    assert "auroc" in said.out
    assert {path: path.read_bytes() for path in finished.glob("*.*")} == before


def test_a_finished_run_is_evaluated_anew_where_only_that_is_asked_for(finished: Path, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    assert main(["fit", "--config", str(finished / "config.yaml"), "--run", str(run), "--subgroups", "grade"]) == 2
    assert "--run was" in capsys.readouterr().err, "the folder was moved, and says so"
    config = yaml.safe_load((run / "config.yaml").read_text()) | {"run": str(run)}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(run / "config.yaml"), "--subgroups", "grade"]) == 0
    scopes = set(pd.read_csv(run / "metrics.csv")["scope"])
    assert any(scope.startswith("subgroup:grade=") for scope in scopes)
    assert (run / "predictions.csv").read_bytes() == (finished / "predictions.csv").read_bytes()
    assert "grade" in (run / "config.yaml").read_text()


def test_tiles_wider_than_their_encoder_is_meant_for_are_remarked_once(tmp_path: Path, capsys) -> None:
    words = write_cohort(tmp_path, 12, encoder="gigapath")
    for path in (tmp_path / "features").iterdir():
        write_features(path, dataclasses.replace(read_features(path), tile_px=512))
    run = tmp_path / "run"
    assert main(["fit", *BINARY, *words, *quick(run), "--trainer.max_epochs", "1"]) == 0
    said = "tiles of 512 px at 0.5 um/px (recommended for gigapath: 256 px at 0.5 um/px)"
    assert capsys.readouterr().err.count(said) == 1
    assert said in json.loads((run / "run.json").read_text())["notes"]


def test_a_run_does_not_go_on_with_another_table_or_other_splits(finished: Path, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    config = yaml.safe_load((run / "config.yaml").read_text()) | {"run": str(run)}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    cohort = (run / "cohort.csv").read_text()
    (run / "cohort.csv").write_text("\n".join(cohort.splitlines()[:-1]))
    assert main(["fit", "--config", str(run / "config.yaml")]) == 2
    assert "has begun with another table" in capsys.readouterr().err
    (run / "cohort.csv").write_text(cohort)
    # Stopped, and its splits have been made otherwise since then.
    facts = json.loads((run / "run.json").read_text()) | {"finished": False}
    (run / "run.json").write_text(json.dumps(facts))
    (run / "splits.csv").write_text((run / "splits.csv").read_text().replace(",test", ",train"))
    assert main(["fit", "--config", str(run / "config.yaml")]) == 2
    assert "has begun with other splits" in capsys.readouterr().err


KILLED = """
import sys, threading, time, os, signal
from pathlib import Path
import torch
from longslide.pipeline.cli import main

save, saved = torch.save, []

def killed(content, file, *args, **options):
    saved.append(file)
    if len(saved) < 5:
        return save(content, file, *args, **options)
    file.write(b"half of a checkpoint")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

torch.save = killed
sys.exit(main(sys.argv[1:]))
"""


def test_a_run_killed_while_it_writes_a_checkpoint_keeps_the_one_before_and_goes_on(
    cohort: tuple[Path, list[str]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = ["fit", *BINARY, *cohort[1], *quick(run)]
    assert Command(words, code=KILLED).wait() == -signal.SIGKILL
    assert list(run.glob(".*.tmp")), "what it was writing"
    torch.load(run / "last.ckpt", weights_only=True)
    assert main(words) == 0
    assert not list(run.glob(".*.tmp"))
    assert json.loads((run / "run.json").read_text())["finished"]


def test_a_full_disk_ends_training_in_one_line_and_keeps_the_checkpoint_before(
    cohort: tuple[Path, list[str]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = ["fit", *BINARY, *cohort[1], *quick(run)]
    script = KILLED.replace("os.kill(os.getpid(), signal.SIGKILL)", "raise OSError(28, 'No space left on device')")
    ended = Command(words, code=script)
    error = ended.communicate()[1]
    assert ended.returncode == 2
    assert "the disk is full" in error.splitlines()[-1]
    assert "Traceback" not in error
    assert not list(run.glob(".*.tmp"))
    torch.load(run / "last.ckpt", weights_only=True)
    assert main(words) == 0


@pytest.mark.parametrize("name", ["last.ckpt", "history.csv", "run.json", "config.yaml"])
def test_an_unreadable_file_of_a_stopped_run_is_one_line(name: str, finished: Path, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    config = yaml.safe_load((run / "config.yaml").read_text()) | {"run": str(run)}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    facts = json.loads((run / "run.json").read_text()) | {"finished": False, "trained_folds": []}
    (run / "run.json").write_text(json.dumps(facts))
    (run / name).write_bytes(b"{\0 not what it was" if name != "last.ckpt" else (run / name).read_bytes()[:1000])
    assert main(["fit", "--config", str(tmp_path / "config.yaml")]) == 2
    error = capsys.readouterr().err
    assert f"{run / name}" in error.splitlines()[-1]
    assert "Traceback" not in error


def test_a_run_is_repeated_by_its_own_configuration(finished: Path, tmp_path: Path) -> None:
    assert main(["fit", "--config", str(finished / "config.yaml"), "--run", str(tmp_path / "again")]) == 0
    for name in ("predictions.csv", "history.csv", "splits.csv"):
        assert (tmp_path / "again" / name).read_text() == (finished / name).read_text()


@pytest.mark.slow
def test_fit_then_test_on_another_cohort_from_the_command_line(finished: Path, tmp_path: Path) -> None:
    options = write_cohort(tmp_path / "external", 18, seed=5, site="x-")
    words = ["--checkpoint", finished / "best.ckpt", "--run", tmp_path / "run"]
    result = longslide("test", *words, *options)
    assert result.returncode == 0, result.stderr
    assert "auroc" in result.stdout
    predictions = pd.read_csv(tmp_path / "run" / "predictions.csv")
    assert set(predictions["part"]) == {"test"}
    assert (predictions["level"] == "slide").sum() == 18
    assert set(predictions["seen_in_training"]) == {"no"}
    assert "None of the test patients was in training" in (tmp_path / "run" / "report.html").read_text()


def test_slides_of_training_are_no_test_unless_it_is_said_everywhere(
    finished: Path, cohort: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["test", "--checkpoint", str(finished / "best.ckpt"), "--accelerator", "cpu"]
    assert main([*words, "--run", str(tmp_path / "a"), *cohort[1]]) == 2
    error = capsys.readouterr().err
    splits = pd.read_csv(finished / "splits.csv")
    known = splits[splits["fold_0"] != "test"]
    assert f"{len(known)} patients (" in error
    assert "were in the training or validation part of the classifier" in error
    assert len(error.strip().splitlines()) == 1

    # The same slides under other names are found by what is in them.
    table = pd.read_csv(cohort[0] / "cohort.csv")
    (tmp_path / "features").mkdir()
    for slide in table["slide_id"]:
        shutil.copy(cohort[0] / "features" / f"{slide}.h5", tmp_path / "features" / f"new-{slide}.h5")
    table.assign(slide_id="new-" + table["slide_id"], patient_id="new-" + table["patient_id"]).to_csv(
        tmp_path / "renamed.csv", index=False
    )
    renamed = ["--data.table", f"{tmp_path}/renamed.csv", "--data.features", f"{tmp_path}/features"]
    assert main([*words, "--run", str(tmp_path / "b"), *renamed, "--data.workers", "0"]) == 2
    assert f"{len(known)} feature files" in capsys.readouterr().err

    run = tmp_path / "seen"
    assert main([*words, "--run", str(run), *cohort[1], "--allow-seen"]) == 0
    assert "This is no test" in capsys.readouterr().out
    predictions = pd.read_csv(run / "predictions.csv")
    marked = predictions[predictions["seen_in_training"] == "yes"]
    assert set(marked["patient_id"]) == set(known["patient_id"])
    assert set(pd.read_csv(run / "metrics.csv")["seen_in_training"]) == {"yes"}
    assert json.loads((run / "run.json").read_text())["seen"] == {
        "checked": True,
        "slides": len(known),
        "patients": known["patient_id"].nunique(),
    }
    page = (run / "report.html").read_text()
    assert '<p class="warning">This is no test' in page
    assert "None of the test" not in page


def test_the_test_part_of_a_run_may_be_tested_again(
    finished: Path, cohort: tuple[Path, list[str]], tmp_path: Path
) -> None:
    splits = pd.read_csv(finished / "splits.csv")
    table = pd.read_csv(cohort[0] / "cohort.csv")
    table[table["slide_id"].isin(splits.loc[splits["fold_0"] == "test", "slide_id"])].to_csv(
        tmp_path / "t.csv", index=False
    )
    words = ["--data.table", f"{tmp_path}/t.csv", "--data.features", f"{cohort[0]}/features", "--data.workers", "0"]
    words += ["--run", str(tmp_path / "run"), "--accelerator", "cpu"]
    assert main(["test", "--checkpoint", str(finished / "best.ckpt"), *words]) == 0


def test_a_checkpoint_names_no_patient_and_one_that_does_not_say_is_not_vouched_for(
    finished: Path, tmp_path: Path
) -> None:
    content = torch.load(finished / "best.ckpt", weights_only=True)
    cases = content["longslide"]["cases"]
    assert {part: len(kinds["slides"]) for part, kinds in cases["parts"].items()} == (
        pd.read_csv(finished / "splits.csv")["fold_0"].value_counts().to_dict()
    )
    assert not re.search(r"'[sp]\d+'", str(cases)), "digests, no ids"
    content["longslide"]["cases"] = None  # as an older version wrote it
    torch.save(content, tmp_path / "old.ckpt")
    options = write_cohort(tmp_path / "external", 18, seed=5)
    words = ["--run", str(tmp_path / "run"), "--accelerator", "cpu"]
    assert main(["test", "--checkpoint", str(tmp_path / "old.ckpt"), *options, *words]) == 0
    assert "could not be checked" in (tmp_path / "run" / "report.html").read_text()
    assert pd.read_csv(tmp_path / "run" / "predictions.csv")["seen_in_training"].isna().all()


def test_one_image_under_two_patients_is_refused_before_training(
    cohort: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(cohort[0], tmp_path / "cohort")
    shutil.copy(folder / "features" / "s3.h5", folder / "features" / "copy.h5")
    table = pd.read_csv(folder / "cohort.csv")
    options = ["--data.table", f"{folder}/cohort.csv", "--data.features", f"{folder}/features", "--data.workers", "0"]
    for patient, status in (("p99", 2), ("p3", 0)):
        copy = table[table["slide_id"] == "s3"].assign(slide_id="copy", patient_id=patient)
        pd.concat([table, copy]).to_csv(folder / "cohort.csv", index=False)
        assert main(["fit", *BINARY, *options, *quick(tmp_path / patient)]) == status
        said = capsys.readouterr().err
        assert "s3 and copy are the same features" in said
        assert ("under two patients, p3 and p99" in said) == (status == 2)


def test_features_of_another_encoder_are_refused(finished: Path, tmp_path: Path, capsys) -> None:
    options = write_cohort(tmp_path, 6, encoder="uni")
    assert main(["test", "--checkpoint", str(finished / "best.ckpt"), "--run", f"{tmp_path}/run", *options]) == 2
    error = capsys.readouterr().err
    assert "tile_encoder uni instead of toy" in error
    assert not (tmp_path / "run" / "metrics.csv").exists()


def rewrite(folder: Path, **change: Any) -> None:
    """Feature files that say another thing of how they were made."""
    for path in folder.glob("*.h5"):
        write_features(path, dataclasses.replace(read_features(path), **change))


def test_test_asks_of_features_what_predict_asks(finished: Path, tmp_path: Path, capsys) -> None:
    checkpoint = tmp_path / "best.ckpt"
    content = torch.load(finished / "best.ckpt", weights_only=True)
    content["longslide"]["preprocessing"]["tile_weights"] = "/home/one/toy.pth sha256:0123"
    torch.save(content, checkpoint)
    options = write_cohort(tmp_path / "external", 12, seed=5, site="x-")
    words = ["test", "--checkpoint", str(checkpoint), *options]
    # The same weights at another path, in another precision, with microns per pixel off by less than a hundredth.
    same = {"weights": "/home/other/toy.pth sha256:0123", "precision": "float16", "tile_mpp": 0.4988}
    rewrite(tmp_path / "external" / "features", **same)
    assert main([*words, "--run", f"{tmp_path}/same"]) == 0
    assert (tmp_path / "same" / "metrics.csv").is_file()
    # Tiles that overlap are others.
    rewrite(tmp_path / "external" / "features", overlap=32)
    capsys.readouterr()
    assert main([*words, "--run", f"{tmp_path}/other"]) == 2
    assert "overlap 32 instead of 0" in capsys.readouterr().err
    assert not (tmp_path / "other" / "metrics.csv").exists()


STOP = """
from lightning import Callback
from longslide.errors import LongslideError
from pathlib import Path

class StopOnce(Callback):
    def __init__(self, flag: str, epoch: int, batch: int) -> None:
        self.flag, self.epoch, self.batch = Path(flag), epoch, batch

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (self.epoch, self.batch) and not self.flag.exists():
            self.flag.touch()
            raise LongslideError("the power went off")
"""


@pytest.mark.slow
@pytest.mark.parametrize("within", [False, True], ids=["between epochs", "within an epoch"])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(
    within: bool, cohort: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    (tmp_path / "stopping.py").write_text(STOP)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = tmp_path / "stop.yaml"
    callback = {"class_path": "stopping.StopOnce", "init_args": {"flag": f"{tmp_path}/flag", "epoch": 2, "batch": 4}}
    config.write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    words = [*BINARY, *cohort[1], "--config", str(config), "--ema", "0.9", "--data.bags_per_step", "6"]
    words += ["--data.max_tokens", "40", "--trainer.max_epochs", "4", "--data.augment.noise", "0.1"]
    words += ["--checkpoint_every_n_steps", "1"] if within else []

    (tmp_path / "flag").touch()
    assert main(["fit", *words, *quick(tmp_path / "whole")]) == 0
    (tmp_path / "flag").unlink()
    assert main(["fit", *words, *quick(tmp_path / "stopped")]) == 2
    assert "the power went off" in capsys.readouterr().err
    assert len(pd.read_csv(tmp_path / "stopped" / "history.csv")) == 2
    assert main(["fit", *words, *quick(tmp_path / "stopped")]) == 0
    assert "going on from" in capsys.readouterr().err

    whole, stopped = (pd.read_csv(tmp_path / run / "history.csv") for run in ("whole", "stopped"))
    pd.testing.assert_frame_equal(whole, stopped)
    one, other = (torch.load(tmp_path / run / "last.ckpt", weights_only=True) for run in ("whole", "stopped"))
    for state in ("state_dict", "current_model_state"):
        for name, tensor in one[state].items():
            assert torch.equal(tensor, other[state][name]), name


@pytest.mark.slow
def test_a_stopped_run_does_not_go_on_with_other_options(
    cohort: tuple[Path, list[str]], tmp_path: Path, capsys
) -> None:
    run = tmp_path / "run"
    words = [*BINARY, *cohort[1], *quick(run)]
    assert main(["fit", *words]) == 0
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(facts | {"finished": False}))
    assert main(["fit", *words, "--model.optimiser.learning_rate", "0.5"]) == 2
    assert "--model.optimiser.learning-rate was None, is now 0.5" in capsys.readouterr().err
    history = (run / "history.csv").read_text()
    assert main(["fit", *words]) == 0
    assert (run / "history.csv").read_text() == history, "what was trained already is not trained again"


@pytest.mark.slow
def test_ctrl_c_ends_in_one_line_and_the_same_command_goes_on(cohort: tuple[Path, list[str]], tmp_path: Path) -> None:
    words = [
        "fit",
        *BINARY,
        *cohort[1],
        *quick(tmp_path / "run"),
        "--trainer.max_epochs",
        "10000",
        "--patience",
        "10000",
    ]
    with Command(words) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "last.ckpt").is_file() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert error.strip().splitlines()[-1] == "longslide fit: stopped; the same command goes on from here"
    assert not json.loads((tmp_path / "run" / "run.json").read_text())["finished"]


def test_crossval_predicts_every_patient_once_by_a_model_that_has_not_seen_it(
    cohort: tuple[Path, list[str]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", "mean", "--data.task", "ordinal", "--data.label", "grade", "--model.aggregator.width", "16"]
    words += ["--data.classes", "[low, middle, high]", "--folds", "3", "--trainer.max_epochs", "2"]
    assert main(["crossval", *words, *cohort[1], *quick(tmp_path / "cv")]) == 0
    lines = [line for line in capfd.readouterr().err.splitlines() if " is trained, " in line]
    assert [line.partition(" in ")[0] for line in lines] == ["fold 0 is trained, 1 of 3", "fold 1 is trained, 2 of 3"]
    assert all(line.endswith(" left") for line in lines)
    predictions = pd.read_csv(tmp_path / "cv" / "predictions.csv")
    test = predictions[(predictions["part"] == "test") & (predictions["level"] == "patient")]
    assert sorted(test["patient_id"]) == sorted({f"p{i}" for i in range(40)})
    splits = pd.read_csv(tmp_path / "cv" / "splits.csv").set_index("patient_id")
    for row in test.itertuples():
        assert splits.loc[row.patient_id, f"fold_{row.fold}"] == "test"
    assert {(tmp_path / "cv" / f"fold_{k}" / "best.ckpt").is_file() for k in range(3)} == {True}
    assert set(pd.read_csv(tmp_path / "cv" / "history.csv")["fold"]) == {0, 1, 2}
    assert "pooled" in set(pd.read_csv(tmp_path / "cv" / "metrics.csv")["scope"])


def test_a_patient_with_two_labels_makes_all_folds_be_measured_by_slides(tmp_path: Path, capsys) -> None:
    """The fold of such a patient had no rows of patients: the mean over folds was of the others, without a word."""
    options = write_cohort(tmp_path, 24, slides_a_patient=2)
    table = pd.read_csv(tmp_path / "cohort.csv")
    table.loc[0, "label"] = "positive"
    table.to_csv(tmp_path / "cohort.csv", index=False)
    words = ["--config", "mean", "--data.task", "binary", "--folds", "2", "--monitor", "val_loss"]
    assert main(["crossval", *words, *options, *quick(tmp_path / "cv"), "--trainer.max_epochs", "1"]) == 0
    assert set(pd.read_csv(tmp_path / "cv" / "predictions.csv")["level"]) == {"slide"}
    metrics = pd.read_csv(tmp_path / "cv" / "metrics.csv").query("scope == 'mean' and metric == 'auroc'")
    assert metrics[["level", "n"]].values.tolist() == [["slide", 24]]
    assert "1 patient has slides with different labels (p0): where they are tested" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("multilabel", ["--data.label", "[mutated, metastatic]"]),
        ("regression", ["--data.label", "score"]),
        ("survival", ["--data.label", "[months, died]"]),
        ("survival", ["--data.label", "[months, died]", "--data.discrete_time", "true", "--model.aggregator", "mean"]),
        (
            "ordinal",
            ["--data.label", "grade", "--data.classes", "[low, middle, high]", "--model.aggregator", "transmil"],
        ),
        ("multiclass", ["--data.label", "grade", "--model.aggregator", "max"]),
        ("linear-probe", ["--data.label", "grade"]),
        ("gigapath", ["--data.label", "grade", "--model.checkpoint", "random", "--trainer.precision", "32-true"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_task_and_every_aggregator_trains_from_its_recipe(
    recipe: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if recipe == "gigapath":  # the published size takes minutes on a CPU
        import longslide.models.slide_encoder.encoder as slide_encoder

        published = slide_encoder.load_slide_encoder_spec
        small = {"layers": 11, "width": 8, "heads": 2, "ffn_width": 8}
        monkeypatch.setattr(
            slide_encoder, "load_slide_encoder_spec", lambda name: type(s := published(name))(**vars(s) | small)
        )
    options = write_cohort(tmp_path / "cohort", 36, slides_a_patient=2)
    small_words = ["--trainer.max_epochs", "1", "--data.test_share", "0.3"]
    aggregator = words[words.index("--model.aggregator") + 1] if "--model.aggregator" in words else recipe
    if aggregator == "transmil":
        words = [*words, "--model.aggregator.width", "16", "--model.aggregator.landmarks", "8"]
    elif aggregator not in ("gigapath", "mean", "max", "abmil", "linear-probe"):
        words = [*words, "--model.aggregator.layers", "1", "--model.aggregator.width", "16"]
        words += ["--model.aggregator.heads", "2", "--model.aggregator.ffn_width", "16"]
    run = tmp_path / "run"
    assert main(["fit", "--config", recipe, *small_words, *words, *options, *quick(run)]) == 0
    metrics = pd.read_csv(run / "metrics.csv")
    assert np.isfinite(metrics["value"]).any()
    predictions = pd.read_csv(run / "predictions.csv")
    assert (predictions["level"] == "patient").any()
    assert list(predictions) == PredictionColumns(load_classifier(run / "best.ckpt").task).all
    as_given = pd.read_csv(tmp_path / "cohort" / "cohort.csv").drop_duplicates("patient_id").set_index("patient_id")
    for column, name in {"score": "target", "months": "time"}.items():
        if f"[{column}" in words[1] or column == words[1]:
            assert predictions[name].tolist() == as_given.loc[predictions["patient_id"], column].tolist(), "all digits"
    load_classifier(run / "best.ckpt")


def test_patients_of_another_cohort_are_at_high_risk_above_the_median_of_validation(tmp_path: Path) -> None:
    words = ["--config", "survival", "--data.label", "[months, died]", "--model.aggregator", "mean"]
    options = write_cohort(tmp_path / "cohort", 36)
    run, external = tmp_path / "run", tmp_path / "external"
    assert main(["fit", *words, "--trainer.max_epochs", "1", *options, *quick(run)]) == 0
    predictions = pd.read_csv(run / "predictions.csv").query("level == 'slide' and part == 'val'")
    threshold = load_classifier(run / "best.ckpt").thresholds["risk"]
    assert threshold == pytest.approx(predictions["risk"].median(), rel=1e-5)
    options = write_cohort(tmp_path / "others", 18, seed=5, site="x-")
    assert main(["test", "--checkpoint", str(run / "best.ckpt"), "--run", str(external), *options]) == 0
    assert json.loads((external / "run.json").read_text())["risk_threshold"] == threshold
    assert "Kaplan-Meier" in (external / "report.html").read_text()


def test_a_checkpoint_of_a_classifier_is_no_pretrained_one(
    finished: Path, cohort: tuple[Path, list[str]], tmp_path: Path, capsys
) -> None:
    words = [*BINARY[2:4], *cohort[1], *quick(tmp_path / "run"), "--model.checkpoint", str(finished / "best.ckpt")]
    assert main(["fit", "--config", "binary", *words]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "best.ckpt: not a checkpoint of the masked autoencoder (`longslide pretrain`)" in line


def test_a_patient_of_several_slides_is_one_bag_from_training_to_prediction(tmp_path: Path) -> None:
    options = write_cohort(tmp_path, 24, slides_a_patient=2)
    run = tmp_path / "run"
    words = ["--config", "mean", "--data.task", "binary", "--data.bags", "patient", "--trainer.max_epochs", "2"]
    words += ["--monitor", "val_loss"]
    assert main(["fit", *words, *options, *quick(run)]) == 0
    expected = pd.read_csv(run / "predictions.csv").set_index("patient_id")["probability_positive"]

    checkpoint = str(run / "best.ckpt")
    tested = ["--checkpoint", checkpoint, *options, "--run", str(tmp_path / "test"), "--accelerator", "cpu"]
    assert main(["test", *tested, "--allow-seen"]) == 0
    again = pd.read_csv(tmp_path / "test" / "predictions.csv")
    assert set(again["level"]) == {"patient"}
    again = again.set_index("patient_id")["probability_positive"]
    np.testing.assert_allclose(again[expected.index], expected, rtol=1e-5)

    patient = expected.index[0]
    cohort = pd.read_csv(tmp_path / "cohort.csv")
    slides = cohort[cohort["patient_id"] == patient].assign(
        slide=lambda rows: str(tmp_path) + "/" + rows["slide_id"] + ".svs"
    )
    for slide in slides["slide"]:
        Path(slide).write_text("the features are there, and are enough")
    slides.to_csv(tmp_path / "slides.csv", index=False)
    job = ["--checkpoint", checkpoint, "--features", str(tmp_path / "features"), "--output", str(tmp_path / "results")]
    assert main(["predict", str(tmp_path / "slides.csv"), *job, "--device", "cpu"]) == 2, "it was in training"
    assert main(["predict", str(tmp_path / "slides.csv"), *job, "--device", "cpu", "--allow-seen"]) == 0
    rows = pd.read_csv(tmp_path / "results" / "predictions.csv")
    assert set(rows["seen_in_training"]) == {"yes"}
    slide = slides["slide_id"].iloc[0]
    assert json.loads((tmp_path / "results" / f"{slide}.json").read_text())["seen"] is True
    [page] = report([tmp_path / "results"])
    assert "this is no test of it" in page.path.read_text()
    together = rows.loc[rows["level"] == "patient", "probability_positive"].item()
    apart = rows.loc[rows["level"] == "slide", "probability_positive"].mean()
    assert together == pytest.approx(expected[patient], rel=1e-5)
    assert together != pytest.approx(apart, rel=1e-5), "the mean of the slides would be indistinguishable from it"


def test_subgroups_are_by_any_column_of_the_table(cohort: tuple[Path, list[str]], tmp_path: Path) -> None:
    words = ["--config", "mean", "--data.task", "binary", *cohort[1], "--trainer.max_epochs", "1"]
    words += ["--subgroups", "grade, score", "--data.test_share", "0.4", "--monitor", "val_loss"]
    assert main(["fit", *words, *quick(tmp_path / "run")]) == 0
    scopes = set(pd.read_csv(tmp_path / "run" / "metrics.csv")["scope"])
    assert {"subgroup:grade=high", "subgroup:grade=low", "subgroup:grade=middle"} < scopes
    assert 1 < sum(scope.startswith("subgroup:score=") for scope in scopes) <= 4, "numbers are cut at their quartiles"
    assert "By grade" in (tmp_path / "run" / "report.html").read_text()


def test_what_was_left_out_and_settled_is_said_once(
    cohort: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pd.read_csv(cohort[0] / "cohort.csv", dtype=str)
    table.loc[3, "label"] = None
    table.to_csv(tmp_path / "cohort.csv", index=False)
    words = ["--config", "mean", "--data.task", "binary", *cohort[1], "--data.table", f"{tmp_path}/cohort.csv"]
    assert main(["crossval", *words, "--folds", "2", "--trainer.max_epochs", "1", *quick(tmp_path / "run")]) == 0
    said = capsys.readouterr().err
    assert said.count("1 feature file has no label: s3") == 1
    assert said.count("positive class: positive (of negative, positive") == 1
