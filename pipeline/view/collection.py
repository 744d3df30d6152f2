"""What a viewer shows: the slides of result, run and feature folders, slide folders and tables, joined by their ids."""

import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, assert_never

from ...data.cohort.labels import class_of, truth_of
from ...data.slides.base import without_suffix
from ...data.slides.folder import looked_at
from ...data.slides.slide import open_slide
from ...data.slides.slide_table import IdFrom, SlideEntry, find_slides, slide_ids
from ...data.table import SLIDE_COLUMNS, find_column, is_table, plain_name, read_records, read_table, typed
from ...errors import LongslideError
from ...prediction_columns import PredictionColumns
from ...task import Task
from ..batch.ledger import SUMMARY, read_summary
from ..embed.contact_sheet import oddities
from ..predict.prediction import PREDICTIONS, of_row
from ..predict.slide_json import read_json
from ..report.run_folder import RUN_FACTS, read_run
from .viewed_slide import EVENT, NO_LABEL, Model, ViewedSlide, fold_of, model_name

logger = logging.getLogger(__name__)

FEATURE_SUFFIXES = (".h5", ".hdf5")


@dataclass
class Collection:
    """What is shown.

    Attributes:
        title: Names of what was given.
        slides: The slides by id, in their order.
        task: What was predicted; None without predictions.
        output: Folder for what is drawn; None where there is no such folder.
        models: Those of the run folders.
    """

    title: str
    slides: dict[str, ViewedSlide]
    task: Task | None
    output: Path | None
    models: list[Model] = field(default_factory=list)


def read_collection(inputs: Sequence[str | Path], output: Path | None = None, id_from: IdFrom = "name") -> Collection:
    """Find out what there is to see; no slide or feature file is opened.

    Args:
        inputs: Output folders of `predict` and `embed`, run folders, feature files, slide files, folders of slides, and
            tables of slides or slide ids, whose columns with the names of the labels say what is true. What they say of a
            slide is joined.
        output: Folder for what is drawn. Default: the first output folder of `predict` or `embed`.
        id_from: What ids of slide files are made of, as `embed` takes it.

    Returns:
        The collection.

    Raises:
        LongslideError: There is nothing there, it cannot be read, or it is of a newer Longslide.
    """
    reading = _Reading(id_from)
    paths = [Path(item) for item in inputs]
    for path in paths:
        reading.add(path)
    reading.add_slides()
    reading.add_targets()
    if not reading.slides:
        raise LongslideError(f"{paths[0]}: no slides, features or results there")
    title = ", ".join(path.resolve().name or str(path) for path in paths[:3]) + (", …" if len(paths) > 3 else "")
    output = output or next(iter(reading.folders), None)
    return Collection(title, reading.slides, reading.task, output, reading.models)


