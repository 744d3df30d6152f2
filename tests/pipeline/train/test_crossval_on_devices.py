"""Folds trained at a time, by processes on several devices or on the nodes of a Ray cluster: the numbers of one process."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from commands import Command, longslide
from longslide.pipeline.batch.claims import lock_folder, take
from longslide.pipeline.cli import main
from training_cohort import write_cohort

SMALL = {"object_store_memory": 80 * 2**20, "include_dashboard": False}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    write_cohort(folder, 40)
    return folder


def words(cohort: Path, run: Path, *more: str) -> list[str]:
    return [
        *("crossval", "--config", "abmil", "--data.task", "binary", "--data.workers", "0", "--folds", "3"),
        *("--data.table", f"{cohort}/cohort.csv", "--data.features", f"{cohort}/features", "--run", str(run)),
        *("--model.aggregator.width", "16", "--epochs", "3", "--min-steps", "12", *more),
    ]


def ended(words: list[str], **environment: str) -> tuple[int, str]:
    done = longslide(*words, env=os.environ | environment)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def alone(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    status, text = ended(words(cohort, run))
    assert status == 0, text
    return run


def equal_to_the_bit(run: Path, alone: Path) -> None:
    for name in ("predictions.csv", "metrics.csv", "history.csv", "splits.csv", "cohort.csv"):
        assert (run / name).read_bytes() == (alone / name).read_bytes(), name
    for fold in range(3):
        one, other = (torch.load(folder / f"fold_{fold}/best.ckpt", weights_only=True) for folder in (run, alone))
        assert one["longslide"].items() >= {"thresholds": other["longslide"]["thresholds"]}.items()
        for name, value in one["state_dict"].items():
            assert torch.equal(value, other["state_dict"][name]), name
    ours, theirs = (json.loads((folder / "run.json").read_text()) for folder in (run, alone))
    for facts in (ours, theirs):
        del facts["started"], facts["seconds"]
    assert ours == theirs
    assert (run / "config.yaml").read_text().replace(str(run), "") == (alone / "config.yaml").read_text().replace(
        str(alone), ""
    )


MISHAP = """
import os, time
from pathlib import Path
from lightning import Callback

HERE = Path(__file__).parent

class Mishap(Callback):  # ends the process that trains fold 1, in its second epoch
    def on_train_epoch_end(self, trainer, model):
        if trainer.current_epoch != 1 or not trainer.checkpoint_callback.dirpath.endswith("fold_1"):
            return
        if (HERE / "once").exists():
            (HERE / "once").unlink()
            os._exit(7)
        if (HERE / "always").exists():
            os._exit(7)
        while (HERE / "node").exists() and not (HERE / "killed").exists():
            (HERE / "in-hand").write_text(str(os.getpid()))
            time.sleep(0.1)
