"""The demo does the whole job, and says what is random about it."""

from pathlib import Path

import pandas as pd
import pytest
from commands import longslide
from longslide import LongslideError, read_features
from longslide.pipeline.demo import demo
from served_viewer import chromium, serving, tab, until


@pytest.mark.slow
def test_the_demo_embeds_trains_and_predicts_and_can_be_run_again(tmp_path: Path) -> None:
    words = ["demo", "--output", str(tmp_path / "demo"), "--device", "cpu", "--patients", "12"]
    done = longslide(*words)
    assert done.returncode == 0, done.stderr
    assert "random weights" in done.stdout
    assert "12 done, 0 failed, 0 skipped" in done.stdout

    files = sorted((tmp_path / "demo" / "features").glob("*.h5"))
    assert len(files) == 12
    for file in files:
        features = read_features(file)
        assert len(features.coords) > 5
        assert features.slide_embedding is not None
        assert (tmp_path / "demo" / "features" / "qc" / f"{file.stem}.jpg").stat().st_size > 10_000

    for model in ("longnet", "abmil"):
        metrics = pd.read_csv(tmp_path / "demo" / "runs" / model / "metrics.csv")
        auroc = metrics.query("scope == 'pooled' and level == 'patient' and metric == 'auroc'").iloc[0]
        assert auroc["n"] == 12
        assert auroc["value"] > 0.9, "the class is visible in the tissue"
        assert f"held-out AUROC of {model} {auroc['value']:.2f} ({auroc['low']:.2f} to" in done.stdout
    results = tmp_path / "demo" / "results"
    predicted = pd.read_csv(results / "predictions.csv").iloc[0]
    assert predicted["prediction"] == "solid"
    for path in (results / "report.html", results / "slides" / "kept-apart" / "overlay.png"):
        assert path.stat().st_size > 10_000
        assert str(path) in done.stdout

    last = done.stdout.strip().splitlines()[-1].split()
    assert last[:2] == ["longslide", "view"]
    with serving(*map(Path, last[2:])) as viewer, chromium() as browser, tab(browser) as page:
        page.goto(viewer.address)
        page.locator(".slides a", has_text="kept-apart").click()
        page.locator(".gallery button").first.click()
        until(page, "window.page?.layer?.title === 'solid'")
        assert "solid 0." in page.locator("#panels").inner_text()

    again = longslide(*words)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("already complete") == 13
    assert "fold 0" not in again.stdout


def test_too_few_patients_to_test_on_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LongslideError, match="at least 12"):
        demo(tmp_path, patients=6)
