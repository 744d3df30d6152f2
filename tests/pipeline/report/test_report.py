"""The report of a prediction job: what is in the page, and what a browser makes of it."""

import html
import json
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from classifier_files import ENCODER, write_classifier
from longslide import LongslideError, embed, predict, write_synthetic_slide
from longslide.pipeline.batch.ledger import record
from longslide.pipeline.batch.result import SlideResult
from longslide.pipeline.cli import main
from longslide.pipeline.report.report import report
from PIL import Image

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three slides of two patients by two classifiers, explained; one of them unlike training; one that failed."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "tiny.yaml").write_text(ENCODER)
    (folder / "slides").mkdir()
    for seed, name in enumerate(("a & <b>.svs", "second.svs", "third.svs")):
        write_synthetic_slide(folder / "slides" / name, size=(1024, 768), seed=seed)
    embed([folder / "slides"], folder / "features", str(folder / "tiny.yaml"), tile_checkpoint="random", device="cpu")
    for fold in (0, 1):
        write_classifier(folder / "run" / f"fold_{fold}" / "best.ckpt", folder / "features", seed=fold)
    (folder / "slides" / "broken.svs").write_text("not a slide")
    table = folder / "table.csv"
    table.write_text(
        "slide,patient_id,mpp\n"
        '"slides/a & <b>.svs",p1,\nslides/second.svs,p1,\nslides/third.svs,p2,\nslides/broken.svs,p2,\n'
    )
    predict(
        [table],
        str(folder / "run"),
        folder / "results",
        folder / "features",
        explain="integrated-gradients",
        tile_encoder=str(folder / "tiny.yaml"),
        device="cpu",
    )
    return folder / "results"


def sources(page: str) -> list[str]:
    return [html.unescape(source) for source in re.findall(r'<img (?:data-)?src="([^"]*)"', page)]


def test_one_page_holds_all_that_is_known_and_needs_nothing_else(results: Path) -> None:
    [written] = report([results])
    page = written.path.read_text(encoding="utf-8")
    assert (written.slides, written.failed, written.pictures) == (4, 1, "inside")
    assert "a &amp; &lt;b&gt;" in page
    assert "<b>.svs" not in page
    assert "not a slide or image" in page
    assert "1 of 2 slides has no prediction" in page
    content = json.loads((results / "second.json").read_text())
    assert f"{content['probability']['tumour']:.3f}" in page
    assert f"{content['spread']['tumour']:.3f}" in page
    assert "µm/px (file)" in page
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources(page))
    assert len(sources(page)) == sum(
        2 + len(json.loads(path.read_text())["explanation"]["gallery"]) for path in results.glob("*.json")
    )
    assert not re.search(r'(src|href)="(https?:)?//', page)


def test_pictures_that_are_too_many_stay_beside_the_page(results: Path) -> None:
    [written] = report([results], embed_mb=0.01)
    page = written.path.read_text(encoding="utf-8")
    assert written.pictures == "beside"
    assert "keep the two together" in page
    beside = [source for source in sources(page) if not source.startswith("data:")]
    assert len(beside) > 10
    from urllib.parse import unquote

    assert all((results / unquote(source)).is_file() for source in beside)
    assert sum(source.startswith("data:") for source in sources(page)) == 3, "thumbnails are always inside"


