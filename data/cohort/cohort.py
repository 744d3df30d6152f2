"""The cohort: which slides there are, whose they are, what is to be predicted of them, where their features lie."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from ...errors import LongslideError
from ...plurals import count
from ...task import CLASSIFICATION, Task, TaskKind
from ..patients import patient_column, probable_twins
from ..slides.slide_table import id_of_name, slide_ids
from ..table import (
    ID_COLUMNS,
    MISSING,
    as_text,
    decimal_points,
    listed,
    plain_name,
    read_table,
    require_columns,
)
from .labels import LabelReader
from .split_folder import FOLD_COLUMN, read_split_folder
from .task_file import TaskFile, read_task_file


@dataclass(frozen=True)
class Cohort:
    """The slides that have both features and a label.

    Attributes:
        rows: One row per slide, all columns of the table as text, numbered from 0; `slide_id` is the name of the feature
            file, `patient_id` is there whatever the table calls it.
        task: What is to be predicted; None without labels (for self-supervised training).
        targets: Of each row: `(N,)` int64 class for `binary`, `multiclass`, `ordinal`; `(N, C)` float32 with NaN for
            missing for `multilabel`; `(N,)` float64 for `regression`; `(N, 2)` float64 time and event for `survival`.
        files: Feature file of each row.
        given_splits: The splits that the table itself holds: `slide_id`, `patient_id`, `fold_0`, ...; None if it has none.
        without_features: Slides of the table that have no feature file.
        without_label: Feature files without a row in the table, and rows without a label.
        max_tiles: The limit that a task file sets.
        notes: What the user should know.
        patient_column: The column that names the patients; None if each slide is taken for one.
    """

    rows: pd.DataFrame
    task: Task | None
    targets: np.ndarray | None
    files: tuple[Path, ...]
    given_splits: pd.DataFrame | None = None
    without_features: tuple[str, ...] = ()
    without_label: tuple[str, ...] = ()
    max_tiles: int | None = None
    notes: tuple[str, ...] = ()
    patient_column: str | None = None

    @property
    def labelled_task(self) -> Task:
        """What is to be predicted.

        Raises:
            LongslideError: There are no labels.
        """
        if self.task is None:
            raise LongslideError("no labels: give --data.table and --data.task, or --data.task-file")
        return self.task

    @property
    def mixed_patients(self) -> list[str]:
        """Patients whose slides have different labels."""
        if self.targets is None:
            return []
        wide = pd.DataFrame(self.targets.reshape(len(self.targets), -1))
        different = wide.groupby(self.rows["patient_id"].to_numpy()).nunique().gt(1).any(axis=1)
        return [str(patient) for patient in different.index[different]]


def read_cohort(
    table: Path | None,
    features: Path | Mapping[str, Path],
    *,
    task: TaskKind | None = None,
    label: str | Sequence[str] | None = None,
    classes: Sequence[str | int | float] | None = None,
    positive: str | int | float | None = None,
    times: Sequence[float] | None = None,
    discrete_time: bool = False,
    task_file: Path | None = None,
    all_classes: bool = True,
    patients: str | None = None,
) -> Cohort:
    """Join a table of labels with a folder of feature files, or with slides.

    Args:
        table: A table (see `read_table`) with `slide_id` (a suffix such as `.svs` is taken off) or `slide`, the path of the
            slide; optionally `patient_id` (also `pat_id`, `case_id`), `site`, columns `fold_0`, `fold_1`, ... or `split` of
            train/val/test, and any others; or a folder of `train_0.csv`, `val_0.csv`, `test_0.csv`, ... as prov-gigapath
            writes them. None: every feature file is a slide and a patient of its own.
        features: Folder with `<slide_id>.h5` of any layout that `read_features` takes; or, before there are any, the slide
            files by their ids, which then stand for feature files in the result.
        task: Kind of task; None reads no labels.
        label: The label column; several for `multilabel`, time and event for `survival`. Default: `label`.
        classes: The values of the label column in the order wanted (negative first for `binary`, low to high for
            `ordinal`). Default: sorted, as numbers if all are numbers.
        positive: The positive class of a binary task. Default: the last of the classes.
        times: Ends of the intervals of discrete-time survival, or times at which Cox survival is reported. Default: from
            the quarters of the event times, rounded to two digits: like class names, they are part of the question.
        discrete_time: Discrete-time survival instead of Cox's.
        task_file: YAML task file of prov-gigapath, instead of `task`, `label` and `classes`.
        all_classes: Require that each class occurs (and each label both ways, and one event at least).
        patients: The column that names the patient, or `none`. Default: `patient_id`, `pat_id` or `case_id`.

    Returns:
        The cohort.

    Raises:
        LongslideError: The table cannot be read, lacks a column, names a slide twice or leaves a patient empty; a column
            looks like the patient, and is neither known nor given; a label is not what the task needs; no slide has both
            features and a label.
    """
    if isinstance(features, Path) and not features.is_dir():
        raise LongslideError(
            f"{features}: no such folder of feature files; give the output folder of `longslide embed`"
        )
    asked = _asked(task, task_file)
    labels = (label,) if isinstance(label, str) else tuple(label or (asked.label if asked else ()))
    names = tuple(map(as_text, classes or (asked.classes if asked else ())))
    chosen = None if positive is None else as_text(positive)
    if chosen is not None and (asked is None or asked.kind != "binary"):
        what = "without labels" if asked is None else f"a {asked.kind} task"
        raise LongslideError(f"--data.positive {chosen}: only a binary task has a positive class, this is {what}")
    notes: list[str] = []

    if isinstance(features, Path):
        there = {path.stem: path for path in features.glob("*.h5") if not path.name.startswith(".")}
    else:
        there = dict(features)
    what = "feature file" if isinstance(features, Path) else "slide"
    if table is None:
        assert isinstance(features, Path), "slides without a table have no labels"
        source = features
        frame, splits = _every_file(there, features), None
    else:
        source = table
        frame, splits = _read_table(table, frozenset(names) | ({chosen} if chosen else set()), patients)
    frame, column = _with_ids(frame, source, there, patients, labels, notes)
    words = ("slide_id", "patient_id", *(labels if asked is not None and asked.kind in CLASSIFICATION else ()))
    frame = frame.apply(lambda column: column if column.name in words else decimal_points(column))
    ids = frame["slide_id"]
    own = {"slide_id": ids, "patient_id": frame["patient_id"]}  # the rows of a folder's splits are those of its table
    splits = _split_columns(frame) if splits is None else splits.assign(**own)
    has_features = ids.isin(there).to_numpy()
    if not has_features.any():
        there_is_none = f"{source}: none of its {count(len(frame), 'slide')} "
        if not isinstance(features, Path):
            raise LongslideError(
                f"{there_is_none}is among those given; its slide_id must be theirs, such as {min(there)}"
            )
        raise LongslideError(
            f"{there_is_none}has a feature file such as {features / ids[0]}.h5"
            + (" (.pt files, which hold no coordinates, are not read)" if any(features.glob("*.pt")) else "")
        )
    problem, targets, has_label = None, None, np.ones(len(frame), bool)
    if asked is not None:
        reader = LabelReader(source, frame, has_features, labels, names, dict(asked.renamed), all_classes, chosen)
        problem, targets, has_label = reader.read(asked.kind, times, discrete_time)
    keep = has_features & has_label
    without_features = tuple(ids[~has_features])
    without_label = tuple(ids[has_features & ~has_label]) + tuple(sorted(set(there) - set(ids)))
    if without_features:
        notes.append(
            f"{count(len(without_features), 'slide')} of {source} "
            f"{'has' if len(without_features) == 1 else 'have'} no {what}: {listed(without_features)}"
        )
    if without_label:
        notes.append(f"{count(len(without_label), f'{what} has', f'{what}s have')} no label: {listed(without_label)}")
    if problem is not None:
        notes += _choices(problem, settled=bool(names))
    rows = frame[keep].reset_index(drop=True)
    return Cohort(
        rows=rows,
        task=problem,
        targets=None if targets is None else targets[keep],
        files=tuple(there[slide] for slide in rows["slide_id"]),
        given_splits=splits,
        without_features=without_features,
        without_label=without_label,
        max_tiles=asked.max_tiles if asked else None,
        notes=tuple(notes),
        patient_column=column,
    )


def _asked(task: TaskKind | None, task_file: Path | None) -> TaskFile | None:
    if task_file is None:
        return None if task is None else TaskFile(task)
    asked = read_task_file(task_file)
    if task is not None and task != asked.kind and not {task, asked.kind} <= set(CLASSIFICATION):
        raise LongslideError(f"{task_file}: a task of kind {asked.kind}, and {task} was asked for; drop one of the two")
    return replace(asked, kind=task or asked.kind)


def _choices(task: Task, settled: bool) -> list[str]:
    """The positive class, and what was settled for the user, who may want it otherwise."""
    if task.kind == "binary":
        return [f"positive class: {task.positive} (of {', '.join(task.classes)}; --data.positive for the other)"]
    if task.kind in CLASSIFICATION and not settled:
        return [
            f"classes of {task.label[0]}, in this order: {', '.join(task.classes)} (--data.classes for another order)"
        ]
    return []


def _every_file(there: Collection[str], features: Path) -> pd.DataFrame:
    if not there:
        raise LongslideError(f"{features}: no feature files (.h5) in this folder")
    return pd.DataFrame({"slide_id": sorted(there)})


def _read_table(
    table: Path, never_missing: frozenset[str], patients: str | None
) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    if not table.is_dir():
        return read_table(table, MISSING - never_missing), None
    frame = read_split_folder(table, patients)
    folds = [name for name in frame.columns if FOLD_COLUMN.fullmatch(name)]
    return frame.drop(columns=folds), frame[folds]


def _with_ids(
    frame: pd.DataFrame,
    source: Path,
    there: Collection[str],
    chosen: str | None,
    labels: Sequence[str],
    notes: list[str],
) -> tuple[pd.DataFrame, str | None]:
    ids = slide_ids(frame)
    if ids is None:
        require_columns(source, frame, ID_COLUMNS)
    assert ids is not None
    if ids.isna().any():
        raise LongslideError(f"{source}: row {int(ids.isna().argmax()) + 1} has no slide_id")
    ids = ids.map(lambda name: id_of_name(name, there))
    twice = ids[ids.duplicated()]
    if len(twice):
        raise LongslideError(
            f"{source}: {count(twice.nunique(), 'slide is', 'slides are')} in the table more than once "
            f"({listed(list(twice.unique()))}); "
            "leave one row per slide"
        )
    column = patient_column(source, frame, chosen, option="--data.patient-column", others=labels)
    if column is None:
        patients = ids
        notes.append(f"{source} has no column patient_id: each slide is taken for a patient of its own")
    else:
        patients = frame[column]
        if patients.isna().any():
            raise LongslideError(
                f"{source}: {column} is empty for {listed(list(ids[patients.isna()]))}; fill it in, so that no patient is "
                "in two parts of a split"
            )
        if column != "patient_id":
            notes.append(f"patients are those of the column {column}")
        if twins := probable_twins(patients.unique()):
            pairs = listed([" and ".join(group) for group in twins])
            notes.append(
                f"{source}: patients that may be one and are taken for several: {pairs}; spell them alike if they are, so "
                "that none is in two parts of a split"
            )
    replaced = [name for name in frame.columns if plain_name(name) in (*ID_COLUMNS, "patient_id")]
    rest = frame.drop(columns=replaced)
    own = pd.DataFrame({"slide_id": ids, "patient_id": patients})
    return pd.concat([own, rest], axis=1).reset_index(drop=True), column


def _split_columns(frame: pd.DataFrame) -> pd.DataFrame | None:
    folds = sorted(
        (name for name in frame.columns if FOLD_COLUMN.fullmatch(name)), key=lambda name: int(name.split("_")[1])
    )
    if folds:
        return frame[["slide_id", "patient_id", *folds]]
    if "split" in frame.columns and frame["split"].notna().any():
        return frame[["slide_id", "patient_id", "split"]].rename(columns={"split": "fold_0"})
    return None
