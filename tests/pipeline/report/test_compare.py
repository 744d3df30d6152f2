"""`longslide compare` as users meet it: run folders in; a table on the terminal, one in a file, and a page."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from commands import longslide
from longslide.errors import LongslideError
from longslide.pipeline.report.compare import compare
from longslide.pipeline.report.run_folder import read_run

WriteRun = Callable[..., Path]


def run_cli(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return longslide("compare", *words)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, write_run: WriteRun) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "longnet", skill=2.0, model_seed=1)
    write_run(folder / "abmil", skill=0.8, model_seed=2)
    write_run(folder / "mean", skill=0.0, model_seed=3)
    return folder


def test_compare_prints_a_table_and_writes_a_table_and_a_page(runs: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "comparison"
    result = run_cli(runs / "longnet", runs / "abmil", runs / "mean", "--output", output, "--subgroups", "site")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    for text in ("120 test patients", "longnet - abmil", "AUROC", "site = Turin", str(output / "comparison.html")):
        assert text in result.stdout.replace("\n", "")

    table = pd.read_csv(output / "comparison.csv")
    pooled = table[(table["scope"] == "pooled") & (table["metric"] == "auroc")]
    of_run = pooled[pooled["against"].isna()].set_index("run")
    pairs = pooled[pooled["against"].notna()].set_index(["run", "against"])
    assert list(of_run.index) == ["longnet", "abmil", "mean"]
    assert pairs.loc[("longnet", "mean"), "value"] == pytest.approx(
        of_run.loc["longnet", "value"] - of_run.loc["mean", "value"]
    )
    assert pairs.loc[("longnet", "mean"), "p_holm"] < 0.001
    assert of_run.loc["mean", "low"] < 0.5 < of_run.loc["mean", "high"], "a run that knows nothing"

    page = (output / "comparison.html").read_text(encoding="utf-8")
    assert "longnet − abmil" in page
    assert "DeLong" in page
    assert "Wien &amp; Graz &lt;1&gt;" in page
    assert page.count("<script") == 1, "the frame's"
    assert page.count("<img") == page.count('src="data:image/svg+xml;base64,') == 5
    figures = [path.name for path in (output / "figures").iterdir()]
    assert sorted(Path(name).suffix for name in figures) == sorted([".svg", ".pdf", ".csv"] * 5), "each as three files"
    assert "<text" in (output / "figures" / "differences-in-auroc.svg").read_text(encoding="utf-8")
    points = pd.read_csv(output / "figures" / "differences-in-auroc.csv").set_index("name")
    headline = table[(table["scope"] == "mean") & (table["metric"] == "auroc") & table["against"].notna()]
    assert points["value"].tolist() == pytest.approx(headline["value"].tolist())
    assert "url(" not in page


@pytest.mark.parametrize("kind", ["multilabel", "regression", "survival"])
def test_other_tasks_are_compared_by_their_own_metric(tmp_path: Path, write_run: WriteRun, kind: str) -> None:
    folders = [write_run(tmp_path / name, kind, skill=skill) for name, skill in (("good", 2.0), ("bad", 0.5))]
    good, bad = compare(folders, tmp_path / "out")
    assert good.metric == bad.metric == {"multilabel": "auroc", "regression": "r2", "survival": "c_index"}[kind]
    assert good.value > bad.value
    assert good.low < good.value < good.high
    assert (tmp_path / "out" / "comparison.html").is_file()


def test_runs_tested_on_other_patients_are_compared_on_the_common_ones_only_if_asked(
    runs: Path, tmp_path: Path, write_run: WriteRun
) -> None:
    small = write_run(tmp_path / "small", patients=120)
    predictions = pd.read_csv(small / "predictions.csv")
    predictions = predictions[predictions["patient_id"] >= "patient-020"]
    predictions.to_csv(small / "predictions.csv", index=False)
    result = run_cli(runs / "abmil", small, "--output", tmp_path / "out")
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert "20 only in the first, 0 only in the second, 100 in both" in result.stderr
    assert not (tmp_path / "out" / "comparison.csv").exists()

    compared = compare([runs / "abmil", small], tmp_path / "out", common_patients=True)
    assert [run.n for run in compared] == [100, 100]
    assert "20 patients that not all runs" in (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")


def test_brier_scores_are_compared_over_the_times_that_both_runs_predict(tmp_path: Path, write_run: WriteRun) -> None:
    first = write_run(tmp_path / "first", "survival")
    second = write_run(tmp_path / "second", "survival")
    predictions = pd.read_csv(second / "predictions.csv")
    predictions.rename(columns={"survival_24": "survival_30"}).to_csv(second / "predictions.csv", index=False)
    compare([first, second], tmp_path / "out")
    table = pd.read_csv(tmp_path / "out" / "comparison.csv")
    brier = table[(table["metric"] == "integrated_brier") & (table["scope"] == "pooled")]
    assert brier["value"].nunique() == 2, "the same score twice, and their difference"
    assert brier["value"].tolist()[-1] == 0


def test_runs_without_predictions_of_patients_are_compared_by_slides(tmp_path: Path, write_run: WriteRun) -> None:
    folders = [write_run(tmp_path / name, skill=skill, patients=40) for name, skill in (("a", 2.0), ("b", 0.5))]
    for folder in folders:
        predictions = pd.read_csv(folder / "predictions.csv")
        predictions[predictions["level"] == "slide"].to_csv(folder / "predictions.csv", index=False)
    first, _ = compare(folders, tmp_path / "out")
    assert first.n == predictions[(predictions["level"] == "slide") & (predictions["part"] == "test")].shape[0]
    assert "test slides" in (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
    table = pd.read_csv(tmp_path / "out" / "comparison.csv")
    assert "delong" not in set(table["method"]), "slides of one patient are not independent"


def test_runs_of_the_same_name_go_by_more_of_their_path(runs: Path, tmp_path: Path) -> None:
    for seed in ("seed-0", "seed-1"):
        shutil.copytree(runs / "abmil", tmp_path / seed / "abmil")
    compared = compare([tmp_path / "seed-0" / "abmil", tmp_path / "seed-1" / "abmil"], tmp_path / "out")
    assert [run.name for run in compared] == ["seed-0/abmil", "seed-1/abmil"]


def test_what_cannot_be_compared_is_one_clear_line(runs: Path, tmp_path: Path, write_run: WriteRun) -> None:
    survival = write_run(tmp_path / "survival", "survival", patients=30)
    other_label = write_run(tmp_path / "other-label", patients=30)
    facts = json.loads((other_label / "run.json").read_text())
    facts["task"]["label"] = ["her2"]
    (other_label / "run.json").write_text(json.dumps(facts))
    untested = write_run(tmp_path / "untested", patients=30)
    predictions = pd.read_csv(untested / "predictions.csv")
    predictions.assign(part="val").to_csv(untested / "predictions.csv", index=False)
    longnet = runs / "longnet"
    for folders, message in (
        ([longnet], "two or more"),
        ([longnet, longnet], "named twice"),
        ([longnet, tmp_path / "none"], "no such folder"),
        ([longnet, tmp_path], "no run.json"),
        ([longnet, untested], "untested has none"),
        ([longnet, survival], "kind is binary and survival"),
        ([longnet, other_label], "label is status and her2"),
    ):
        with pytest.raises(LongslideError, match=message) as error:
            compare(folders, tmp_path / "out")
        assert "\n" not in str(error.value)
    with pytest.raises(LongslideError, match="no column 'age' in the cohort table"):
        compare([longnet, runs / "abmil"], tmp_path / "out", subgroups="age")


def test_a_table_that_cannot_be_written_is_one_line(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "comparison.csv").mkdir()
    result = run_cli(runs / "longnet", runs / "abmil", "--output", tmp_path)
    assert result.returncode == 2
    assert "comparison.csv: cannot write it" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["comparison.csv"]


def test_no_runs_is_wrong_usage() -> None:
    result = run_cli()
    assert result.returncode == 2
    assert "needs runs" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_run_folder_reads_as_it_was_written(runs: Path) -> None:
    run = read_run(runs / "longnet")
    assert run.name == "longnet"
    assert run.aggregator == "abmil"
    assert run.task.classes == ("healthy", "tumour")
    assert set(run.predictions["part"]) == {"test", "val"}
    assert "alert" in run.configuration


@pytest.mark.parametrize("kind", ["binary", "survival"])
def test_tables_that_a_spreadsheet_has_saved_again_give_the_same_comparison(
    tmp_path: Path, write_run: WriteRun, kind: str
) -> None:
    runs = [write_run(tmp_path / name, kind, patients=40, model_seed=seed) for seed, name in enumerate(("a", "b"))]
    first = compare(runs, tmp_path / "first", subgroups="site")
    for name in ("predictions.csv", "cohort.csv"):
        table = pd.read_csv(runs[0] / name, dtype={"slide_id": str, "patient_id": str})
        table.to_csv(runs[0] / name, index=False, sep=";", decimal=",", encoding="utf-16")
    assert compare(runs, tmp_path / "second", subgroups="site") == first
