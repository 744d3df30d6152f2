"""The report of a prediction job: one HTML page over its folder."""

import base64
import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from ...data.table import read_rows
from ...errors import LongslideError
from ...plurals import count
from ...prediction_columns import time_text
from ...ranges import checked
from ...task import Task
from ..batch.ledger import SUMMARY
from ..predict.explain import score_unit
from ..predict.prediction import PREDICTIONS, Prediction, read_predictions
from ..predict.slide_json import read_json
from .page import Cell, Page, Table
from .wording import number, probability, task_text

REPORT = "report.html"

EMBED_MB = 40
"""Megabytes of overlays and galleries that a page holds; where there is more, all of them stay files beside it."""

THUMBNAIL_PX = 144
OVERLAY_PX = 1400
TILE_PX = 160


@dataclass(frozen=True)
class ReportResult:
    """A report that was written.

    Attributes:
        path: The page.
        slides: Slides in it.
        failed: Of these, how many failed.
        pictures: `inside` the page, or `beside` it.
    """

    path: Path
    slides: int
    failed: int
    pictures: str

    @property
    def ok(self) -> bool:
        """Whether it does not count against the exit status."""
        return True


@checked
def report(results: str | Path | Sequence[str | Path], embed_mb: float = EMBED_MB) -> list[ReportResult]:
    """Write `report.html` into folders of results: a table of the slides, and for each what it was predicted from.

    Args:
        results: Output folders of `longslide predict`.
        embed_mb: Megabytes of overlays and galleries that the page may hold, so that it can be sent alone. Where there are
            more, the page shows the files beside it. Thumbnails are always in the page.

    Returns:
        One result a folder.

    Raises:
        LongslideError: A folder holds no results, or the page cannot be written.
    """
    written = [
        _report(Path(folder), embed_mb) for folder in ([results] if isinstance(results, str | Path) else results)
    ]
    for one in written:
        print(f"{one.path}: {count(one.slides, 'slide')}, {one.failed} failed; pictures are {one.pictures} the page")
    return written


def _report(folder: Path, embed_mb: float) -> ReportResult:
    summary = read_rows(folder / SUMMARY)
    if not summary:
        raise LongslideError(f"{folder}: no {SUMMARY} in this folder; give the --output of `longslide predict`")
    contents = {path.stem: read_json(path) for path in sorted(folder.glob("*.json"))}
    if bare := [row["slide_id"] for row in summary if row["status"] == "done" and row["slide_id"] not in contents]:
        raise LongslideError(f"{folder}: no {bare[0]}.json in this folder; give the --output of `longslide predict`")
    table = read_rows(folder / PREDICTIONS)
    # What predictions.csv is of: a run with --overwrite on some slides leaves the others' predictions of other checkpoints.
    current = {_checkpoints(contents[row["slide_id"]]) for row in table if row["slide_id"] in contents}
    rows = [_Row.of(folder, row, contents.get(row["slide_id"]), current) for row in summary]
    done = [one for one in rows if one.prediction is not None]
    tasks = {str(one.content["task"]): Task.from_dict(one.content["task"]) for one in done}
    if len(tasks) > 1:
        raise LongslideError(f"{folder}: predictions of {len(tasks)} different tasks; give each an --output of its own")
    task = next(iter(tasks.values()), None)
    predictions = [] if task is None else read_predictions(folder / PREDICTIONS, task)
    inside = sum(one.picture_bytes for one in done) <= embed_mb * 1e6
    classifiers = sorted({point["path"] for one in done for point in one.content["checkpoints"]})
    page = Page(f"Predictions: {folder.resolve().name}", _subtitle(task, classifiers))
    page.style("results.css")
    page.facts(_facts(task, rows))
    seen = sum(bool(one.prediction.seen) for one in done if one.prediction)
    if seen:
        were = "was" if seen == 1 else "were"
        page.warning(
            f"{count(seen, 'slide')} {were} in the training or validation part of the model: this is no test of it."
        )
    warned = sum(bool(one.prediction.warnings) for one in done if one.prediction)
    if warned:
        lack = "are unlike those of training, or lack" if warned > 1 else "is unlike those of training, or lacks"
        page.warning(f"{count(warned, 'slide')} {lack} something: see the warnings in the table.")
    slides = [one.cells(task, inside) for one in done]
    if slides:
        page.heading("Slides")
        page.template("slide_table.html", slides=slides, task=task, columns=_columns(task))
    failures: list[list[Cell]] = [[one.slide_id, one.status, one.reason] for one in rows if one.prediction is None]
    if failures:
        page.heading("Without a prediction")
        page.table(Table(["slide", "status", "reason"], failures, []))
    patients = [one for one in predictions if one.level == "patient"]
    if task is not None and patients:
        page.heading("Patients")
        page.table(_patients_table(patients, task))
    if slides:
        page.heading("Each slide")
        unit = "the log-odds of " if task is not None and task.classes else "the "
        page.template("slides.html", slides=slides, unit=unit, source="src" if inside else "data-src")
    page.note(_pictures_note(done, inside))
    path = page.write(folder / REPORT)
    failed = sum(one.status == "failed" for one in rows)
    return ReportResult(path, len(rows), failed, "inside" if inside else "beside")


