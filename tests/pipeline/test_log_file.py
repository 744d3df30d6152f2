"""A log file has a line of JSON for each slide, epoch and event, and says how the command ended."""

import json
import logging
import pickle
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from classifier_files import ENCODER, write_classifier
from longslide import DataOptions, LongslideError, embed, fit, predict, write_synthetic_slide
from longslide.pipeline.batch.tasks import TaskRun
from longslide.pipeline.cli import main
from longslide.pipeline.log_file import EVENTS, event, log_to
from training_cohort import quick, write_cohort


def read(path: Path) -> list[dict[str, Any]]:
    """The records, each with a time, a level and a message."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for record in records:
        assert datetime.now(UTC) - datetime.fromisoformat(record["time"]) < timedelta(minutes=30)
        assert record["level"] in ("info", "warning", "error")
        assert record["message"]
    return records


def of(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [record for record in records if record.get("event") == kind]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    (folder / "tiny.yaml").write_text(ENCODER)
    (folder / "slides").mkdir()
    for seed, name in enumerate(("a.svs", "b.svs")):
        write_synthetic_slide(folder / "slides" / name, size=(1024, 768), seed=seed)
    (folder / "slides" / "broken.svs").write_bytes(b"II*\0 not a slide")
    encoder = str(folder / "tiny.yaml")
    log = folder / "logs" / "embed.jsonl"
    embed([folder / "slides"], folder / "features", encoder, "random", device="cpu", threads=1, log_file=log)
    return folder


def test_embed_logs_each_slide_what_took_the_time_and_the_end(home: Path) -> None:
    records = read(home / "logs" / "embed.jsonl")
    assert [records[0]["event"], records[-1]["event"]] == ["begin", "end"]
    assert records[0]["command"] == "embed"
    assert records[-1]["seconds"] > 0
    slides = {record["slide_id"]: record for record in of(records, "slide")}
    assert {name: one["status"] for name, one in slides.items()} == {"a": "done", "b": "done", "broken": "failed"}
    summary = pd.read_csv(home / "features" / "summary.csv").set_index("slide_id")
    assert {name: one.get("tiles") for name, one in slides.items() if name != "broken"} == {
        name: summary["tiles"][name] for name in ("a", "b")
    }
    spent = sum(one["seconds"] for one in slides.values() if "seconds" in one)
    assert 0.5 * of(records, "time")[0]["seconds_encoder"] < spent < records[-1]["seconds"], "a slide's time is its own"
    assert slides["broken"]["level"] == "error"
    assert slides["broken"]["reason"] == summary["reason"]["broken"]
    [time] = of(records, "time")
    assert time["tiles"] == summary["tiles"].sum()
    assert time["message"].startswith("time: ")
    assert any("tile encoder tiny" in note["message"] for note in of(records, "note"))


def test_predict_says_on_each_line_what_took_the_time(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_classifier(tmp_path / "best.ckpt", home / "features")
    options = {
        "device": "cpu",
        "threads": 1,
        "explain": "integrated-gradients",
        "tile_encoder": str(home / "tiny.yaml"),
    }
    log = tmp_path / "log.jsonl"
    (tmp_path / "best.ckpt").rename(tmp_path / "one.ckpt")
    predict(home / "slides" / "a.svs", str(tmp_path / "one.ckpt"), tmp_path / "results", log_file=log, **options)  # type: ignore[arg-type]
    captured = capsys.readouterr()
    [line] = [line for line in captured.err.splitlines() if line.startswith("[1/1] done")]
    [slide] = of(read(log), "slide")
    assert f" s ({slide['tiles'] / slide['seconds']:,.0f}/s), {slide['took']}" in line
    parts = dict(part.rsplit(" ", 2)[:2] for part in slide["took"].split(", "))
    assert "embedding tiles" in parts
    assert sum(map(float, parts.values())) == pytest.approx(slide["seconds"], abs=0.5)
    assert "time: " in captured.out, "and what the tile encoder has waited for"
    assert len(of(read(log), "time")) == 1
    assert pd.read_csv(tmp_path / "results" / "summary.csv")["took"][0] == slide["took"]


def test_fit_logs_each_epoch_as_its_history_and_each_metric(tmp_path: Path) -> None:
    words = write_cohort(tmp_path)
    log = tmp_path / "run.jsonl"
    options = ["--data.task", "binary", "--model.aggregator", "mean", "--trainer.max-epochs", "3"]
    assert main(["fit", *words, *options, *quick(tmp_path / "run"), "--log-file", str(log)]) == 0
    records = read(log)
    history = pd.read_csv(tmp_path / "run" / "history.csv")
    epochs = of(records, "epoch")
    assert len(epochs) == len(history) == 3
    for name in ("epoch", "train_loss", "val_loss", "learning_rate"):
        assert [record[name] for record in epochs] == pytest.approx(history[name].tolist())
    metrics = pd.read_csv(tmp_path / "run" / "metrics.csv")
    auroc = next(record for record in of(records, "metric") if record["metric"] == "auroc")
    assert auroc["value"] == pytest.approx(
        metrics.query("metric == 'auroc' and level == 'patient' and scope == 'pooled'")["value"].iloc[0]
    )
    assert "log_file" not in (tmp_path / "run" / "config.yaml").read_text(), "the run is the same with another log file"
    assert records[-1]["event"] == "end"


def test_a_mistake_is_the_last_line_and_later_commands_are_appended(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    for _ in range(2):
        with pytest.raises(LongslideError):
            fit(DataOptions(tmp_path / "features", tmp_path / "none.csv", task="binary"), log_file=log)
    records = read(log)
    assert [record["event"] for record in records] == ["begin", "end"] * 2
    assert records[-1]["level"] == "error"
    assert "no such folder of feature files" in records[-1]["message"]


def test_the_library_s_words_are_in_it_and_nothing_stays_attached(tmp_path: Path) -> None:
    library = logging.getLogger("longslide")
    before = (library.level, list(library.handlers), list(EVENTS.handlers))
    with log_to(tmp_path / "log.jsonl", "embed"):
        logging.getLogger("longslide.data.table").warning("a table with ‘quotes’\nand lines")
        event("test", "one", {"number": 1, "path": tmp_path, "nothing": None})
    event("test", "afterwards")
    assert (library.level, library.handlers, EVENTS.handlers) == before
    _, said, one, _ = read(tmp_path / "log.jsonl")
    assert said["message"] == "a table with ‘quotes’\nand lines"
    assert said["level"] == "warning"
    assert (one["number"], one["path"], "nothing" in one) == (1, str(tmp_path), False)


def test_ctrl_c_is_a_warning_that_names_the_signal(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), log_to(tmp_path / "log.jsonl", "embed"):
        raise KeyboardInterrupt
    assert read(tmp_path / "log.jsonl")[-1] | {"time": "", "seconds": 0} == {
        "time": "", "level": "warning", "message": "longslide embed was stopped", "event": "end", "command": "embed",
        "seconds": 0, "signal": "SIGINT",
    }  # fmt: skip


class Process:
    """A worker that says what it has been given to say."""

    name = "cpu"

    def __init__(self, *says: tuple[Any, ...]) -> None:
        self.says = list(says)

    def start(self, *_: object) -> bool:
        return True

    def recv(self) -> tuple[Any, ...]:
        return self.says.pop(0)

    def send(self, answer: object) -> None: ...

    def terminate(self) -> None: ...

    def wait(self) -> None: ...


def test_what_other_processes_log_is_in_the_log_file_what_the_library_says_once(tmp_path: Path) -> None:
    def logged(fields: dict[str, Any] | None) -> tuple[Any, ...]:
        return ("logged", "longslide.data.slides" if fields is None else "longslide.events", 30, "damaged", fields)

    epoch, ended = logged({"event": "epoch", "fold": 0}), ("ended", 0, pickle.dumps(None))
    workers: Any = [Process(logged(None), ("next",), epoch, ended, logged(None), ("over",))]
    with log_to(tmp_path / "log.jsonl", "crossval"):
        TaskRun(workers, print, ["fold 0"], lambda number, result: None).run()  # type: ignore[arg-type]
    records = read(tmp_path / "log.jsonl")[1:-1]
    assert sorted(record.get("event", "library") for record in records) == ["epoch", "library"]
    assert [record["fold"] for record in of(records, "epoch")] == [0]
    assert {(record["level"], record["message"]) for record in records} == {("warning", "damaged")}


def test_a_log_file_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    words = ["embed", "x.svs", "--output", str(tmp_path / "out"), "--log-file", str(tmp_path / "file" / "log.jsonl")]
    assert main(words) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "choose another --log-file" in line


def test_only_the_first_of_several_training_processes_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(LongslideError):
        fit(DataOptions(tmp_path, tmp_path / "none.csv", task="binary"), log_file=tmp_path / "log.jsonl")
    assert not (tmp_path / "log.jsonl").exists()


def test_a_logger_of_lightning_s_writes_beside_the_history(tmp_path: Path) -> None:
    words = write_cohort(tmp_path)
    options = ["--data.task", "binary", "--model.aggregator", "mean", "--trainer.max-epochs", "2"]
    logger = ["--trainer.logger", "CSVLogger", f"--trainer.logger.save_dir={tmp_path / 'logs'}"]
    assert main(["fit", *words, *options, *quick(tmp_path / "run"), *logger]) == 0
    [metrics] = (tmp_path / "logs").rglob("metrics.csv")
    assert pd.read_csv(metrics)["val_loss"].dropna().tolist() == pytest.approx(
        pd.read_csv(tmp_path / "run" / "history.csv")["val_loss"].tolist()
    )


def test_what_is_no_number_is_left_out_of_a_line_for_json_has_none(tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    with log_to(tmp_path / "log", "fit"):
        event("metric", "AUC nan", {"value": float("nan"), "low": float("-inf"), "n": 3})
    records = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "log").read_text().splitlines()]
    assert {name: records[1].get(name) for name in ("value", "low", "n")} == {"value": None, "low": None, "n": 3}
