"""The job scripts and images of docs/cluster: they parse, name what exists, and go back into the queue."""

import os
import re
import signal
import subprocess
import time
import tomllib
from pathlib import Path

import pytest
from longslide.pipeline.cli import COMMANDS, command_parser

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "cluster"
SCRIPTS = sorted(FOLDER.glob("*.sbatch"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_job_scripts_parse(path: Path) -> None:
    ended = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.name)
def test_commands_and_options_exist(path: Path) -> None:
    text = path.read_text().replace("\\\n", " ")
    found = re.findall(r"longslide(?:\.sif)? ([a-z]+) ([^\n&]*)", text)
    found = [(command, words) for command, words in found if command in COMMANDS]
    assert found
    for command, words in found:
        for option in re.findall(r"--[\w-]+", words):
            assert option in command_parser(command)._option_string_actions, (command, option)


def test_the_extras_of_the_images_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name in ("Dockerfile", "longslide.def"):
        [names] = re.findall(r"'/opt/longslide\[(.*)\]'", (FOLDER / name).read_text())
        assert set(names.split(",")) <= extras.keys()


def test_the_instructions_of_the_images_are_known(tmp_path: Path) -> None:
    text = (FOLDER / "Dockerfile").read_text()
    words = {line.split()[0] for line in text.splitlines() if line.strip() and not line.startswith("#")}
    assert words <= {"FROM", "RUN", "COPY", "ENV", "ENTRYPOINT"}
    recipe = (FOLDER / "longslide.def").read_text()
    sections = dict(re.findall(r"^%(\w+)\n((?:(?!^%).*\n?)*)", recipe, re.MULTILINE))
    assert sections.keys() == {"files", "post", "environment", "runscript"}
    for name in ("post", "environment", "runscript"):
        assert subprocess.run(["bash", "-n"], input=sections[name], text=True).returncode == 0


LONGSLIDE = """#!/usr/bin/env python3
import signal, sys, time, pathlib
pathlib.Path("words").write_text(" ".join(sys.argv[1:]))
def stop(number, frame):
    time.sleep(0.5)  # the slide in hand
    sys.exit({status})
signal.signal(signal.SIGUSR1, stop)
pathlib.Path("begun").touch()
time.sleep(30)
"""


@pytest.mark.parametrize(("status", "requeued"), [(138, True), (0, False), (2, False)])
def test_the_array_goes_back_into_the_queue_when_slides_are_left(status: int, requeued: bool, tmp_path: Path) -> None:
    (tmp_path / "longslide").write_text(LONGSLIDE.replace("{status}", str(status)))
    (tmp_path / "scontrol").write_text('#!/bin/sh\necho "$@" > requeued\n')
    for name in ("longslide", "scontrol"):
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "16", "SLURM_ARRAY_JOB_ID": "77"}
    environment = os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with subprocess.Popen(["bash", str(FOLDER / "embed.sbatch")], cwd=tmp_path, env=environment) as script:
        while not (tmp_path / "begun").exists():
            time.sleep(0.02)
        script.send_signal(signal.SIGUSR1)
        assert script.wait(20) == status
    assert (tmp_path / "words").read_text().endswith("--shard 3/16")
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text().split() == ["requeue", "77_3"]