class _Reading:
    """What was found so far."""

    def __init__(self, id_from: IdFrom = "name") -> None:
        self.id_from = id_from
        self.slides: dict[str, ViewedSlide] = {}
        self.task: Task | None = None
        self.folders: list[Path] = []
        self.tables: list[Path] = []
        self.files: list[Path] = []  # and folders of slides
        self.models: list[Model] = []

    def slide(self, slide_id: str) -> ViewedSlide:
        return self.slides.setdefault(slide_id, ViewedSlide(slide_id))

    def add(self, path: Path) -> None:
        """What one input holds."""
        if not os.path.exists(path):
            raise LongslideError(f"{path}: no such file or folder, or no permission to see it")
        if path.is_dir() and (path / RUN_FACTS).is_file():
            self._add_run(path)
            return
        features = _feature_files(path)
        summary = _summary_of(path)
        if summary or features:
            self._add_features(features)
            try:
                self._add_job(path, summary)
            except ValueError as error:
                raise LongslideError(
                    f"{path / SUMMARY}: a cell is not the number that it should be ({error}); correct it"
                ) from error
            if path.is_dir() and not summary:
                self._warn_of_slides_in(path)
            return
        if is_table(path):
            self.tables.append(path)
            if find_column(read_table(path), SLIDE_COLUMNS) is None:  # of labels, by the ids of slides that others name
                return
            self._add_entries(find_slides(path, ask=False, id_from=self.id_from))
            return
        if path.is_file() and path.suffix.lower() not in looked_at():
            open_slide(path).close()  # whatever its name, if it can be
        self.files.append(path)

    def add_slides(self) -> None:
        """The slide files and folders of slides; together, for ids from paths depend on how many there are."""
        if self.files:
            self._add_entries(find_slides(self.files, ask=False, id_from=self.id_from))

    def _add_entries(self, entries: Iterable[SlideEntry]) -> None:
        for entry in entries:
            slide = self.slide(entry.slide_id)
            slide.paths.insert(0, entry.path)
            slide.slide_mpp = slide.slide_mpp or entry.slide_mpp
            slide.patient_id = slide.patient_id or entry.patient_id or ""

    def _warn_of_slides_in(self, folder: Path) -> None:
        """Say which slides beside feature files have none, and are not shown."""
        suffixes = looked_at()
        files = [path for path in folder.iterdir() if path.suffix.lower() in suffixes and not path.name.startswith(".")]
        others = sorted(path.name for path in files if without_suffix(path).name not in self.slides)
        if others:
            logger.warning(
                "%s: has feature files, and only their slides are shown; give %s%s by name to see them too",
                folder,
                ", ".join(others[:3]),
                f" and {len(others) - 3} more" if len(others) > 3 else "",
            )

    def _add_features(self, files: Iterable[Path]) -> None:
        for file in files:
            self.slide(without_suffix(file).name).features.append(file)

    def _add_job(self, folder: Path, summary: Sequence[Mapping[str, str]]) -> None:
        """An output folder of `embed` or `predict`."""
        if folder.is_dir():
            self.folders.append(folder)
        predicts = (folder / PREDICTIONS).is_file()
        for row, oddity in zip(summary, oddities([dict(row) for row in summary]), strict=True):
            slide = self.slide(row["slide_id"])
            slide.paths.append(Path(row["slide"]))
            slide.odd = tuple(dict.fromkeys([*slide.odd, *oddity.why]))
            if predicts or not slide.status:
                slide.status, slide.reason = row["status"], row["reason"]
            slide.tiles = int(row["tiles"]) if row.get("tiles") else slide.tiles
            slide.tissue_mm2 = float(row["tissue_mm2"]) if row.get("tissue_mm2") else slide.tissue_mm2
            if predicts and row["status"] == "done":
                slide.results.append(folder)
            beside = folder / "features" / f"{row['slide_id']}.h5"
            if predicts:
                slide.features += [beside, Path(row["features"])] if row.get("features") else [beside]
        predicted = [slide.slide_id for slide in self.slides.values() if folder in slide.results]
        if predicted:
            self._add_predictions(folder, _task_of(folder, predicted))

    def _add_run(self, folder: Path) -> None:
        """A run folder: its predictions of the test part, else of the validation part."""
        run = read_run(folder)
        models = {fold_of(path): Model(model_name(path), path) for path in run.checkpoints}
        if "checkpoint" in run.facts:  # a test of another run's model
            path = Path(run.facts["checkpoint"])
            models = {None: Model(model_name(path), path)}
        self.models += models.values()
        self._add_predictions(folder, run.task, ("test", "val"), models)

    def _add_predictions(
        self,
        folder: Path,
        task: Task,
        parts: Sequence[str] = ("",),
        models: Mapping[int | None, Model] = MappingProxyType({}),
    ) -> None:
        path = folder / PREDICTIONS
        if not path.is_file():
            return
        if self.task is not None and (task.kind, task.classes, task.label) != (
            self.task.kind, self.task.classes, self.task.label
        ):  # fmt: skip
            logger.warning("%s: predictions of another task than those before; they are not in the list", path)
            return
        self.task = self.task or task
        columns = PredictionColumns(task)
        frame = columns.arrange(typed(read_table(path, {""}), columns.text))
        rows = frame.astype(object).where(frame.notna(), None).to_dict("records")
        for part in parts:
            for cells in rows:
                if cells["level"] != "slide" or (cells["part"] or "") != part:
                    continue
                slide = self.slide(str(cells["slide_id"]))
                slide.patient_id = slide.patient_id or cells["patient_id"] or ""
                try:
                    if slide.prediction is None:
                        slide.prediction = of_row(cells, task)
                        model = models.get(None) or models.get(int(cells["fold"] or 0))
                        slide.models += [model] if model else []
                    slide.target = slide.target or _target([cells[name] for name in columns.target], task)
                except (TypeError, ValueError, KeyError, AttributeError) as error:
                    raise LongslideError(
                        f"{path}: the row of {slide.slide_id} is not one of this version ({error}); predict it again"
                    ) from error

    def add_targets(self) -> None:
        """What is true by the tables, where they have the columns of the labels."""
        if self.task is None:
            return
        for table in self.tables:
            frame = read_table(table)
            ids = slide_ids(frame, self.id_from)
            columns = [find_column(frame, (plain_name(name),)) or name for name in self.task.label]
            if ids is None or not set(columns) <= set(frame):
                logger.warning(
                    "%s: no columns %s; it does not say what is true", table, ", ".join(("slide_id", *columns))
                )
                continue
            for slide_id, row in zip(ids, frame[columns].to_dict("records"), strict=True):
                cells = [row[name] if isinstance(row[name], str) else None for name in columns]
                if (slide := self.slides.get(str(slide_id))) is None:
                    continue
                try:
                    slide.target = slide.target or _target(cells, self.task)
                except ValueError as error:
                    raise LongslideError(f"{table}: the label of {slide_id} cannot be read: {error}") from error