def test_the_command_takes_several_folders(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path, SlideResult("a", "a.svs", "failed", "the reason"))
    assert main(["report", str(results), str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("report.html") == 2
    assert main(["report", str(tmp_path / "none")]) == 2


def test_a_folder_without_results_is_named(tmp_path: Path) -> None:
    with pytest.raises(LongslideError, match=r"no summary\.csv"):
        report([tmp_path])


def test_a_folder_of_features_is_no_folder_of_results(results: Path) -> None:
    with pytest.raises(LongslideError, match=r"features: no .*\.json in this folder; give the --output of"):
        report([results.parent / "features"])
    assert not (results.parent / "features" / "report.html").exists()


def test_a_job_in_which_every_slide_failed_has_a_report(tmp_path: Path) -> None:
    record(tmp_path, SlideResult("a", "a.svs", "failed", "the reason"))
    [written] = report([tmp_path])
    assert "the reason" in written.path.read_text()


@pytest.fixture(scope="module")
def many(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """500 slides: copies of one result with other numbers, all with the same pictures."""
    folder = tmp_path_factory.mktemp("many")
    content = json.loads((results / "second.json").read_text())
    rng = np.random.default_rng(0)
    header, *_ = (results / "summary.csv").read_text().splitlines()
    lines = [header]
    for number in range(500):
        probability = float(rng.random())
        one = content | {
            "slide_id": f"slide-{number}",
            "predicted": ["normal", "tumour"][probability > 0.5],
            "probability": {"normal": 1 - probability, "tumour": probability},
        }
        (folder / f"slide-{number}.json").write_text(json.dumps(one))
        lines.append(f"slide-{number},slide-{number}.svs,done" + "," * (header.count(",") - 2))
        (folder / "slides").mkdir(exist_ok=True)
        (folder / "slides" / f"slide-{number}").symlink_to(results / "slides" / "second")
    (folder / "summary.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.slow
def test_500_slides_make_a_page_that_is_still_light(many: Path) -> None:
    started = time.monotonic()
    [written] = report([many])
    assert written.slides == 500
    assert written.pictures == "beside"
    assert written.path.stat().st_size < 8e6
    assert time.monotonic() - started < 30


def in_browser(page: Path, script: str, widths: tuple[int, ...] = (1280, 390)) -> dict[str, Any]:
    """What a script finds on a page of each width: it runs in the page's window, as `page`, and fills `found`."""
    if BROWSER is None:
        pytest.skip("there is no Chromium on this machine (Debian: apt install chromium)")
    frames = "".join(
        f'<iframe id="w{width}" style="width:{width}px;height:900px;border:0" '
        f'srcdoc="{html.escape(page.read_text(encoding="utf-8"))}"></iframe>'
        for width in widths
    )
    wrapper = page.with_name("browser-test.html")
    wrapper.write_text(
        f"<!DOCTYPE html><meta charset=utf-8><body style=margin:0>{frames}<pre id=result></pre><script>"
        "addEventListener('load', async () => { const all = {}; for (const frame of document.querySelectorAll('iframe')) {"
        "const page = frame.contentWindow, found = {}; page.addEventListener('error', (e) => { found.error = e.message; });"
        f"try {{ {script} }} catch (e) {{ found.error = String(e); }} all[frame.id] = found; }}"
        "document.getElementById('result').textContent = 'RESULT' + JSON.stringify(all) + 'END'; });</script>",
        encoding="utf-8",
    )
    done = subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *(f"--user-data-dir={page.parent / '.browser'}", "--window-size=1300,1900", "--virtual-time-budget=20000"),
            *("--dump-dom", wrapper.resolve().as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    shutil.rmtree(page.parent / ".browser", ignore_errors=True)
    wrapper.unlink()
    found = re.search(r"RESULT(.*)END</pre>", done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


LOOK = """
const all = (selector) => [...page.document.querySelectorAll(selector)];
const column = (name) => all('#slides th').findIndex((th) => th.textContent.trim() === name);
const cell = (td) => td.dataset.value ?? td.textContent.trim();
const read = (at) => all('#slides tbody tr').map((tr) => cell(tr.cells[at]));
const click = (at) => all('#slides th')[at].querySelector('button').click();
const slide = column('slide'), tumour = column('tumour');
found.names = read(slide);
click(tumour); found.ascending = read(tumour).map(Number); found.sort = all('#slides th')[tumour].ariaSort;
click(tumour); found.descending = read(tumour).map(Number);
click(slide); found.again = read(slide);
// A click on the link would resolve it against the page around this frame.
const anchor = all('#slides td.name a')[0].getAttribute('href').slice(1);
page.location.hash = anchor;
await new Promise((done) => setTimeout(done, 300));
const opened = page.document.getElementById(anchor), pictures = [...opened.querySelectorAll('img')];
found.opened = opened.open;
for (const one of pictures) one.loading = 'eager';
await new Promise((done) => setTimeout(done, 1000));
found.pictures = pictures.map((one) => one.naturalWidth);
const large = page.document.getElementById('large');
pictures[0].click(); found.large = large.open && large.querySelector('img').src === pictures[0].src;
large.querySelector('button').click(); found.closed = !large.open;
found.overflow = page.document.documentElement.scrollWidth - page.document.documentElement.clientWidth;
found.width = page.innerWidth;
"""


@pytest.mark.parametrize("inside", [True, False])
def test_a_browser_sorts_the_table_opens_a_slide_and_needs_no_sideways_scrolling(results: Path, inside: bool) -> None:
    [written] = report([results], embed_mb=40 if inside else 0.01)
    for name, found in in_browser(written.path, LOOK).items():
        assert "error" not in found, found["error"]
        assert found["width"] == int(name[1:])
        assert found["names"] == ["a & <b>", "second", "third"]
        assert found["ascending"] == sorted(found["ascending"])
        assert found["sort"] == "ascending"
        assert found["descending"] == sorted(found["ascending"], reverse=True)
        assert found["again"] == found["names"]
        assert found["opened"]
        assert found["large"], "a picture opens large"
        assert found["closed"]
        assert min(found["pictures"]) > 20
        assert len(found["pictures"]) > 8
        assert found["overflow"] <= 0


@pytest.mark.slow
def test_a_browser_opens_500_slides(many: Path) -> None:
    [written] = report([many])
    found = in_browser(written.path, LOOK, widths=(390,))["w390"]
    assert "error" not in found, found["error"]
    assert len(found["names"]) == 500
    assert found["names"][:3] == ["slide-0", "slide-1", "slide-2"], "numbers in names count as numbers"
    assert found["descending"] == sorted(found["ascending"], reverse=True)
    assert found["overflow"] <= 0


def test_print_shows_every_slide(results: Path, tmp_path: Path) -> None:
    if BROWSER is None:
        pytest.skip("there is no Chromium on this machine (Debian: apt install chromium)")
    [written] = report([results])
    target = tmp_path / "report.pdf"
    subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *(f"--user-data-dir={tmp_path / 'browser'}", f"--print-to-pdf={target}", written.path.resolve().as_uri()),
        ],
        capture_output=True,
        timeout=120,
    )
    printed = target.read_bytes()
    pages = len(re.findall(rb"/Type\s*/Page\b", printed))
    assert 4 <= pages <= 8, "the tables, and a page for each of the three slides"
    assert len(re.findall(rb"/Subtype\s*/Image\b", printed)) > 20, "thumbnails, overlays and galleries"


def test_the_thumbnail_is_that_of_the_slide(results: Path) -> None:
    with Image.open(results / "slides" / "second" / "thumbnail.jpg") as thumbnail:
        assert thumbnail.size == (1024, 768)


def test_slides_without_an_explanation_have_a_page_too(results: Path, tmp_path: Path) -> None:
    plain = shutil.copytree(results, tmp_path / "plain")
    for path in plain.glob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"explanation": None}))
    [written] = report([plain])
    assert (written.slides, written.failed) == (4, 1)
    assert "Explained by" not in written.path.read_text(encoding="utf-8")


def test_predictions_of_other_checkpoints_are_not_shown_as_if_they_were_of_these(results: Path, tmp_path: Path) -> None:
    """As a run with --overwrite on some of the slides leaves them."""
    mixed = shutil.copytree(results, tmp_path / "mixed")
    other = json.loads((mixed / "third.json").read_text())
    other["checkpoints"][0]["digest"] = "0" * 16
    (mixed / "third.json").write_text(json.dumps(other))
    table = mixed / "predictions.csv"
    table.write_text("".join(line for line in table.read_text().splitlines(True) if ",third," not in line))
    [written] = report([mixed])
    assert (written.slides, written.failed) == (4, 1)
    page = written.path.read_text(encoding="utf-8")
    assert page.count("its prediction is of other checkpoints: predict it again") == 1
    assert 'id="slide-third"' not in page
    assert 'id="slide-second"' in page
