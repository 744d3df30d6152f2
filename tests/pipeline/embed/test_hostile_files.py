"""One bad input ends one slide, and not the batch: pipes, names, crashes, files that take for ever."""

import csv
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from classifier_files import ENCODER
from commands import Command, longslide
from longslide import Slide, Tissue, embed, open_slide, read_features, write_synthetic_slide
from longslide.errors import LongslideError
from longslide.pipeline.cli import main

PLUGIN = """
import os, signal, time
from pathlib import Path
from longslide.data.slides.base import DeclinedError, SlideReader
from longslide.data.slides.openslide import OpenSlideReader
from longslide.data.tissue.optical_density import OpticalDensity

class Fragile(OpenSlideReader):
    '''Reads as OpenSlide does, but for two files that its library cannot take.'''

    def __init__(self, path: Path) -> None:
        if path.stem == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if path.stem == "hang":
            time.sleep(600)
        if path.stem == "memory":
            self.much = bytearray(6 * 2**30)
        super().__init__(path)

class Stays(OpticalDensity):
    '''A segmenter that no other process can be sent, as one with a network on a GPU.'''

    def __reduce__(self):
        raise TypeError("stays")
"""


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoder") / "tiny.yaml"
    path.write_text(ENCODER)
    return path


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slides") / "a.svs"
    write_synthetic_slide(path, size=(1536, 1024), seed=1)
    return path


def job(encoder: Path, output: Path) -> dict[str, Any]:
    return {"output": output, "tile_encoder": str(encoder), "tile_checkpoint": "random", "device": "cpu", "threads": 1}


def summary(output: Path) -> dict[str, dict[str, str]]:
    with (output / "summary.csv").open(newline="", encoding="utf-8") as file:
        return {row["slide_id"]: row for row in csv.DictReader(file)}


def test_names_that_are_no_text_and_pipes_end_no_batch(encoder: Path, slide: Path, tmp_path: Path) -> None:
    folder = tmp_path / "slides"
    folder.mkdir()
    shutil.copy(slide, folder / "a.svs")
    shutil.copy(slide, os.fsencode(folder) + b"/b\xe9.svs")
    shutil.copy(slide, folder / "c\nd\x1b[31m.svs")
    os.mkfifo(folder / "pipe.svs")
    os.mkfifo(folder / "pipe.dcm")
    output = tmp_path / "out"
    embed([folder], **job(encoder, output))
    rows = summary(output)
    assert {name: row["status"] for name, row in rows.items()} == {
        "a": "done",
        "b%E9": "done",
        "c%0Ad%1B[31m": "done",
        "pipe": "failed",
        "slides": "failed",
    }
    assert rows["pipe"]["reason"].endswith("pipe.svs: not a file but a pipe, a socket or a device")
    assert "\x1b" not in (output / "summary.csv").read_text()
    np.testing.assert_array_equal(read_features(output / "a.h5").features, read_features(output / "b%E9.h5").features)
    again = embed([folder], **job(encoder, output))
    assert [one.reason for one in again if one.status == "done"] == ["already complete"] * 3


@pytest.mark.parametrize("tissue", ["optical-density", "fragile.Stays"])
@pytest.mark.parametrize("command", ["embed", "doctor"])
def test_a_library_that_crashes_hangs_or_takes_all_memory_fails_one_slide_each(
    command: str, tissue: str, encoder: Path, slide: Path, tmp_path: Path
) -> None:
    (tmp_path / "fragile.py").write_text(PLUGIN)
    folder = tmp_path / "slides"
    folder.mkdir()
    for name in ("a", "crash", "hang", "memory", "z"):
        shutil.copy(slide, folder / f"{name}.svs")
    words = [command, str(folder), "--reader", "fragile.Fragile", "--device", "cpu"]
    words += ["--slide-timeout", "8", "--output", str(tmp_path / "out"), "--tissue", tissue]
    if command == "embed":
        words += ["--tile-encoder", str(encoder), "--tile-checkpoint", "random"]
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    began = time.monotonic()
    ended = longslide(*words, env=os.environ | {"PYTHONPATH": path})
    assert ended.returncode == 1, ended.stderr
    assert time.monotonic() - began < 120
    said = ended.stdout + ended.stderr
    assert "Traceback" not in said
    assert "crash.svs: the library that reads it crashed (SIGSEGV)" in said
    assert "hang.svs: not done within 8 s" in said
    assert "memory.svs: needs more than 4.3 GB of memory" in said
    if command == "embed":
        rows = summary(tmp_path / "out")
        assert [name for name, row in rows.items() if row["status"] == "done"] == ["a", "z"]
    else:
        assert "2 of 5 without problem" in said or "same image as a" in said


