"""Shards of a job: each slide in one of them, balanced, with summaries of their own that are joined at the end."""

import csv
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from classifier_files import ENCODER, write_classifier
from commands import longslide
from longslide import LongslideError, embed, predict, write_synthetic_slide
from longslide.data.slides.slide_table import SlideEntry
from longslide.pipeline.batch.ledger import record
from longslide.pipeline.batch.one_job import one_job
from longslide.pipeline.batch.result import SlideResult
from longslide.pipeline.batch.shards import Shard
from longslide.pipeline.merge import merge


def entries_of_sizes(folder: Path, sizes: list[int]) -> list[SlideEntry]:
    entries = []
    for number, size in enumerate(sizes):
        path = folder / f"{number:03}.svs"
        path.touch()
        os.truncate(path, size)
        entries.append(SlideEntry(path, path.stem))
    return entries


def test_every_slide_is_in_one_shard_and_large_slides_are_spread(tmp_path: Path) -> None:
    sizes = [int(random.Random(number).lognormvariate(20, 1)) for number in range(200)]
    entries = entries_of_sizes(tmp_path, sizes)
    shards = [Shard.of_slides(f"{number}/8", entries) for number in range(1, 9)]
    assert sorted(entry.slide_id for shard in shards for entry in shard.entries) == [e.slide_id for e in entries]
    loads = [sum(entry.path.stat().st_size for entry in shard.entries) for shard in shards]
    assert max(loads) - min(loads) < 0.02 * max(loads)
    largest = sorted(entries, key=lambda entry: -entry.path.stat().st_size)[:8]
    assert all(len({entry.slide_id for entry in largest} & {e.slide_id for e in s.entries}) == 1 for s in shards)


def test_the_order_of_the_list_does_not_count(tmp_path: Path) -> None:
    entries = entries_of_sizes(tmp_path, [5, 5, 5, 9, 1, 1, 0])
    shuffled = random.Random(0).sample(entries, len(entries))
    one, other = Shard.of_slides("2/3", entries), Shard.of_slides("2/3", shuffled)
    assert {entry.slide_id for entry in one.entries} == {entry.slide_id for entry in other.entries}
    assert one.listed == other.listed


@pytest.mark.parametrize("text", ["0/4", "5/4", "3", "a/b", "1/0", "-1/4"])
def test_a_shard_that_cannot_be_meant_is_refused(text: str) -> None:
    with pytest.raises(LongslideError, match="must look like 3/16, from 1/16 to 16/16"):
        Shard.of_slides(text, [])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    (home / "tiny.yaml").write_text(ENCODER)
    (home / "slides").mkdir()
    for seed in range(3):
        write_synthetic_slide(home / "slides" / f"{seed}.svs", size=(768 + 256 * seed, 768), seed=seed)
    return home


def job(home: Path) -> dict[str, Any]:
    return {"slides": home / "slides", "tile_encoder": home / "tiny.yaml", "tile_checkpoint": "random", "device": "cpu"}


def rows(path: Path) -> dict[str, dict[str, str]]:
    with path.open(newline="") as file:
        return {row["slide_id"]: row for row in csv.DictReader(file)}


def test_shards_of_embed_and_predict_are_merged_into_what_one_command_gives(home: Path, tmp_path: Path) -> None:
    whole = {result.slide_id: result for result in embed(output=tmp_path / "whole", **job(home))}
    parts = [embed(output=tmp_path / "parts", shard=f"{number}/2", **job(home)) for number in (2, 1)]
    assert {len(part) for part in parts} == {1, 2}
    assert not (tmp_path / "parts" / "summary.csv").exists()
    merged = {result.slide_id: result for result in merge(tmp_path / "parts")}
    assert merged.keys() == rows(tmp_path / "parts" / "summary.csv").keys() == whole.keys()
    for slide_id, one in whole.items():
        two = merged[slide_id]
        assert (two.status, two.tiles, two.slide_mpp, two.blur) == (one.status, one.tiles, one.slide_mpp, one.blur)
    assert (tmp_path / "parts" / "qc" / "index.html").is_file()

    write_classifier(tmp_path / "best.ckpt", tmp_path / "whole")
    common: dict[str, Any] = {"checkpoint": tmp_path / "best.ckpt", "features": tmp_path / "whole", "device": "cpu"}
    alone = predict(home / "slides", output=tmp_path / "alone", **common)
    for number in (1, 2):
        predict(home / "slides", output=tmp_path / "shared", shard=f"{number}/2", **common)
    assert not (tmp_path / "shared" / "predictions.csv").exists()
    assert [result.status for result in merge(tmp_path / "shared")] == ["done"] * 3
    together = predict(home / "slides", output=tmp_path / "shared", **common)
    assert [one.probability for one in together] == [one.probability for one in alone]
    tables = [(tmp_path / name / "predictions.csv").read_text() for name in ("alone", "shared")]
    assert tables[0] == tables[1]