"""


def with_mishap(folder: Path, kind: str) -> tuple[list[str], dict[str, str]]:
    """Options and environment under which fold 1 meets with a mishap."""
    (folder / "mishaps.py").write_text(MISHAP)
    (folder / kind).touch()
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    return ["--trainer.callbacks", "[{class_path: mishaps.Mishap}]"], {"PYTHONPATH": path}


def process_in_hand(folder: Path) -> int:
    """That which trains fold 1, once it waits in its second epoch; 0 before."""
    return int((folder / "in-hand").read_text() or 0) if (folder / "in-hand").exists() else 0


@pytest.mark.slow
def test_two_processes_give_the_run_of_one(cohort: Path, alone: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    status, text = ended(words(cohort, tmp_path / "run", "--devices", "cpu,cpu", "--log-file", str(log)))
    assert status == 0, text
    equal_to_the_bit(tmp_path / "run", alone)
    events = [json.loads(line) for line in log.read_text().splitlines()]
    epochs = sorted((one["fold"], one["epoch"]) for one in events if one.get("event") == "epoch")
    history = pd.read_csv(tmp_path / "run" / "history.csv")
    assert epochs == list(zip(history["fold"], history["epoch"], strict=True)), "of all processes, in one log file"


@pytest.mark.slow
def test_folds_go_on_after_a_signal_and_after_processes_that_died(cohort: Path, alone: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    mishap, environment = with_mishap(tmp_path, "node")  # fold 1 waits in its second epoch
    command = words(cohort, run, "--devices", "cpu,cpu", *mishap)
    with Command(command, env=os.environ | environment) as process:
        deadline = time.monotonic() + 400
        while not (trainer := process_in_hand(tmp_path)) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        text = "".join(process.communicate(timeout=120))
    assert process.returncode == 143, text
    assert text.strip().splitlines()[-1] == "longslide crossval: stopped; the same command goes on from here"
    assert trainer, text
    assert not Path(f"/proc/{trainer}").exists(), "no process is left"
    (tmp_path / "node").unlink()

    # Fold 1 takes its process down, and the next one too: it fails by name, and the others are kept.
    (tmp_path / "always").touch()
    status, text = ended(command, **environment)
    assert status == 2, text
    last = text.strip().splitlines()[-1]
    assert last.startswith(f"longslide crossval: {run}/fold_1: fold 1: 2 processes died with it (status 7, status 7)")
    assert json.loads((run / "run.json").read_text())["trained_folds"] == [0, 2]
    (tmp_path / "always").unlink()

    # It takes one process down: the next one ends it.
    (tmp_path / "once").touch()
    status, text = ended(command, **environment)
    assert status == 0, text
    assert "its process has died (status 7); what it was at work on is begun again" in text
    assert f"going on from {run}/fold_1/last.ckpt" in text, "the epoch before is not trained again"
    assert "fold 0, epoch" not in text, "what was trained is not trained again"
    assert (run / "predictions.csv").read_bytes() == (alone / "predictions.csv").read_bytes()


def test_where_to_train_is_said_once_and_a_device_that_is_not_there_is_one_line(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more, why in (
        (["--devices", "7"], "--devices 7: cuda:7 is not one of the 0 GPUs here"),
        (["--devices", "cpu", "--ray", "auto"], "--devices and --ray: give only one of the two"),
        (
            ["--devices", "cpu", "--trainer.accelerator", "cpu"],
            "--trainer.accelerator and --devices: give only one of the two",
        ),
        (
            ["--trainer.accelerator", "cpu", "--trainer.devices", "2"],
            "a fold is trained on one device: give --devices",
        ),
    ):
        assert main(words(cohort, tmp_path / "run", *more)) == 2
        assert capsys.readouterr().err.strip().splitlines()[-1].startswith(f"longslide crossval: {why}")
    assert not (tmp_path / "run" / "run.json").exists()


RANK_3 = """
import sys
from longslide.pipeline.train import folds, settings

assert "lightning" not in sys.modules, "it asks for its rank when it is imported"
settings.alone()
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_only

trainer = Trainer(accelerator="cpu", devices=1, logger=False)
print(rank_zero_only.rank, trainer.global_rank, trainer.world_size)
"""


def test_on_a_node_that_is_a_task_of_slurm_a_worker_trains_by_itself() -> None:
    slurm = {
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NAME": "ray",
        "SLURM_NTASKS": "4",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "3",
    }
    done = subprocess.run([sys.executable, "-c", RANK_3], capture_output=True, text=True, env=os.environ | slurm)
    assert done.stdout.split() == ["0", "0", "1"], done.stderr


def test_two_processes_do_not_train_in_one_folder(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    held = take(lock_folder(tmp_path / "run") / ".run.lock")
    assert main(words(cohort, tmp_path / "run")) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert f"run: process {os.getpid()} on " in line
    assert "is at work there; wait until it has ended, or choose another --run" in line
    held.release()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without CPUs, and two nodes."""
    pytest.importorskip("ray", reason="needs ray: pip install 'longslide[cluster]'")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **SMALL})
    for _ in range(2):
        cluster.add_node(num_cpus=1, **SMALL)
    yield cluster
    cluster.shutdown()


def kill_the_node_that_trains(cluster: Any, folder: Path) -> None:
    while not (trainer := process_in_hand(folder)):
        time.sleep(0.1)
    raylet = parent_of(parent_of(trainer))  # the actor's process is in between
    [node] = [node for node in cluster.worker_nodes if node.all_processes["raylet"][0].process.pid == raylet]
    cluster.remove_node(node, allow_graceful=False)
    while Path(f"/proc/{trainer}").exists():
        time.sleep(0.1)
    (folder / "killed").touch()


def parent_of(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.slow
def test_folds_on_a_ray_cluster_of_which_a_node_is_killed_are_those_of_one_process(
    cluster: Any, cohort: Path, alone: Path, tmp_path: Path
) -> None:
    mishap, environment = with_mishap(tmp_path, "node")
    killer = threading.Thread(target=kill_the_node_that_trains, args=(cluster, tmp_path), daemon=True)
    killer.start()
    status, text = ended(words(cohort, tmp_path / "run", "--ray", cluster.address, *mishap), **environment)
    assert status == 0, text
    assert (
        "its process has died (its node, or Ray's process there, is gone); what it was at work on is begun again"
        in text
    )
    assert (tmp_path / "killed").exists()
    for name in ("predictions.csv", "metrics.csv", "history.csv"):
        assert (tmp_path / "run" / name).read_bytes() == (alone / name).read_bytes(), name
