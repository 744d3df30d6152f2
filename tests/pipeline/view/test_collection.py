"""What is true by a table of labels is read as training reads it."""

from pathlib import Path

import pytest
from longslide import LongslideError
from longslide.pipeline.view.collection import NO_LABEL, _Reading
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
