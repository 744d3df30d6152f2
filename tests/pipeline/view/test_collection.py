"""What inputs say of slides; what is true by a table of labels is read as training reads it."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from longslide import LongslideError, write_synthetic_slide
from longslide.data.features.feature_file import write_features
from longslide.data.features.features import Features
from longslide.data.table import csv_of
from longslide.pipeline.predict.prediction import Prediction
from longslide.pipeline.view.collection import _Reading, _target, read_collection
from longslide.pipeline.view.viewed_slide import NO_LABEL, ViewedSlide
from longslide.prediction_columns import PredictionColumns
from longslide.task import Task

BINARY = Task("binary", ("label",), ("0", "1"))
SEVERAL = Task("multilabel", ("her2", "er"), ("her2", "er"))
SURVIVAL = Task("survival", ("days", "died"))


def target(tmp_path: Path, task: Task, *cells: str) -> str:
    table = tmp_path / "labels.csv"
    table.write_text(f"slide_id,{','.join(task.label)}\na,{','.join(cells)}\n")
    reading = _Reading()
    reading.task, reading.tables = task, [table]
    slide = reading.slide("a")
    reading.add_targets()
    return slide.target


@pytest.mark.parametrize(
    ("task", "cells", "said"),
    [
        (BINARY, ("1",), "1"),
        (BINARY, ("1.0",), "1"),
        (BINARY, ("",), ""),
        (SEVERAL, ("1.0", "0"), "her2"),
        (SEVERAL, ("TRUE", "true"), "her2, er"),
        (SEVERAL, ("False", "0.0"), NO_LABEL),
        (SEVERAL, ("1", ""), ""),
        (SURVIVAL, ("12", "1.0"), "12, event"),
        (SURVIVAL, ("12", "TRUE"), "12, event"),
        (SURVIVAL, ("12", "false"), "12, censored"),
    ],
)
def test_labels_are_said_in_the_words_of_the_prediction(
    task: Task, cells: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    assert target(tmp_path, task, *cells) == said


@pytest.mark.parametrize(("task", "cells"), [(SEVERAL, ("positive", "0")), (SURVIVAL, ("12", "dead"))])
def test_a_label_that_is_not_0_or_1_is_an_error_that_names_it(
    task: Task, cells: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises(
        LongslideError, match=r"labels\.csv: the label of a cannot be read: '(positive|dead)' is not 0 or 1"
    ):
        target(tmp_path, task, *cells)


def write_tile(path: Path) -> None:
    embedding, corner = np.ones((1, 8), np.float16), np.zeros((1, 2), np.int64)
    write_features(path, Features(path.stem, embedding, corner, 512, 512, 256, 0, 0.5, 0.25, (256, 256)))


def test_slides_beside_feature_files_that_are_not_shown_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tile(tmp_path / "a.h5")
    write_synthetic_slide(tmp_path / "a.svs", size=(256, 256))
    with caplog.at_level(logging.WARNING):
        assert list(read_collection([tmp_path]).slides) == ["a"]
    assert not caplog.records
    write_synthetic_slide(tmp_path / "b.svs", size=(256, 256))
    with caplog.at_level(logging.WARNING):
        assert list(read_collection([tmp_path]).slides) == ["a"]
    assert "only their slides are shown; give b.svs by name" in caplog.text
    assert list(read_collection([tmp_path, tmp_path / "b.svs"]).slides) == ["a", "b"]


def test_a_summary_with_a_word_for_a_number_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "summary.csv").write_text("slide_id,slide,status,reason,tiles,tissue_mm2\na,a.svs,done,,many,1.0\n")
    with pytest.raises(LongslideError, match=r"summary\.csv: a cell is not the number .*'many'"):
        read_collection([tmp_path])


def test_a_slide_has_the_model_of_the_fold_that_predicted_it(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    for fold in range(3):
        (run / f"fold_{fold}").mkdir(parents=True)
        (run / f"fold_{fold}" / "best.ckpt").touch()
    (run / "run.json").write_text(json.dumps({"task": BINARY.to_dict()}))
    columns = PredictionColumns(BINARY).all
    rows = [
        {"level": "slide", "fold": fold, "part": part, "slide_id": name, "prediction": "1"}
        | {"probability_0": 0.2, "probability_1": 0.8}
        for fold, part, name in ((0, "val", "a"), (2, "test", "a"), (1, "test", "b"))
    ]
    (run / "predictions.csv").write_bytes(csv_of(columns, [dict.fromkeys(columns, "") | row for row in rows]))
    collection = read_collection([run])
    assert [model.name for model in collection.models] == ["mine, fold 0", "mine, fold 1", "mine, fold 2"]
    [model] = collection.slides["a"].models
    assert (model.name, model.checkpoint) == ("mine, fold 2", run / "fold_2" / "best.ckpt")
    assert collection.slides["b"].models[0].name == "mine, fold 1"


def test_slides_of_one_name_have_ids_from_their_paths(tmp_path: Path) -> None:
    for name in ("site_a", "site_b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.svs").touch()
    with pytest.raises(LongslideError, match="or give --id-from path"):
        read_collection([tmp_path])
    assert list(read_collection([tmp_path], id_from="path").slides) == ["site_a__1", "site_b__1"]
    both = read_collection([tmp_path / "site_b", tmp_path / "site_a"], id_from="path")
    assert sorted(both.slides) == ["site_a__1", "site_b__1"], "as embed names them"


def test_a_file_name_with_a_backslash_stops_no_viewer(tmp_path: Path) -> None:
    for name in ("a.svs", "b\\c.svs"):
        (tmp_path / name).touch()
    assert list(read_collection([tmp_path]).slides) == ["a", "b%5Cc"]


def test_what_is_no_slide_is_refused_in_a_line_whatever_its_suffix(tmp_path: Path) -> None:
    (tmp_path / "best.ckpt").write_bytes(b"PK\3\4 no slide")
    write_synthetic_slide(tmp_path / "a.svs", size=(256, 256)).rename(tmp_path / "a.slide")
    assert list(read_collection([tmp_path / "a.slide"]).slides) == ["a"]
    with pytest.raises(LongslideError, match=r"best\.ckpt: not a slide"):
        read_collection([tmp_path / "a.slide", tmp_path / "best.ckpt"])


def test_how_far_a_value_is_off_and_which_risks_had_an_event() -> None:
    value = ViewedSlide("a", prediction=Prediction("slide", "a", value=2.5), target="4")
    assert value.error == 1.5
    assert value.event is None
    risk = Prediction("slide", "a", risk=0.3)
    for cells, event in ((("12", "1"), True), (("12", "0"), False)):
        slide = ViewedSlide("a", prediction=risk, target=_target(cells, SURVIVAL))
        assert (slide.event, slide.error) == (event, None)
    assert ViewedSlide("a", prediction=risk).event is None