def _checkpoints(content: dict[str, Any]) -> tuple[str, ...]:
    return tuple(point["digest"] for point in content["checkpoints"])


def _subtitle(task: Task | None, classifiers: Sequence[str]) -> str:
    if task is None:
        return "No slide has a prediction."
    by = f"{len(classifiers)} classifiers" if len(classifiers) > 1 else "".join(classifiers)
    return f"{task_text(task)}; predicted by {by}."


def _columns(task: Task | None) -> list[str]:
    """Columns of numbers in the tables of slides and patients."""
    if task is None:
        return []
    if task.kind == "survival":
        return ["risk", *(f"survival {time_text(time)}" for time in task.times)]
    return [task.label[0]] if task.kind == "regression" else list(task.classes)


def _facts(task: Task | None, rows: "Sequence[_Row]") -> list[tuple[str, str, str]]:
    counts = Counter(one.status for one in rows)
    facts = [("Slides", str(len(rows)), f"{counts['failed']} failed, {counts['skipped']} skipped")]
    predicted = Counter(one.prediction.predicted for one in rows if one.prediction and one.prediction.predicted)
    for name in task.classes if task else ():
        if predicted:
            facts.append((name, str(predicted[name]), f"{predicted[name] / predicted.total():.0%} of the slides"))
    classifiers = {one.prediction.classifiers for one in rows if one.prediction}
    if classifiers:
        facts.append(("Classifiers", str(max(classifiers)), "mean and spread" if max(classifiers) > 1 else "no spread"))
    return facts


def _patients_table(patients: Sequence[Prediction], task: Task) -> Table | None:
    names = _columns(task)
    rows: list[list[Cell]] = [
        [
            one.patient_id,
            *([_predicted(one, task)] if task.classes else []),
            *(text for _, text in _numbers(one, task)),
            "; ".join(one.warnings),
        ]
        for one in patients
    ]
    return (
        Table(["patient", *(["prediction"] if task.classes else []), *names, "warnings"], rows, names) if rows else None
    )


def _pictures_note(done: "Sequence[_Row]", inside: bool) -> str:
    total = sum(one.picture_bytes for one in done) / 1e6
    if not total:
        return "Thumbnails are in this page; nothing else is needed to read it."
    if inside:
        return (
            f"Thumbnails ({THUMBNAIL_PX} px), overlays (up to {OVERLAY_PX} px) and gallery tiles ({TILE_PX} px) are in this "
            "page; the originals, at full size, are in the folder slides/ beside it, overlays also as SVG and PDF."
        )
    return (
        f"Thumbnails ({THUMBNAIL_PX} px) are in this page. Overlays and galleries, too many for one page, are in the folder "
        "slides/ beside it, overlays also as SVG and PDF, and are shown from there: keep the two together."
    )