def test_a_class_of_this_process_alone_is_called_here(encoder: Path, slide: Path, tmp_path: Path) -> None:
    from longslide.data.tissue.optical_density import OpticalDensity

    class Own(OpticalDensity):
        method = "own 1"

        def __call__(self, slide: Slide) -> Tissue:
            return replace(super().__call__(slide), method=self.method)

    (result,) = embed([slide], tissue=Own(), **job(encoder, tmp_path / "out"))
    assert result.status == "done"
    assert read_features(tmp_path / "out" / "a.h5").tissue_method == "own 1"


def test_a_segmenter_of_this_process_that_never_ends_fails_its_slide_alone_and_is_given_up(
    encoder: Path, slide: Path, tmp_path: Path
) -> None:
    from longslide.data.tissue.optical_density import OpticalDensity

    ended: list[str] = []

    class Slow(OpticalDensity):
        def __call__(self, slide: Slide) -> Tissue:
            try:
                while slide.slide_id == "slow":
                    time.sleep(0.05)
                return super().__call__(slide)
            finally:
                ended.append(slide.slide_id)

    folder = tmp_path / "slides"
    folder.mkdir()
    for name in ("a", "slow", "z"):
        shutil.copy(slide, folder / f"{name}.svs")
    began = time.monotonic()
    results = embed([folder], tissue=Slow(), slide_timeout=10, **job(encoder, tmp_path / "out"))
    assert [one.status for one in results] == ["done", "failed", "done"]
    assert "slow.svs: not done within 10 s" in results[1].reason
    assert time.monotonic() - began < 60
    time.sleep(1)
    assert sorted(ended) == ["a", "slow", "z"]


def test_ctrl_c_while_a_slide_is_opened_for_ever_ends_at_once(encoder: Path, slide: Path, tmp_path: Path) -> None:
    (tmp_path / "fragile.py").write_text(PLUGIN)
    shutil.copy(slide, tmp_path / "hang.svs")
    words = ["embed", str(tmp_path / "hang.svs"), "--reader", "fragile.Fragile"]
    words += ["--output", str(tmp_path / "out"), "--tile-encoder", str(encoder), "--tile-checkpoint", "random"]
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    environment = os.environ | {"PYTHONPATH": path}
    with Command(words, env=environment) as process:
        process.wait_for("tiles of")
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert error.strip().splitlines()[-1] == "longslide embed: stopped; the same command goes on from here"


def test_a_summary_that_excel_saved_is_read(encoder: Path, slide: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    embed([slide], **job(encoder, output))
    path = output / "summary.csv"
    text = path.read_text().replace(",", ";").replace("0.5", "0,5")
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    other = tmp_path / "b.svs"
    shutil.copy(slide, other)
    results = embed([slide, other], **job(encoder, output))
    assert [one.status for one in results] == ["done", "done"]
    rows = summary(output)
    assert rows.keys() == {"a", "b"}
    assert rows["a"]["slide_mpp"] == "0.5"


def test_a_slide_given_twice_is_one_slide(slide: Path, tmp_path: Path) -> None:
    from longslide.data.slides.slide_table import find_slides

    table = tmp_path / "table.csv"
    table.write_text(f"slide,slide_mpp\n{slide},0.25\n")
    (entry,) = find_slides([slide, slide.parent, table, slide])
    assert entry.slide_mpp == 0.25
    other = tmp_path / "other.csv"
    other.write_text(f"slide,slide_mpp\n{slide},0.5\n")
    with pytest.raises(LongslideError, match=r"given twice, with slide_mpp 0\.25 and 0\.5"):
        find_slides([table, other])


@pytest.mark.parametrize("cell", ["a\nb", "a\x1b[31mb", "a\x07", "a\u202eb"])
def test_a_table_with_an_id_that_no_file_should_have_is_refused(cell: str, slide: Path, tmp_path: Path, capsys) -> None:
    table = tmp_path / "table.csv"
    table.write_text(f'slide,slide_id\n{slide},"{cell}"\n', encoding="utf-8")
    assert main(["embed", str(table), "--output", str(tmp_path / "out"), "--tile-encoder", "kaiko-vits8"]) == 2
    error = capsys.readouterr().err
    assert "column 'slide_id' has" in error
    assert "\x1b" not in error
    assert not (tmp_path / "out").exists()


def test_opening_a_pipe_does_not_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.h5")
    with pytest.raises(LongslideError, match="a pipe"):
        open_slide(tmp_path / "a.h5")
    with pytest.raises(LongslideError, match="a pipe"):
        read_features(tmp_path / "a.h5")