def write_shard(output: Path, number: int, slides: list[str], done: list[str] | None = None, **changes: Any) -> None:
    entries = tuple(SlideEntry(Path(f"{name}.svs"), name) for name in slides)
    shard = Shard(number, changes.pop("of", 2), entries, changes.pop("listed", "digest"))
    shard.begin(output, {"tile_px": 256} | changes)
    results = [
        SlideResult(name, f"{name}.svs", "done", seconds=1.5, tiles=3) for name in (slides if done is None else done)
    ]
    record(output, *results, name=shard.summary)


def test_merge_says_what_is_wrong_with_the_shards(tmp_path: Path) -> None:
    output = tmp_path / "none"
    output.mkdir()
    with pytest.raises(LongslideError, match="no shards there"):
        merge(output)
    cases: dict[str, dict[str, Any]] = {
        "shard 2 of 2 is missing: run it": {},
        "d, e, f, g, h and 2 more; run shard 2 again": {"slides": list("defghij"), "done": []},
        "b in shard 1 and in shard 2": {"slides": ["b", "c"]},
        "shard 2 was made otherwise than shard 1 (tile_px 224 instead of 256)": {"slides": ["c"], "tile_px": 224},
        "the list of slides of shard 2 was not that of shard 1": {"slides": ["c"], "listed": "another"},
        "divided into 2 and 3": {"slides": ["c"], "of": 3},
    }
    for number, (message, second) in enumerate(cases.items()):
        output = tmp_path / str(number)
        output.mkdir()
        write_shard(output, 1, ["a", "b"])
        if second:
            write_shard(output, 2, **second)
        with pytest.raises(LongslideError) as error:
            merge(output)
        assert message in str(error.value)
        assert not (output / "summary.csv").exists()


@pytest.mark.parametrize("content", ["", "[]", '{"shard": 1, "of": 1}'])
def test_a_file_that_says_nothing_of_a_shard_is_named(tmp_path: Path, content: str) -> None:
    write_shard(tmp_path, 1, ["a"], of=1)
    (tmp_path / "shards" / "1-of-1.json").write_text(content)
    with pytest.raises(LongslideError, match=r"1-of-1\.json: not .*run this shard again"):
        merge(tmp_path)


def test_a_slide_that_another_process_has_is_not_done(tmp_path: Path) -> None:
    write_shard(tmp_path, 1, ["a"], of=1, done=[])
    busy = SlideResult("a", "a.svs", "skipped", "another process is working on it (process 1 on host)")
    record(tmp_path, busy, name="shards/1-of-1.csv")
    with pytest.raises(LongslideError, match="1 slide is not done: a; run shard 1 again"):
        merge(tmp_path)


def test_failed_slides_are_merged_and_count(tmp_path: Path) -> None:
    write_shard(tmp_path, 1, ["a", "b"], of=1, done=["a"])
    record(tmp_path, SlideResult("b", "b.svs", "failed", "broken"), name="shards/1-of-1.csv")
    ended = longslide("merge", "--output", tmp_path)
    assert ended.returncode == 1
    assert "1 done, 1 failed, 0 skipped" in ended.stdout
    assert rows(tmp_path / "summary.csv")["a"]["seconds"] == "1.5"


def test_two_jobs_with_other_settings_do_not_share_a_folder(tmp_path: Path) -> None:
    with (
        one_job(tmp_path, {"tile_px": 256, "pool": "mean"}),
        one_job(tmp_path, {"tile_px": 256, "pool": "mean"}),
        one_job(tmp_path, {"explain": None}),  # of another kind
        pytest.raises(
            LongslideError, match=r"another job is at work there with other settings \(tile_px 256 instead of 224"
        ),
        one_job(tmp_path, {"tile_px": 224, "pool": "mean"}),
    ):
        pass
    with one_job(tmp_path, {"tile_px": 224}):
        assert len(list((tmp_path / ".locks").glob(".job-*"))) == 1


def test_a_clock_that_is_ahead_does_not_let_a_second_job_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 3600)  # on the machine of the first job
    with one_job(tmp_path, {"tile_px": 256}):
        monkeypatch.setattr(time, "time", now)
        with pytest.raises(LongslideError, match="another job is at work there"), one_job(tmp_path, {"tile_px": 224}):
            pass


def test_embed_is_refused_in_a_folder_where_another_is_at_work_with_other_settings(home: Path, tmp_path: Path) -> None:
    words = ["embed", str(home / "slides"), "--output", str(tmp_path)]
    words += ["--tile-encoder", str(home / "tiny.yaml"), "--tile-checkpoint", "random", "--tile-px", "128"]
    with one_job(tmp_path, {"tile_px": 64}):
        ended = longslide(*words, "--device", "cpu")
        assert ended.returncode == 2
        assert "at work there with other settings (tile_px 64 instead of 128; process " in ended.stderr
        assert not list(tmp_path.glob("*.h5"))
    assert longslide(*words, "--device", "cpu").returncode == 0


def test_a_job_whose_process_was_killed_stops_no_other(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from longslide.pipeline.batch.one_job import one_job\n"
        "with one_job(Path(sys.argv[1]), {'tile_px': 256}): os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -9
    [left] = (tmp_path / ".locks").glob(".job-*")
    assert json.loads(left.read_text())["made_with"] == {"tile_px": 256}
    with one_job(tmp_path, {"tile_px": 224}):
        assert not left.exists()
