"""Tables of labels: what they may look like, what is listed, what is refused."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from longslide.data.cohort.cohort import Cohort, read_cohort
from longslide.data.cohort.task_file import read_task_file
from longslide.errors import LongslideError
from longslide.task import Task

from ..refusals import refused

Write = Callable[..., Path]


@pytest.fixture
def features(tmp_path: Path, slide: Write) -> Path:
    for number, name in enumerate("abcdef"):
        slide(name, tiles=3, seed=number)
    return tmp_path / "features"


def labelled(*labels: Any, **more: list[Any]) -> list[dict[str, Any]]:
    columns: dict[str, list[Any]] = {"slide_id": list("abcdefgh"[: len(labels)]), "label": list(labels)} | more
    return pd.DataFrame(columns).to_dict("records")


refusal = partial(refused, read_cohort)


def names(cohort: Cohort) -> list[str]:
    """The label of each row, by the class order of the task."""
    assert cohort.task is not None
    assert cohort.targets is not None
    return [cohort.task.classes[number] for number in cohort.targets]


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_labels_may_be_words(name: str, features: Path, rows: Write) -> None:
    cohort = read_cohort(rows(labelled("luad", "lusc", "luad", "normal"), name), features, task="multiclass")
    assert cohort.task == Task("multiclass", ("label",), ("luad", "lusc", "normal"))
    assert names(cohort) == ["luad", "lusc", "luad", "normal"]


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
@pytest.mark.parametrize("gap", [False, True])
def test_numbers_are_in_the_order_of_numbers_and_whole_even_beside_empty_cells(
    name: str, gap: bool, features: Path, rows: Write
) -> None:
    labels = [10, 9, 2, 10] + ([None] if gap else [])  # a gap makes pandas write 10.0
    cohort = read_cohort(rows(labelled(*labels), name), features, task="ordinal")
    assert cohort.task is not None
    assert cohort.task.classes == ("2", "9", "10")
    assert names(cohort) == ["10", "9", "2", "10"]


def test_the_order_of_classes_that_is_given_is_kept(features: Path, rows: Write) -> None:
    table = rows(labelled("yes", "no", "no"))
    cohort = read_cohort(table, features, task="binary", classes=["yes", "no"])
    assert cohort.task is not None
    assert cohort.task.classes == ("yes", "no")
    np.testing.assert_array_equal(cohort.targets, [0, 1, 1])


@pytest.mark.parametrize("classes", [None, ["MSI-H", "MSS"], ["MSS", "MSI-H"]])
def test_the_positive_class_is_said_and_can_be_set(classes: list[str] | None, features: Path, rows: Write) -> None:
    table = rows(labelled("MSS", "MSI-H", "MSS"))
    cohort = read_cohort(table, features, task="binary", classes=classes, positive="MSI-H")
    assert cohort.task is not None
    assert cohort.task.classes == ("MSS", "MSI-H")
    assert cohort.task.positive == "MSI-H"
    np.testing.assert_array_equal(cohort.targets, [0, 1, 0])
    assert any(note.startswith("positive class: MSI-H (of MSS, MSI-H;") for note in cohort.notes)
    unset = read_cohort(table, features, task="binary", classes=classes)
    last = classes[-1] if classes else "MSS"
    assert any(note.startswith(f"positive class: {last} (of") for note in unset.notes), "said with classes given, too"


@pytest.mark.parametrize("positive", ["0", 0, 0.0])
def test_a_positive_class_may_be_a_number(positive: str | float, features: Path, rows: Write) -> None:
    cohort = read_cohort(rows(labelled(0, 1, 1)), features, task="binary", positive=positive)
    assert names(cohort) == ["0", "1", "1"]
    np.testing.assert_array_equal(cohort.targets, [1, 0, 0])


def test_a_positive_class_that_is_no_class_or_of_another_task_is_refused(features: Path, rows: Write) -> None:
    table = rows(labelled("MSS", "MSI-H", "MSS"))
    said = refusal(table, features, task="binary", positive="MSI")
    assert said.startswith("--data.positive MSI is none of the classes of 'label'")
    assert said.endswith(": MSI-H, MSS")
    said = refusal(table, features, task="multiclass", positive="MSI-H")
    assert said == "--data.positive MSI-H: only a binary task has a positive class, this is a multiclass task"
    assert "this is without labels" in refusal(None, features, positive="MSI-H")


def test_a_class_may_be_called_none_if_it_is_named(features: Path, rows: Write) -> None:
    table = rows(labelled("None", "mild", "None", "NA"))
    assert names(read_cohort(table, features, task="binary", classes=["None", "mild"])) == ["None", "mild", "None"]


def test_classes_that_differ_in_case_alone_are_two_if_they_are_named(features: Path, rows: Write) -> None:
    table = rows(labelled("t1a", "T1A", "t1a"))
    assert names(read_cohort(table, features, task="binary", classes=["t1a", "T1A"])) == ["t1a", "T1A", "t1a"]


def test_truth_values_are_classes_false_first(features: Path, rows: Write) -> None:
    cohort = read_cohort(rows(labelled(True, False, True), "t.parquet"), features, task="binary")
    assert cohort.task is not None
    assert cohort.task.classes == ("False", "True")
    assert any(note.startswith("positive class: True (of False, True;") for note in cohort.notes)
    np.testing.assert_array_equal(cohort.targets, [1, 0, 1])


def test_slides_without_features_and_features_without_label_are_listed_and_said(features: Path, rows: Write) -> None:
    table = rows(labelled("x", "y", None, "x", "y", slide_id=["a", "b", "c", "missing", "gone"]))
    cohort = read_cohort(table, features, task="binary")
    assert list(cohort.rows["slide_id"]) == ["a", "b"]
    assert cohort.without_features == ("missing", "gone")
    assert cohort.without_label == ("c", "d", "e", "f")
    notes = "\n".join(cohort.notes)
    assert "2 slides" in notes
    assert "missing" in notes
    assert "4 feature files have no label: c, d, e and 1 more" in notes


def test_each_slide_is_a_patient_without_the_column_and_that_is_said(features: Path, rows: Write) -> None:
    cohort = read_cohort(rows(labelled(0, 1)), features, task="binary")
    assert list(cohort.rows["patient_id"]) == ["a", "b"]
    assert any("no column patient_id" in note for note in cohort.notes)


@pytest.mark.parametrize("column", ["patient_id", "pat_id", "case_id"])
def test_patients_keep_their_spelling(column: str, features: Path, rows: Write) -> None:
    cohort = read_cohort(rows(labelled(0, 1, **{column: ["007", "8.0"]})), features, task="binary")
    assert list(cohort.rows["patient_id"]) == ["007", "8.0"]


def test_all_columns_stay_as_the_user_spelt_them(features: Path, rows: Write) -> None:
    cohort = read_cohort(rows(labelled(0, 1, stage=["IIA", "01"], age=[61, 70.5])), features, task="binary")
    assert list(cohort.rows["stage"]) == ["IIA", "01"]
    assert list(cohort.rows["age"]) == ["61.0", "70.5"]


def test_suffixes_of_slide_files_are_taken_off_and_dots_in_names_stay(
    tmp_path: Path, slide: Write, rows: Write
) -> None:
    for name in ("TCGA-1.2A", "b", "c.svs"):
        slide(name)
    table = rows(labelled(0, 1, 0, slide_id=["TCGA-1.2A.svs", "b.h5", "c.svs"]))
    cohort = read_cohort(table, tmp_path / "features", task="binary")
    assert [path.name for path in cohort.files] == ["TCGA-1.2A.h5", "b.h5", "c.svs.h5"]


def test_several_labels_may_be_missing(features: Path, rows: Write) -> None:
    table = rows(labelled(1, 0, None, None, KRAS=[True, None, False, None]))
    cohort = read_cohort(table, features, task="multilabel", label=["label", "KRAS"])
    assert cohort.task == Task("multilabel", ("label", "KRAS"), ("label", "KRAS"))
    assert cohort.targets is not None
    assert cohort.targets.dtype == np.float32
    np.testing.assert_array_equal(cohort.targets, [[1, 1], [0, np.nan], [np.nan, 0]])
    assert "d" in cohort.without_label


def test_regression_reads_numbers(features: Path, rows: Write) -> None:
    cohort = read_cohort(rows(labelled(0.5, -2, None, 1e3)), features, task="regression")
    np.testing.assert_array_equal(cohort.targets, np.array([0.5, -2, 1e3], np.float32))


def test_survival_reads_time_and_event(features: Path, rows: Write) -> None:
    table = rows(labelled(10, 20, 30, 41, None, event=[1, 0, 1, 1, 1]))
    cohort = read_cohort(table, features, task="survival", label=["label", "event"])
    np.testing.assert_array_equal(cohort.targets, [[10, 1], [20, 0], [30, 1], [41, 1]])
    assert cohort.task == Task("survival", ("label", "event"), times=(20, 30, 36))
    discrete = read_cohort(table, features, task="survival", label=["label", "event"], discrete_time=True)
    assert discrete.task is not None
    assert discrete.task.times[-1] >= 41, "the last event lies in the last interval"
    given = read_cohort(table, features, task="survival", label=["label", "event"], times=[12, 24])
    assert given.task is not None
    assert given.task.times == (12, 24)


def test_without_a_table_every_file_is_a_slide_without_a_label(features: Path) -> None:
    cohort = read_cohort(None, features)
    assert list(cohort.rows["slide_id"]) == list("abcdef")
    assert cohort.task is None
    assert cohort.targets is None


def test_patients_whose_slides_differ_are_found(features: Path, rows: Write) -> None:
    table = rows(labelled(0, 1, 1, 1, patient_id=["p", "p", "q", "q"]))
    assert read_cohort(table, features, task="binary").mixed_patients == ["p"]


PANDA = """name: panda
setting: multi_class
label_dict:
  0: 0
  1: 1
  2: 2
