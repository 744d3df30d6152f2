"""One command on several devices: a process on each, one summary, and nothing lost when one of them dies."""

import csv
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from classifier_files import ENCODER
from commands import Command, longslide
from longslide import LongslideError, embed, read_features, write_synthetic_slide

needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    for seed in range(4):
        write_synthetic_slide(folder / f"{seed}.svs", size=(1536 + 256 * seed, 1536), seed=seed)
    return folder


@pytest.fixture
def job(slides: Path, tmp_path: Path) -> dict[str, Any]:
    encoder = tmp_path / "tiny.yaml"
    encoder.write_text(ENCODER)
    return {"slides": slides, "tile_encoder": encoder, "tile_checkpoint": "random", "precision": "float32"}


def command(job: dict[str, Any], output: Path, *more: str) -> list[str]:
    words = ["embed", str(job["slides"]), "--output", str(output)]
    for name in ("tile_encoder", "tile_checkpoint", "precision"):
        words += [f"--{name.replace('_', '-')}", str(job[name])]
    return [*words, "--devices", "cpu,cpu", *more]


def test_two_devices_give_what_one_gives(job: dict[str, Any], tmp_path: Path) -> None:
    one = embed(output=tmp_path / "one", device="cpu", **job)
    two = embed(output=tmp_path / "two", devices="cpu,cpu", **job)
    assert [(r.slide_id, r.status, r.tiles) for r in two] == [(r.slide_id, r.status, r.tiles) for r in one]
    for result in one:
        alone, shared = (read_features(tmp_path / folder / f"{result.slide_id}.h5") for folder in ("one", "two"))
        np.testing.assert_allclose(shared.features, alone.features, rtol=1e-5, atol=1e-6)
        assert (shared.coords == alone.coords).all()
    with (tmp_path / "two" / "summary.csv").open(newline="") as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["done"] * 4


def processes_of(pid: int) -> list[int]:
    """Processes that a command has started for its devices."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if parent == pid and b"longslide.pipeline.batch.workers" in words:
            found.append(int(folder.name))
    return found


def wait_for_two_processes(running: Command) -> None:
    deadline = time.monotonic() + 120
    while len(processes_of(running.pid)) < 2 and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)


def wait_for_the_first_slide(output: Path) -> None:
    deadline = time.monotonic() + 120
    while not any(output.glob("*.h5")) and time.monotonic() < deadline:
        time.sleep(0.01)


@needs_proc
def test_a_process_that_is_killed_loses_nothing(job: dict[str, Any], tmp_path: Path) -> None:
    running = Command(command(job, tmp_path / "out"))
    wait_for_two_processes(running)
    victim = processes_of(running.pid)[0]
    wait_for_the_first_slide(tmp_path / "out")
    os.kill(victim, signal.SIGKILL)
    text = "".join(running.communicate(timeout=240))
    assert running.returncode == 0, text
    assert "4 done, 0 failed, 0 skipped" in text
    assert "its process has died (SIGKILL); its slides are given to others" in text
    assert len(list((tmp_path / "out").glob("*.h5"))) == 4


CRASHING = """
import os, threading
from longslide.data.slides.openslide import OpenSlideReader

class Crashing(OpenSlideReader):  # its library takes the process down, but only where tiles are read
    SUFFIXES = frozenset({".svs"})
    reopens = False

    def __init__(self, path):
        super().__init__(path)
        self.crashes = path.name == "3.svs"

    def read_region(self, *where):
        if self.crashes and threading.current_thread().name.startswith("tiles"):
            os._exit(7)
        return super().read_region(*where)
"""


@needs_proc
def test_a_slide_that_takes_two_processes_down_fails_by_name_and_the_others_are_done(
    job: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "crashing.py").write_text(CRASHING)
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    words = command(job, tmp_path / "out", "--reader", "crashing:Crashing", "--threads", "2")
    ended = longslide(*words, env={**os.environ, "PYTHONPATH": paths})
    assert ended.returncode == 1, ended.stdout + ended.stderr
    with (tmp_path / "out" / "summary.csv").open(newline="") as file:
        rows = {row["slide_id"]: row for row in csv.DictReader(file)}
    assert "3.svs: 2 processes died while they had this slide" in rows["3"]["reason"]
    assert [rows[name]["status"] for name in "0123"] == ["done", "done", "done", "failed"]


@needs_proc
def test_a_signal_ends_all_processes_and_the_next_run_goes_on(job: dict[str, Any], tmp_path: Path) -> None:
    running = Command(command(job, tmp_path / "out"))
    wait_for_two_processes(running)
    workers = processes_of(running.pid)
    wait_for_the_first_slide(tmp_path / "out")
    running.send_signal(signal.SIGTERM)
    text = "".join(running.communicate(timeout=60))
    assert running.returncode == 143, text
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    embed(output=tmp_path / "out", device="cpu", **job)
    assert len(list((tmp_path / "out").glob("*.h5"))) == 4


def test_wrong_usage_is_one_line_and_no_slide_is_touched(job: dict[str, Any], tmp_path: Path) -> None:
    for devices, why in {
        "all": "no NVIDIA GPU here",
        "7": "cuda:7 is not one of the 0 GPUs here",
        "cuda:0,cuda:0": "cuda:0 is there twice",
        "tpu": "device 'tpu' is not available here",
    }.items():
        with pytest.raises(LongslideError, match=re.escape(why)):
            embed(output=tmp_path / "out", devices=devices, **job)
    with pytest.raises(LongslideError, match="--device and --devices: give only one of the two"):
        embed(output=tmp_path / "out", devices="all", device="cpu", **job)
    assert not list((tmp_path / "out").glob("*.h5"))


def test_what_a_process_refuses_is_said_once(job: dict[str, Any], tmp_path: Path) -> None:
    embed(output=tmp_path / "out", device="cpu", **job)
    with pytest.raises(LongslideError, match="overlap 0 instead of 16"):
        embed(output=tmp_path / "out", devices="cpu,cpu", overlap=16, **job)
