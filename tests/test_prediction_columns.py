"""One grammar for the columns of predictions."""

import pandas as pd
import pytest
from longslide.prediction_columns import PredictionColumns, survival_times, time_text
from longslide.task import Task

TASKS = [
    Task("binary", ("status",), ("no", "yes")),
    Task("multiclass", ("subtype",), ("a", "b_c", "survival_3")),
    Task("ordinal", ("grade",), ("1", "2", "3")),
    Task("multilabel", ("EGFR", "KRAS"), ("EGFR", "KRAS")),
    Task("regression", ("purity",)),
    Task("survival", ("months", "death"), times=(0.5, 12, 1234567.25)),
]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
def test_columns_are_distinct_and_each_has_one_place(task: Task) -> None:
    columns = PredictionColumns(task)
    assert len(set(columns.all)) == len(columns.all)
    rows = pd.DataFrame({name: ["x"] for name in reversed(columns.all)})
    assert list(columns.arrange(rows)) == columns.all
    assert list(columns.arrange(rows[["level"]])) == columns.all, "what is not known is empty"
    assert columns.text <= set(columns.all)


def test_every_class_and_label_has_its_columns() -> None:
    assert PredictionColumns(TASKS[1]).score == ["probability_a", "probability_b_c", "probability_survival_3"]
    assert PredictionColumns(TASKS[3]).target == ["target_EGFR", "target_KRAS"]
    assert PredictionColumns(TASKS[3]).decision == ["prediction_EGFR", "prediction_KRAS"]
    assert PredictionColumns(TASKS[4]).spread == ["spread_prediction"]


def test_the_times_of_survival_are_read_as_they_were_written() -> None:
    task = TASKS[5]
    assert tuple(survival_times(PredictionColumns(task).all).values()) == task.times
    assert [time_text(time) for time in task.times] == ["0.5", "12", "1234567.25"]
    assert survival_times(PredictionColumns(TASKS[0]).all) == {}