max_tiles: 1000000
shuffle_tiles: true
add_metrics: ['qwk']
"""

MUTATION = """name: mutation
setting: multi_label
label_dict:
  TP53: 1
  EGFR: 0
max_tiles: 100
"""


def test_the_tables_and_task_files_of_prov_gigapath_are_read_as_they_are(
    tmp_path: Path, features: Path, rows: Write
) -> None:
    (tmp_path / "panda.yaml").write_text(PANDA)
    rows(labelled(0, 1, 2, slide_id=["a.svs", "b.svs", "c.svs"], pat_id=["1", "2", "3"]), "panda/train_0.csv")
    rows(labelled(0, slide_id=["d.svs"], pat_id=["4"]), "panda/val_0.csv")
    rows(labelled(2, slide_id=["e.svs"], pat_id=["5"]), "panda/test_0.csv")
    cohort = read_cohort(tmp_path / "panda", features, task_file=tmp_path / "panda.yaml")
    assert cohort.task == Task("multiclass", ("label",), ("0", "1", "2"))
    patients = dict(zip(cohort.rows["slide_id"], cohort.rows["patient_id"], strict=True))
    assert patients == {"a": "1", "b": "2", "c": "3", "d": "4", "e": "5"}
    assert cohort.max_tiles == 1_000_000
    assert cohort.given_splits is not None
    parts = dict(zip(cohort.given_splits["slide_id"], cohort.given_splits["fold_0"], strict=True))
    assert parts == {"a": "train", "b": "train", "c": "train", "d": "val", "e": "test"}


def test_a_multi_label_task_file_names_the_columns(tmp_path: Path, features: Path, rows: Write) -> None:
    (tmp_path / "mutation.yaml").write_text(MUTATION)
    # prov-gigapath writes pandas' index and truth values
    table = rows(labelled("", "", **{"Unnamed: 0": [0, 1], "EGFR": [False, True], "TP53": [True, False]}))
    cohort = read_cohort(table, features, task_file=tmp_path / "mutation.yaml")
    assert cohort.task == Task("multilabel", ("EGFR", "TP53"), ("EGFR", "TP53"))
    np.testing.assert_array_equal(cohort.targets, [[0, 1], [1, 0]])
    assert "Unnamed: 0" not in cohort.rows.columns


def test_values_that_share_a_number_are_one_class(tmp_path: Path, features: Path, rows: Write) -> None:
    (tmp_path / "t.yaml").write_text("setting: multi_class\nlabel_dict: {low: 0, mid: 0, high: 1}\n")
    cohort = read_cohort(rows(labelled("low", "mid", "high")), features, task_file=tmp_path / "t.yaml")
    assert cohort.task == Task("binary", ("label",), ("low/mid", "high"))
    np.testing.assert_array_equal(cohort.targets, [0, 0, 1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("setting: telepathy", "'telepathy' is none of binary"),
        ("setting: multi_class", "no `label_dict`"),
        ("label_dict: {a: x}", "no `label_dict`"),
        ("[1, 2", "not YAML"),
        ("- 1", "not a task file"),
        ("label_dict: {a: 0, b: 1}\nmax_tiles: 0", "`max_tiles` 0"),
    ],
)
def test_a_broken_task_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(LongslideError, match=message) as caught:
        read_task_file(tmp_path / "t.yaml")
    assert "t.yaml" in str(caught.value)


def test_a_column_that_is_not_there_is_answered_with_those_that_look_like_it(features: Path, rows: Write) -> None:
    message = refusal(rows(labelled(0, 1, Grading=[1, 2])), features, task="multiclass", label="grade")
    assert "no column 'grade'; did you mean 'Grading'?" in message
    message = refusal(rows([{"x": 1, "y": 2}]), features, task="binary")
    assert "no column 'slide_id'; it has x, y" in message


@pytest.mark.parametrize(
    ("task", "labels", "message"),
    [
        ("binary", ["x", "x", None], "has only one class (x)"),
        ("multiclass", ["x", "x"], "has only one class (x)"),
        ("binary", ["x", "y", "z"], "has 3 classes (x, y, z), a binary task has two"),
        ("multiclass", ["Luminal A", "luminal_a", "basal"], "has 'Luminal A' and 'luminal_a', which may be one class"),
        ("regression", [1, 1], "has only 1 among the slides"),
        ("regression", [1, "soft"], "'label' of b is 'soft', not a finite number"),
        ("regression", [1, "inf"], "'label' of b is 'inf', not a finite number"),
        ("multilabel", [0, 2], "'label' of b is '2', not 0 or 1"),
        ("multilabel", [0, 0], "has only 0 among the slides"),
        ("survival", [0, 1], "needs two label columns, the time and the event, not label"),
        ("binary", [None, None], "label is empty for all slides that have features"),
        (
            "ordinal",
            ["high", "low", "Medium"],
            "confirm or correct it, from low to high: --data.classes '[low, Medium, high]'",
        ),
        ("ordinal", ["G1", "G10", "G2"], "--data.classes '[G1, G2, G10]'"),
    ],
)
def test_labels_of_no_use_are_refused_in_one_line(
    task: str, labels: list[Any], message: str, features: Path, rows: Write
) -> None:
    assert message in refusal(rows(labelled(*labels)), features, task=task, label="label")


@pytest.mark.parametrize(
    ("times", "events", "message"),
    [
        ([1, 2], [0, 0], "no slide with features has an event"),
        ([1, -2], [1, 0], "'label' of b is below 0"),
        ([1, 2], [1, "dead"], "'event' of b is 'dead', not 0 or 1"),
    ],
)
def test_survival_of_no_use_is_refused(
    times: list[Any], events: list[Any], message: str, features: Path, rows: Write
) -> None:
    table = rows(labelled(*times, event=events))
    assert message in refusal(table, features, task="survival", label=["label", "event"])


def test_times_must_ascend(features: Path, rows: Write) -> None:
    table = rows(labelled(1, 2, event=[1, 0]))
    assert "must be above 0 and ascend" in refusal(
        table, features, task="survival", label=["label", "event"], times=[2, 1]
    )


def test_classes_and_table_must_fit(features: Path, rows: Write) -> None:
    table = rows(labelled("x", "y", "y"))
    assert "has 'y' in 2 rows, not one of the classes x, z" in refusal(
        table, features, task="binary", classes=["x", "z"]
    )
    absent = refusal(table, features, task="multiclass", classes=["x", "y", "z"])
    assert "no slide with features has the class 'z'" in absent
    # An external cohort need not have them all.
    external = read_cohort(table, features, task="multiclass", classes=["x", "y", "z"], all_classes=False)
    assert external.task is not None
    options = {"task": "binary", "classes": ["x", "z"], "all_classes": False}
    assert "spell the classes as in training, or empty those cells" in refusal(table, features, **options)
    assert external.task.classes == ("x", "y", "z")


def test_broken_tables_are_named(tmp_path: Path, features: Path, rows: Write) -> None:
    assert "no such table" in refusal(tmp_path / "nothing.csv", features)
    (tmp_path / "empty.csv").write_text("slide_id,label\n")
    assert "no rows" in refusal(tmp_path / "empty.csv", features)
    (tmp_path / "broken.parquet").write_bytes(b"nonsense")
    assert "cannot be read as a table" in refusal(tmp_path / "broken.parquet", features)
    assert "more than once (a)" in refusal(
        rows(labelled(0, 1, 2, slide_id=["a", "a.svs", "b"])), features, task="multiclass"
    )
    assert "row 2 has no slide_id" in refusal(rows(labelled(0, 1, slide_id=["a", None])), features, task="binary")
    assert "patient_id is empty for b" in refusal(rows(labelled(0, 1, patient_id=["p", None])), features, task="binary")
    nowhere = rows(labelled(0, 1, slide_id=["x.svs", "y.svs"]))
    assert "none of its 2 slides has a feature file such as" in refusal(nowhere, features, task="binary")
    assert "no such folder" in refusal(rows(labelled(0, 1)), tmp_path / "nowhere", task="binary")


def as_excel_saves_it(path: Path, frame: pd.DataFrame) -> Path:
    """The same table as Excel in a country of decimal commas saves it."""
    path.write_bytes(frame.to_csv(index=False, sep=";", decimal=",", lineterminator="\r\n").encode("utf-8-sig"))
    return path


@pytest.mark.parametrize("kind", [".csv", ".tsv", ".parquet", ".xlsx", "excel"])
def test_the_same_table_in_any_form_is_the_same_cohort(kind: str, tmp_path: Path, features: Path) -> None:
    frame = pd.DataFrame(
        {
            "Slide_ID": ["a.svs", "b.svs", "c.svs", "d.svs"],
            "Case ID": ["007", "1e5", "1.0x", "007"],
            "months": [17.4, 2.5, 30.25, 4.0],
            "dead": [1, 0, 1, 0],
            "age": [61.5, 70.25, 48.0, 61.5],
            "split": ["train", "train", "val", "train"],
        }
    )
    table = tmp_path / f"cohort{'.csv' if kind == 'excel' else kind}"
    if kind == ".parquet":
        frame.to_parquet(table)
    elif kind == ".xlsx":
        frame.to_excel(table, index=False)
    elif kind == "excel":
        as_excel_saves_it(table, frame)
    else:
        table.write_text(frame.to_csv(index=False, sep="," if kind == ".csv" else "\t"))
    cohort = read_cohort(table, features, task="survival", label=["months", "dead"])
    assert list(cohort.rows["slide_id"]) == list("abcd")
    assert list(cohort.rows["patient_id"]) == ["007", "1e5", "1.0x", "007"]
    np.testing.assert_array_equal(cohort.targets, frame[["months", "dead"]].to_numpy())
    np.testing.assert_array_equal(pd.to_numeric(cohort.rows["age"]), frame["age"])
    assert cohort.given_splits is not None
    assert list(cohort.given_splits["fold_0"]) == ["train", "train", "val", "train"]


def test_a_table_of_slide_paths_that_embed_takes_has_their_ids_here_too(features: Path, rows: Write) -> None:
    table = rows([{"slide": "slides/a.svs", "label": 0}, {"slide": "/elsewhere/b.unusual", "label": 1}])
    assert list(read_cohort(table, features, task="binary").rows["slide_id"]) == ["a", "b"]
    table = rows([{"slide": r"C:\slides\a.svs", "label": 0}, {"slide": r"site 1\b.svs", "label": 1}])
    assert list(read_cohort(table, features, task="binary").rows["slide_id"]) == ["a", "b"], "written on Windows"
    table = rows([{"slide": "x/a.svs", "slide_id": "c", "label": 0}, {"slide": "b.svs", "slide_id": None, "label": 1}])
    assert list(read_cohort(table, features, task="binary").rows["slide_id"]) == ["c", "b"]


def test_a_column_that_may_be_the_patient_is_asked_for(features: Path, rows: Write) -> None:
    table = rows(labelled(0, 1, 0, Subject=["p", "p", "q"]))
    assert (
        "is the column Subject the patient? Give --data.patient-column Subject, or --data.patient-column none"
        in refusal(table, features, task="binary")
    )
    cohort = read_cohort(table, features, task="binary", patients="Subject")
    assert list(cohort.rows["patient_id"]) == ["p", "p", "q"]
    assert list(read_cohort(table, features, task="binary", patients="none").rows["patient_id"]) == ["a", "b", "c"]


def test_patients_that_may_be_one_are_remarked(features: Path, rows: Write) -> None:
    table = rows(labelled(0, 1, 0, 1, patient_id=["P1", "p1", "P01", "P2"]))
    assert "patients that may be one and are taken for several: P1 and p1 and P01;" in "\n".join(
        read_cohort(table, features, task="binary").notes
    )


def test_a_number_that_may_be_thousands_is_refused(features: Path, rows: Write) -> None:
    assert "'1,234', not a finite number; write decimals with a point, and thousands without a comma" in refusal(
        rows(labelled("1,234", "5,678")), features, task="regression"
    )
