"""What `doctor` says of a table of labels before there are features: who is in it, and which splits it allows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import LongslideError
from ...plurals import count
from ...task import CLASSIFICATION, TaskKind

if TYPE_CHECKING:
    import pandas as pd

    from ...data.cohort.cohort import Cohort
    from .slide_check import SlideCheck

FOLDS = (10, 5, 4, 3, 2)
"""Numbers of folds that are tried, the greatest first."""

MANY_VALUES = 12
"""Numbers in a label column beyond which it is a value to be regressed, and no class."""


@dataclass(frozen=True)
class LabelCheck:
    """What `doctor` found about the table of labels.

    Attributes:
        table: The table.
        task: What is to be predicted, as asked or as the labels look.
        slides: Slides with a label.
        patients: Patients of these.
        classes: Class -> slides and patients; of multilabel tasks, those that have the label; of survival, `event` and
            `censored`; empty for regression.
        sites: Site -> slides and patients; empty without a column `site`.
        without_label: Slides that the table does not hold, or without a label there.
        without_slide: Rows of the table whose slide is not among those given.
        folds: Most folds (up to 10) that a cross-validation can have; 1 if it can be split into train, val and test alone;
            0 if not even that.
        folds_with_sites_apart: Likewise with no site in two parts; None without a column `site`.
        twins: Slides with one image and different patients or labels.
        problem: Why nothing can be trained on it; empty when all is well.
        notes: What else the user should know.
        rows: The slides with a label, and all columns of the table.
    """

    table: Path
    task: TaskKind
    slides: int
    patients: int
    classes: dict[str, tuple[int, int]]
    sites: dict[str, tuple[int, int]]
    without_label: tuple[str, ...]
    without_slide: tuple[str, ...]
    folds: int
    folds_with_sites_apart: int | None
    twins: tuple[tuple[str, str], ...] = ()
    problem: str = ""
    notes: tuple[str, ...] = ()
    rows: "pd.DataFrame | None" = field(default=None, compare=False, repr=False)

    @property
    def ok(self) -> bool:
        """Whether it can be trained on."""
        return not self.problem

    @property
    def cells(self) -> dict[str, dict[str, str]]:
        """The cells of its rows, by slide."""
        assert self.rows is not None
        rows = self.rows.drop(columns=[name for name in self.rows if name in ("slide", "slide_path")]).fillna("")
        return {
            str(row["slide_id"]): {str(name): str(cell) for name, cell in row.items()}
            for row in rows.to_dict("records")
        }

    @property
    def lines(self) -> list[tuple[str, str]]:
        """What to print: a heading and its text for each line; every slide is listed."""

        def counts(groups: Mapping[str, tuple[int, int]]) -> str:
            return ", ".join(
                f"{name}: {count(slides, 'slide')} of {count(patients, 'patient')}"
                for name, (slides, patients) in groups.items()
            )

        whole = f"{count(self.slides, 'slide')} of {count(self.patients, 'patient')}"
        lines = [("labels", f"{whole} in {self.table}, taken for {self.task}")]
        if self.classes:
            lines.append(("classes", counts(self.classes)))
        if self.sites:
            lines.append(("sites", counts(self.sites)))
        splits = _splits_in_words(self.folds)
        if self.folds_with_sites_apart is not None:
            splits += f"; with sites kept apart {_splits_in_words(self.folds_with_sites_apart)}"
        lines.append(("splits", splits))
        if self.without_label:
            lines.append(("no label", f"{count(len(self.without_label), 'slide')}: {', '.join(self.without_label)}"))
        if self.without_slide:
            lines.append(("no slide", f"{count(len(self.without_slide), 'row')}: {', '.join(self.without_slide)}"))
        return lines + [("", note) for note in self.notes]


def check_labels(
    table: Path,
    slides: Mapping[str, Path] | None,
    column: str | Sequence[str] | None = None,
    task: TaskKind | None = None,
    patients: str | None = None,
) -> LabelCheck:
    """Join a table of labels with slides, and see what can be trained.

    Args:
        table: As `fit` takes it.
        slides: Slide files by their ids; None where only the table is there, all of whose slides then count.
        column: The label column or columns; `label` by default.
        task: What is to be predicted; default: as the labels look.
        patients: The column that names the patient, or `none`.

    Raises:
        LongslideError: The table is not one that `fit` would take.
    """
    from ...data.cohort.cohort import read_cohort

    kind = task or _guess(table, column)
    if slides is None:
        slides = {name: Path(name) for name in _listed(table)}
    cohort = read_cohort(table, slides, task=kind, label=column, all_classes=False, patients=patients)
    rows = cohort.rows
    patient = rows["patient_id"]

    def grouped(values: "pd.Series[str]") -> dict[str, tuple[int, int]]:
        return {str(name): (len(of), of.nunique()) for name, of in patient.groupby(values, sort=True)}

    folds = _most_folds(cohort, apart=False)
    listed_elsewhere = ("feature file", "have no slide", "slides have no label")
    return LabelCheck(
        table=table,
        task=kind,
        slides=len(rows),
        patients=patient.nunique(),
        classes=_classes(cohort),
        sites=grouped(rows["site"]) if "site" in rows else {},
        without_label=cohort.without_label,
        without_slide=cohort.without_features,
        folds=folds,
        folds_with_sites_apart=_most_folds(cohort, apart=True) if "site" in rows else None,
        problem="" if folds else f"{table}: {_why_no_split(cohort)}",
        notes=tuple(note for note in cohort.notes if not any(words in note for words in listed_elsewhere)),
        rows=rows.drop(columns=list({cohort.patient_column or "patient_id"} - {"patient_id"})),
    )


def with_twins(check: LabelCheck, slides: "Sequence[SlideCheck]") -> LabelCheck:
    """Add slides with one image that are of several patients or have several labels: they would teach what they test."""
    known = check.cells
    first: dict[str, str] = {}
    twins = []
    for slide in slides:
        if slide.quickhash and slide.slide_id in known:
            twin = first.setdefault(slide.quickhash, slide.slide_id)
            if {**known[twin], "slide_id": ""} != {**known[slide.slide_id], "slide_id": ""}:
                twins.append((twin, slide.slide_id))
    if not twins:
        return check
    pairs = ", ".join(f"{one} and {other}" for one, other in twins)
    problem = f"{check.table}: one image under two rows that differ: {pairs}; leave one of each out"
    return LabelCheck(**{**vars(check), "twins": tuple(twins), "problem": check.problem or problem})


def _listed(table: Path) -> list[str]:
    """The ids of the slides that a table names."""
    from ...data.slides.slide_table import slide_ids
    from ...data.table import ID_COLUMNS, require_columns

    frame = _read(table)
    ids = slide_ids(frame)
    if ids is None:
        require_columns(table, frame, ID_COLUMNS)
    assert ids is not None
    return list(ids.dropna())


def _read(table: Path) -> "pd.DataFrame":
    from ...data.cohort.split_folder import read_split_folder
    from ...data.table import read_table

    return read_split_folder(table, None) if table.is_dir() else read_table(table)


def _guess(table: Path, column: str | Sequence[str] | None) -> TaskKind:
    """What a label column looks like."""
    from ...data.table import decimal_points, require_columns

    names = [column] if isinstance(column, str) else list(column or ["label"])
    if len(names) > 1:
        return "multilabel"
    frame = _read(table)
    require_columns(table, frame, names)
    values = decimal_points(frame[names[0]].dropna()).unique()
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        numbers = []
    if len(numbers) > MANY_VALUES or any(not number.is_integer() for number in numbers):
        return "regression"
    return "binary" if len(values) == 2 else "multiclass"


def _classes(cohort: "Cohort") -> dict[str, tuple[int, int]]:
    task, targets, patient = cohort.labelled_task, cohort.targets, cohort.rows["patient_id"]
    assert targets is not None
    if task.kind in CLASSIFICATION:
        members = {name: targets == number for number, name in enumerate(task.classes)}
    elif task.kind == "multilabel":
        members = {name: targets[:, number] == 1 for number, name in enumerate(task.classes)}
    elif task.kind == "survival":
        members = {"event": targets[:, 1] == 1, "censored": targets[:, 1] == 0}
    else:
        members = {}
    return {name: (int(chosen.sum()), patient[chosen].nunique()) for name, chosen in members.items()}


def _most_folds(cohort: "Cohort", *, apart: bool) -> int:
    return next((folds for folds in (*FOLDS, 1) if not _refusal(cohort, folds, apart=apart)), 0)


def _why_no_split(cohort: "Cohort") -> str:
    return _refusal(cohort, 1, apart=False)


def _refusal(cohort: "Cohort", folds: int, *, apart: bool) -> str:
    from ...data.cohort.stratification import make_splits

    try:
        make_splits(cohort, folds=folds, keep_sites_apart=apart)
    except LongslideError as refusal:
        return str(refusal)
    return ""


def _splits_in_words(folds: int) -> str:
    if not folds:
        return "none: too few patients for train, val and test"
    return "train, val and test" + (
        "; no cross-validation" if folds == 1 else f"; cross-validation of up to {folds} folds"
    )
