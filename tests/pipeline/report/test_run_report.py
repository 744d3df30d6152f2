"""The page of a run: complete, true to the numbers, and standing on its own."""

import base64
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from longslide.errors import LongslideError
from longslide.evaluation import evaluate
from longslide.models.classifier.selection import SELECTION_METRIC
from longslide.pipeline.report import page as pages
from longslide.pipeline.report import run_figures
from longslide.pipeline.report.mistakes import mistakes_table
from longslide.pipeline.report.run_folder import read_run
from longslide.pipeline.report.run_report import risk_groups, write_run_report
from longslide.task import Task
from sklearn.metrics import roc_auc_score

WriteRun = Callable[..., Path]
VOID = {"meta", "link", "img", "br", "hr", "input"}
NAMESPACES = ("http://www.w3.org/", "http://purl.org/", "http://creativecommons.org/", "https://matplotlib.org/")


class Page(HTMLParser):
    """What a browser would see: text, tables, addresses; complains about tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.tags: list[str] = []
        self.text = ""
        self.scripts: list[str] = []
        self.feed(html)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action", "data", "poster"):
                self.addresses.append(value or "")
        if tag == "img":
            self.images.append(dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"]:
            self.scripts.append(data)
        elif self.open[-1:] != ["style"]:
            self.text += data


OWN = Page((Path(pages.__file__).parent / "templates" / "page.html").read_text(encoding="utf-8"))


def assert_stands_alone(html: str) -> Page:
    page = Page(html)
    assert all(address.startswith("data:image/") for address in page.addresses), page.addresses
    assert not {"link", "iframe", "object"} & set(page.tags)
    assert page.scripts == OWN.scripts, "the frame's, which opens pictures large"
    assert "url(" not in html
    assert "@import" not in html
    for image in page.images:
        assert image["alt"]
        svg = base64.b64decode((image["src"] or "").partition("base64,")[2]).decode()
        for address in re.findall(r"https?://[^\s\"'<)]+", svg):
            assert address.startswith(NAMESPACES), f"a picture names {address}"
        for reference in re.findall(r"(?:href|src)=\"([^\"]+)\"", svg):
            assert reference.startswith("#"), f"a picture loads {reference}"
    return page


@pytest.fixture
def report(tmp_path: Path, write_run: WriteRun) -> Callable[..., Page]:
    def make(kind: str, **options: object) -> Page:
        path = write_run_report(write_run(tmp_path / kind, kind, **options))
        assert path == tmp_path / kind / "report.html"
        return assert_stands_alone(path.read_text(encoding="utf-8"))

    return make


@pytest.mark.parametrize(
    ("kind", "pictures"),
    [
        ("binary", ["ROC curve", "Precision-recall curve", "Calibration curve", "Confusion matrix"]),
        ("ordinal", ["ROC curve", "Precision-recall curve", "Calibration curve", "Confusion matrix"]),
        ("multilabel", ["ROC curve", "Precision-recall curve", "Calibration curve"]),
        ("regression", ["Predicted against true values"]),
        ("survival", ["Kaplan-Meier curves"]),
    ],
)
@pytest.mark.filterwarnings("error")
def test_the_report_of_every_task_stands_alone_and_has_its_figures(report, kind: str, pictures: list[str]) -> None:
    page = report(kind, folds=2, patients=80)
    shown = [image["alt"] for image in page.images]
    assert shown == [*pictures, "Loss by epoch", f"Validation {SELECTION_METRIC[kind]} by epoch"]
    for heading in ("Metrics", "Curves", "Worst mistakes", "Training", "Cohort", "Configuration", "Splits"):
        assert heading in page.text
    assert "torch" in page.text
    assert "gigapath" in page.text


@pytest.mark.parametrize("kind", ["binary", "survival"])
def test_the_figures_lie_beside_the_page_for_a_paper(tmp_path: Path, write_run: WriteRun, kind: str) -> None:
    folder = write_run_report(write_run(tmp_path / kind, kind, folds=2, patients=80)).parent
    page = assert_stands_alone((folder / "report.html").read_text(encoding="utf-8"))
    names = {path.stem for path in (folder / "figures").iterdir()}
    assert len(names) == len(page.images)
    for name in names:
        svg = (folder / "figures" / f"{name}.svg").read_text(encoding="utf-8")
        assert "<text" in svg, "text stays text, for a drawing program to edit"
        pdf = (folder / "figures" / f"{name}.pdf").read_bytes()
        assert b"/FontFile2" in pdf, "TrueType fonts, whose text can be edited"
        assert b"/Type3" not in pdf
    if kind == "binary":
        roc = pd.read_csv(folder / "figures" / "roc-curve.csv", keep_default_na=False)
        predictions = pd.read_csv(folder / "predictions.csv").query("part == 'test' and level == 'patient'")
        one = roc[roc["curve"] == ""]
        area = np.trapezoid(one["true_positive_rate"], one["false_positive_rate"])
        assert area == pytest.approx(
            roc_auc_score(predictions["target"] == "tumour", predictions["probability_tumour"]), abs=1e-12
        )
        assert set(roc["curve"]) == {"", "fold 0", "fold 1"}


def test_figures_of_like_names_do_not_take_each_others_files(tmp_path: Path) -> None:
    page = pages.Page("A page")
    titles = ["AUROC by Site", "AUROC by site", "AUROC by site?", "?"]
    for number, title in enumerate(titles):
        page.pictures([pages.Picture(*run_figures.forest([(title, number, 0, 9)], "x"), title)])
    page.write(tmp_path / "page.html")
    tables = {path.name: pd.read_csv(path)["value"].tolist() for path in (tmp_path / "figures").glob("*.csv")}
    assert tables == {
        "auroc-by-site.csv": [0], "auroc-by-site-2.csv": [1], "auroc-by-site-3.csv": [2], "figure.csv": [3],
    }  # fmt: skip
    assert len(list((tmp_path / "figures").iterdir())) == 12


@pytest.mark.parametrize("kind", ["binary", "ordinal", "multilabel", "regression", "survival"])
def test_the_methods_paragraph_says_what_is_on_record_and_no_more(
    tmp_path: Path, write_run: WriteRun, kind: str
) -> None:
    folder = write_run(tmp_path / kind, kind, patients=60, folds=2)
    facts = json.loads((folder / "run.json").read_text())
    bare = dict(facts)
    facts |= {
        "command": "crossval",
        "counts": [{"fold": 0}, {"fold": 1}],
        "steps": [{"fold": fold, "bags": 40, "steps_per_epoch": 5} for fold in (0, 1)],
        "seen": {"checked": True, "slides": 0, "patients": 0},
    }
    (folder / "run.json").write_text(json.dumps(facts))
    (folder / "config.yaml").write_text("monitor: val_loss\ndata: {splits: null}\n")
    page = assert_stands_alone(write_run_report(folder).read_text(encoding="utf-8"))
    text = (folder / "methods.txt").read_text(encoding="utf-8").strip()
    assert text in page.text
    run = read_run(folder)
    assert run.cohort is not None
    assert f"{len(run.cohort)} slides of 60 patients with features and a label were used" in text
    assert "2 slides without features were left out" in text
    assert "estimated by 2-fold cross-validation" in text
    assert "Sites were not kept apart." in text
    assert "The checkpoint with the lowest validation loss was used." in text
    assert "(fold 1)" in text
    assert "torch 2.11.0" in text
    assert ("Newcombe" in text) == (kind != "regression"), "methods that made an interval"
    few = "he decision threshold was the share" in text or "he decision threshold of each label was the share" in text
    assert few == (kind in ("binary", "multilabel")), "of fewer than 50 validation patients"
    assert "Calibration of" not in text, "nothing is on record of it"
    assert "learning rate" not in text

    (folder / "run.json").write_text(json.dumps(bare))
    (folder / "config.yaml").unlink()
    write_run_report(folder)
    text = (folder / "methods.txt").read_text(encoding="utf-8")
    for word in ("cross-validation", "epoch", "checkpoint", "threshold", "None of the test", "site"):
        assert word not in text, word


def test_slides_are_not_called_patients(tmp_path: Path, write_run: WriteRun) -> None:
    folder = write_run(tmp_path / "run", "regression", patients=40, folds=1)
    assert "Test patients" in assert_stands_alone(write_run_report(folder).read_text(encoding="utf-8")).text
    facts = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(
        json.dumps(facts | {"patient_column": None})
    )  # as a table without patients leaves it
    text = assert_stands_alone(write_run_report(folder).read_text(encoding="utf-8")).text
    assert "Test patients" not in text
    assert "Each point is a slide" in text
    assert "The tenth of the test slides with the largest errors" in text


@pytest.mark.parametrize("kind", ["regression", "survival", "multilabel"])
def test_the_worst_mistakes_are_mistakes_and_name_the_slides_that_are_wrong(
    tmp_path: Path, write_run: WriteRun, kind: str
) -> None:
    run = read_run(write_run(tmp_path / kind, kind, patients=60, folds=1))
    table, _ = mistakes_table(run.predictions, run.task, "patient", "patient")
    assert table is not None
    rows = run.predictions.query("part == 'test' and level == 'patient'").set_index("patient_id")
    assert 1 <= len(table.rows) < len(rows) * (0.5 if kind != "multilabel" else 1)
    slides = run.predictions.query("part == 'test' and level == 'slide'").groupby("patient_id")["slide_id"].agg(set)
    for patient, wrong, *_ in table.rows:
        assert set(str(wrong).split(", ")) <= slides[patient]
    if kind == "regression":
        errors = (rows["prediction"] - rows["target"]).abs().sort_values(ascending=False)
        assert [row[0] for row in table.rows] == list(errors.index[: len(table.rows)])
        assert float(str(table.rows[0][2])) == rows["target"][errors.index[0]], "as the table has it"


def test_of_a_patient_that_is_wrong_the_slide_that_is_wrong_is_named() -> None:
    rows = [("slide", "p", "s1", "no", 0.9), ("slide", "p", "s2", "yes", 0.1), ("patient", "p", "", "yes", 0.4)]
    predictions = pd.DataFrame(
        [
            {
                **{"level": level, "fold": 0, "part": "test", "patient_id": patient, "slide_id": slide, "target": "no"},
                **{"prediction": said, "probability_no": p, "probability_yes": 1 - p},
            }
            for level, patient, slide, said, p in rows
        ]
    )
    table, what = mistakes_table(predictions, Task("binary", ("status",), ("no", "yes")), "patient", "patient")
    assert table is not None
    assert table.rows[0][:2] == ["p", "s2"]
    assert what.startswith("The 1 of 1 test patients that were wrong")


def test_the_numbers_are_those_of_metrics_csv_with_subgroups(tmp_path: Path, write_run: WriteRun) -> None:
    folder = write_run(tmp_path / "run")
    run = read_run(folder)
    metrics = evaluate(run.predictions, run.task, cohort=run.cohort, subgroups=["site"])
    metrics.to_csv(folder / "metrics.csv", index=False)
    page = assert_stands_alone(write_run_report(folder).read_text(encoding="utf-8"))
    for scope in ("pooled", "mean", "fold_2", "subgroup:site=Turin"):
        row = metrics[(metrics["scope"] == scope) & (metrics["level"] == "patient") & (metrics["metric"] == "auroc")]
        value, low, high = row.iloc[0][["value", "low", "high"]]
        assert f"{value:.3f}{low:.3f}–{high:.3f}" in page.text, scope
    assert "AUROC by site" in [image["alt"] for image in page.images]


def test_text_of_the_user_is_text_and_not_markup(report) -> None:
    page = report("binary", folds=2, patients=60)
    assert "<script>alert('x')</script>" in page.text, "the configuration, as it was written"


def test_the_worst_mistakes_are_the_most_confident_ones(tmp_path: Path, write_run: WriteRun) -> None:
    folder = write_run(tmp_path / "run")
    predictions = pd.read_csv(folder / "predictions.csv")
    rows = predictions[(predictions["level"] == "patient") & (predictions["part"] == "test")]
    wrong = rows[rows["target"] != rows["prediction"]]
    order = wrong.sort_values("patient_id").sort_values(
        "probability_healthy", key=lambda p: -(p - 0.5).abs(), kind="stable"
    )["patient_id"]
    text = write_run_report(folder).read_text(encoding="utf-8")
    listed = re.findall(r"<td>(patient-\d+)</td>", text)
    assert len(wrong) > 15
    assert listed == order.head(15).tolist()
    slides = predictions[(predictions["level"] == "slide") & (predictions["patient_id"] == listed[0])]["slide_id"]
    assert ", ".join(slides[: slides.nunique()].drop_duplicates()) in text, "with the slides to look at"


def test_risk_groups_never_look_at_the_test_patients(tmp_path: Path, write_run: WriteRun) -> None:
    predictions = read_run(write_run(tmp_path / "run", "survival")).predictions
    patients = predictions[predictions["level"] == "patient"]
    test, validation = patients[patients["part"] == "test"], patients[patients["part"] == "val"]
    high = risk_groups(test, validation, {})
    for fold, median in validation.groupby("fold")["risk"].median().items():
        of_fold = (test["fold"] == fold).to_numpy()
        assert (high[of_fold] == (test["risk"][of_fold] > median)).all()
    assert risk_groups(test.assign(risk=test["risk"] + 100), validation, {}).all(), "all of high risk, so be it"
    assert risk_groups(test, validation[:0], {}) is None
    assert (risk_groups(test, validation[:0], {"risk_threshold": 0.3}) == (test["risk"] > 0.3)).all()


def test_a_test_on_another_cohort_has_no_training_and_no_risk_groups(tmp_path: Path, write_run: WriteRun) -> None:
    folder = write_run(tmp_path / "external", "survival", folds=1)
    predictions = pd.read_csv(folder / "predictions.csv")
    predictions[predictions["part"] == "test"].to_csv(folder / "predictions.csv", index=False)
    for name in ("history.csv", "splits.csv", "config.yaml"):
        (folder / name).unlink()
    page = assert_stands_alone(write_run_report(folder).read_text(encoding="utf-8"))
    assert "would flatter the model" in page.text
    assert [image["alt"] for image in page.images] == ["Kaplan-Meier curves"]


def test_one_class_in_the_test_part_is_reported_without_curves(tmp_path: Path, write_run: WriteRun) -> None:
    folder = write_run(tmp_path / "run", patients=40, folds=1)
    predictions = pd.read_csv(folder / "predictions.csv")
    predictions[predictions["target"] == "tumour"].to_csv(folder / "predictions.csv", index=False)
    page = assert_stands_alone(write_run_report(folder).read_text(encoding="utf-8"))
    assert "ROC curve" not in [image["alt"] for image in page.images]
    assert "AUROC–" in page.text.replace("\n", "")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "run.json").unlink(), "no run.json"),
        (lambda folder: (folder / "run.json").write_text("{"), "does not describe a run"),
        (lambda folder: (folder / "run.json").write_text('{"task": {"kind": "binary"}}'), "does not describe a run"),
        (lambda folder: (folder / "predictions.csv").unlink(), "has not finished"),
        (lambda folder: (folder / "predictions.csv").write_text(""), "cannot be read as a table"),
        (
            lambda folder: (folder / "predictions.csv").write_text("level,part,fold,patient_id\n"),
            "the table has no rows",
        ),
    ],
)
def test_a_folder_that_is_not_a_finished_run_says_so(tmp_path: Path, write_run: WriteRun, spoil, message: str) -> None:
    folder = write_run(tmp_path / "run", patients=20, folds=1)
    spoil(folder)
    with pytest.raises(LongslideError, match=message):
        write_run_report(folder)


def test_class_names_that_look_like_missing_values_or_numbers_are_names(tmp_path: Path, write_run: WriteRun) -> None:
    folder = write_run(tmp_path / "run", "ordinal", patients=30, folds=1)
    (folder / "run.json").write_text((folder / "run.json").read_text().replace('"1"', '"NA"'))
    predictions = pd.read_csv(folder / "predictions.csv").rename(columns={"probability_1": "probability_NA"})
    predictions = predictions.replace({"target": {1: "NA"}, "prediction": {1: "NA"}})
    predictions.to_csv(folder / "predictions.csv", index=False)
    run = read_run(folder)
    assert run.task.classes == ("NA", "2", "3")
    assert "NA" in set(run.predictions["target"])
    assert np.isfinite(evaluate(run.predictions, run.task)["value"]).any()