@dataclass(frozen=True)
class _Row:
    """A slide of the report."""

    folder: Path
    slide_id: str
    slide: str
    status: str
    reason: str
    content: dict[str, Any]
    prediction: Prediction | None

    @classmethod
    def of(
        cls, folder: Path, row: dict[str, str], content: dict[str, Any] | None, current: set[tuple[str, ...]]
    ) -> "_Row":
        status, reason = row["status"], row["reason"]
        if content is not None and status == "done" and current and _checkpoints(content) not in current:
            status, reason = "skipped", "its prediction is of other checkpoints: predict it again"
        # A slide whose later run failed has the JSON of the earlier one: what happened last is what counts.
        prediction = Prediction.from_dict(content) if content and status == "done" else None
        place = folder / "slides" / row["slide_id"]
        return cls(place, row["slide_id"], row["slide"], status, reason, content or {}, prediction)

    @property
    def picture_bytes(self) -> int:
        """What the pictures for the page take, roughly: three bits a pixel and base64."""
        explanation = self.content.get("explanation") or {}
        overlay = (self.folder / "overlay.png").is_file()
        return int(overlay * 0.5 * OVERLAY_PX**2 * 0.5 + len(explanation.get("gallery", ())) * 0.5 * TILE_PX**2)

    def cells(self, task: Task | None, inside: bool) -> dict[str, Any]:
        """What the template shows of a slide."""
        assert self.prediction is not None
        assert task is not None
        explanation = self.content.get("explanation") or {}
        quality = self.content["quality"]
        return {
            "id": self.slide_id,
            "anchor": f"slide-{quote(self.slide_id)}",
            "patient": self.prediction.patient_id,
            "thumbnail": _embedded(self.folder / "thumbnail.jpg", THUMBNAIL_PX),
            "prediction": self.prediction,
            "text": _predicted(self.prediction, task),
            "numbers": _numbers(self.prediction, task),
            "tiles": quality["tiles"],
            "tissue": quality["tissue_mm2"],
            "overlay": self._picture("overlay.png", OVERLAY_PX, inside),
            "view": self._picture("thumbnail.jpg", OVERLAY_PX, inside),
            "gallery": [
                tile | {"uri": self._picture(f"gallery/{tile['picture']}", TILE_PX, inside)}
                for tile in explanation.get("gallery", ())
            ],
            "explanation": explanation,
            "unit": score_unit(explanation["shows"], explanation["method"]) if explanation else "",
            "quality": _quality(self.content),
            "path": self.slide,
        }

    def _picture(self, name: str, max_px: int, inside: bool) -> str | None:
        path = self.folder / name
        if inside:
            return _embedded(path, max_px)
        return quote(f"slides/{self.slide_id}/{name}") if path.is_file() else None


def _embedded(path: Path, max_px: int) -> str | None:
    """A picture as a data URI of a small JPEG; None where there is none that can be read."""
    try:
        with Image.open(path) as picture:
            picture.draft("RGB", (max_px, max_px))
            small = picture.convert("RGB")
    except OSError:
        return None
    small.thumbnail((max_px, max_px))
    content = io.BytesIO()
    small.save(content, "JPEG", quality=78)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()


def _predicted(prediction: Prediction, task: Task) -> str:
    if prediction.predicted is not None:
        return prediction.predicted
    if task.kind == "multilabel":
        return ", ".join(prediction.labels) or "none"
    return ""


def _numbers(prediction: Prediction, task: Task) -> list[tuple[float | None, str]]:
    """The numbers of a prediction in the order of the columns, to sort by, and with their spreads to read."""
    spread = prediction.spread or {}
    if task.classes:
        of_class = prediction.probability or {}
        return [
            (of_class.get(name), _shown(of_class.get(name), spread.get(name), probability)) for name in task.classes
        ]
    if task.kind == "regression":
        return [(prediction.value, _shown(prediction.value, spread.get("value"), _plain))]
    curve = [(prediction.survival or {}).get(time) for time in task.times]
    risk = (prediction.risk, _shown(prediction.risk, spread.get("risk"), _plain))
    return [risk, *((value, _shown(value, None, probability)) for value in curve)]


def _shown(value: float | None, spread: float | None, write: Callable[[float, float | None], str]) -> str:
    return "–" if value is None else write(value, spread)


def _plain(value: float, spread: float | None) -> str:
    return number(value) + ("" if spread is None else f" ± {number(spread)}")


def _quality(content: dict[str, Any]) -> list[tuple[str, str]]:
    """The facts by which to judge whether a prediction can be good."""
    quality = content["quality"]

    def known(value: Any, text: str) -> str:
        return "not known" if value is None else text.format(value)

    source = f" ({quality['mpp_source']})" if quality["mpp_source"] else ""
    return [
        ("Tissue", known(quality["tissue_mm2"], "{:.3g} mm²")),
        (
            "Tiles",
            known(quality["tiles"], "{:,}")
            + (f", {quality['bad_tiles']} unreadable" if quality["bad_tiles"] else "")
            + (f", {quality['blurred_tiles']} too blurred" if quality.get("blurred_tiles") else ""),
        ),
        ("Scanned at", known(quality["slide_mpp"], "{:.4g} µm/px") + source),
        ("Tile size", f"{known(quality['tile_px'], '{} px')} at {known(quality['tile_mpp'], '{:g} µm/px')}"),
        ("Tile encoder", known(quality["tile_encoder"], "{}")),
        ("Predicted", content["created"][:16].replace("T", " ") + " UTC"),
    ]