def _task_of(folder: Path, slide_ids: Sequence[str]) -> Task:
    """What was predicted, by the first slide whose JSON says it; those before are named.

    Raises:
        LongslideError: None says it: what is wrong with the first.
    """
    errors: list[LongslideError] = []
    for slide_id in slide_ids:
        path = folder / f"{slide_id}.json"
        try:
            task = Task.from_dict(read_json(path)["task"])
        except LongslideError as error:
            errors.append(error)
        except (KeyError, TypeError) as error:
            errors.append(LongslideError(f"{path}: does not say what was predicted ({error!r}); predict it again"))
        else:
            for said in errors:
                logger.warning("%s", said)
            return task
    raise errors[0]


def _summary_of(folder: Path) -> list[dict[str, str]]:
    """The rows of a job's summary; none where there is no such file, or another of that name."""
    path = folder / SUMMARY
    if not path.is_file() or not {"slide_id", "slide", "status", "reason"} <= set(read_records(path)[0]):
        return []
    return list(read_summary(path).values())


def _feature_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if path.suffix.lower() in FEATURE_SUFFIXES else []
    try:
        with os.scandir(path) as entries:
            names = sorted(one.name for one in entries if not one.name.startswith("."))
    except OSError as error:
        raise LongslideError(f"{path}: cannot look into this folder ({error.strerror})") from error
    return [path / name for name in names if name.lower().endswith(FEATURE_SUFFIXES)]


def _target(cells: Sequence[Any], task: Task) -> str:
    """What is true, in the words of the prediction.

    Raises:
        ValueError: A cell that is to say whether something is there does not.
    """
    if any(cell is None for cell in cells):
        return ""
    match task.kind:
        case "multilabel":
            there = [name for name, cell in zip(task.classes, cells, strict=True) if _is_true(cell)]
            return ", ".join(there) or NO_LABEL
        case "survival":
            return f"{cells[0]}{EVENT if _is_true(cells[1]) else ', censored'}"
        case "binary" | "multiclass" | "ordinal":
            return class_of(str(cells[0]))
        case "regression":
            return str(cells[0])
        case _:
            assert_never(task.kind)


def _is_true(cell: object) -> bool:
    truth = truth_of(str(cell))
    if math.isnan(truth):
        raise ValueError(f"{cell!r} is not 0 or 1")
    return truth == 1
