"""What the viewer answers, and to whom."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from longslide import LongslideError, embed, open_slide, read_features
from longslide.pipeline.cli import main
from longslide.pipeline.view.pictures import TILE_PX, finest_level
from PIL import Image
from served_viewer import EVIL, ONCE, TOKEN, Results, Served

Serve = Callable[..., Served]


def api(slide_id: str, rest: str = "") -> str:
    return f"api/slides/{quote(slide_id, safe='')}{rest}"


def picture(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)), np.int16)


def test_only_who_knows_the_key_and_names_this_machine_gets_an_answer(serve: Serve, made: Results) -> None:
    viewer = serve(made.results)
    root = f"http://127.0.0.1:{viewer.port}"
    assert viewer.ask()[0] == 200
    assert viewer.ask(at=f"{root}/")[0] == 404
    assert viewer.ask(at=f"{root}/{TOKEN[:-1]}/")[0] == 404
    assert viewer.ask("api/collection", at=f"{root}/")[0] == 404
    assert viewer.ask(at=f"http://localhost:{viewer.port}/{TOKEN}/")[0] == 200
    for host in ("evil.example", f"evil.example:{viewer.port}", "127.0.0.1.evil.example", ""):
        assert viewer.ask("api/collection", headers={"Host": host})[0] in (400, 403), host
    elsewhere = {"Origin": "https://evil.example"}
    regions = {"type": "FeatureCollection", "features": []}
    assert viewer.ask(api("plain", "/regions"), method="PUT", body=regions, headers=elsewhere)[0] == 403


def test_the_address_that_a_browser_is_started_with_works_once(serve: Serve, made: Results) -> None:
    """Others on this machine can read the command line of a browser."""
    viewer = serve(made.results)
    root = f"http://127.0.0.1:{viewer.port}/"
    assert viewer.ask(ONCE, at=root)[:2] == viewer.ask()[:2]
    assert viewer.ask(ONCE, at=root)[0] == 404


def test_it_listens_on_the_loopback_interface_alone_and_ends_while_slides_are_read(made: Results) -> None:
    command = [sys.executable, "-m", "longslide.pipeline.cli", "view", str(made.results), "--no-browser"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as job,
        ExitStack() as open_connections,
    ):
        assert job.stdout is not None
        address = next(line.strip() for line in job.stdout if "http://" in line)
        port = int(address.split(":")[2].split("/")[0])
        listening = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        hosts = {one[1].split(":")[0] for one in listening if int(one[1].split(":")[1], 16) == port and one[3] == "0A"}
        assert hosts == {"0100007F"}
        assert Served(address, port).ask()[0] == 200
        for x in range(24):
            asking = open_connections.enter_context(socket.create_connection(("127.0.0.1", port)))
            path = f"/{address.split('/')[3]}/api/slides/plain/region?x={x}&y=0&size=256&px=256"
            asking.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        time.sleep(0.3)
        job.send_signal(2)
        assert job.communicate(timeout=20)[1] == ""
    assert job.returncode == 0


def test_one_slide_is_one_and_a_viewer_that_is_stopped_has_nothing_to_go_on_with(made: Results) -> None:
    command = [sys.executable, "-m", "longslide.pipeline.cli", "view", str(made.slides / "plain.svs"), "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "1 slide at\n"
        job.send_signal(15)
        assert job.communicate(timeout=30)[1] == "longslide view: stopped\n"
    assert job.returncode == 143


@pytest.mark.parametrize(
    "path",
    [
        "../pyproject.toml",
        "..%2f..%2fetc%2fpasswd",
        "/etc/passwd",
        "openseadragon/../../app.py",
        "app.py",
        "api/slides/unknown",
        "api/slides/..%2Fplain",
        "api/slides/%2Fetc%2Fpasswd/thumbnail",
        "api/slides/plain/tiles/99/0_0",
        "api/slides/plain/tiles/10/99_0",
        "api/slides/plain/tiles/10/-1_0",
        "api/slides/plain/layers/unknown",
        "api/slides/plain/region?x=0&y=0&size=100000000&px=64",
        "api/slides/plain/region?x=a",
        "summary.csv",
    ],
)
def test_what_is_not_of_the_collection_is_not_there(serve: Serve, made: Results, path: str) -> None:
    assert serve(made.results).ask(path)[0] == 404


def test_every_answer_forbids_scripts_and_pictures_from_elsewhere(serve: Serve, made: Results) -> None:
    viewer = serve(made.results)
    for path in ("", "slide.html", "api/collection", "api/slides/unknown"):
        policy = viewer.ask(path)[2]["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert "unsafe" not in policy


def test_tiles_show_the_pixels_of_their_place(serve: Serve, made: Results) -> None:
    viewer = serve(made.slides)
    with open_slide(made.slides / "plain.svs") as slide:
        finest = finest_level(slide.dimensions)
        tile = picture(viewer.ask(api("plain", f"/tiles/{finest}/1_2"))[1])
        expected = slide.read_region(TILE_PX, 2 * TILE_PX, 0, TILE_PX, TILE_PX)
        assert np.abs(tile - expected).mean() < 4, "but for the compression"
        half = picture(viewer.ask(api("plain", f"/tiles/{finest - 1}/1_1"))[1])
        assert half.shape == (384 - TILE_PX, TILE_PX, 3), "the last row has what is left"
        whole = slide.read_region(2 * TILE_PX, 2 * TILE_PX, 0, 2 * TILE_PX, 256)
        expected = np.asarray(Image.fromarray(whole).reduce(2), np.int16)
        assert np.abs(half - expected).mean() < 4
        coarse = picture(viewer.ask(api("plain", f"/tiles/{finest - 4}/0_0"))[1])
        assert coarse.shape == (48, 64, 3)
        expected = np.asarray(Image.fromarray(slide.thumbnail(64)), np.int16)
        assert np.abs(coarse - expected).mean() < 6
        place = picture(viewer.ask(api("plain", "/region?x=300&y=200&size=128&px=64"))[1])
        expected = np.asarray(Image.fromarray(slide.read_region(300, 200, 0, 128, 128)).reduce(2), np.int16)
        assert np.abs(place - expected).mean() < 6


def test_scores_are_in_the_order_of_the_grid(serve: Serve, made: Results) -> None:
    viewer = serve(made.results, made.attention, made.features)
    facts = viewer.json(api("plain"))
    layers = {(layer["group"], layer["title"]): layer for layer in facts["layers"]}
    assert {group for group, _ in layers} == {"integrated gradients", "attention", "quality", "embeddings"}
    grid = viewer.array(api("plain", "/grid"), "<i4").reshape(-1, 2)
    features = read_features(made.features / "plain.h5")
    np.testing.assert_array_equal(grid, features.coords)
    rows = np.genfromtxt(made.results / "slides" / "plain" / "tiles.csv", delimiter=",", names=True)
    layer = layers["integrated gradients", "tumour"]
    scores = viewer.array(api("plain", f"/layers/{layer['key']}"), "<f4")
    np.testing.assert_allclose(scores, rows["score_tumour"], rtol=1e-6)
    assert layer["kind"] == "signed"
    assert layer["ends"] == ["against tumour", "for tumour"]
    assert layers["attention", "attention"]["kind"] == "unsigned"
    np.testing.assert_array_equal(viewer.array(api("plain", "/layers/blur"), "<f4"), features.blur)


def test_a_score_that_is_no_number_is_no_colour_and_the_others_are_shown(
    serve: Serve, made: Results, tmp_path: Path
) -> None:
    shutil.copytree(made.results, tmp_path / "results")
    path = tmp_path / "results" / "slides" / "plain" / "tiles.csv"
    header, first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([header, ",".join([*first.split(",")[:2], *["nan"] * (header.count(",") - 1)]), *rest]))
    viewer = serve(tmp_path / "results", made.features)
    layer = next(one for one in viewer.json(api("plain"))["layers"] if one["kind"] == "signed")
    assert layer["limit"] > 0
    assert np.isnan(viewer.array(api("plain", f"/layers/{layer['key']}"), "<f4")).sum() == 1


def test_the_list_says_what_was_predicted_what_is_wrong_and_what_failed(serve: Serve, made: Results) -> None:
    viewer = serve(made.results, made.labels)
    collection = viewer.json("api/collection")
    slides = {slide["id"]: slide for slide in collection["slides"]}
    assert set(slides) == {"plain", EVIL, "broken"}
    assert collection["task"]["classes"] == ["normal", "tumour"]
    stated = json.loads((made.results / f"{EVIL}.json").read_text())
    assert slides[EVIL]["scores"] == stated["probability"]
    shown = viewer.json(api("plain"))["numbers"]
    assert slides["plain"]["prediction"] in [f"{name} {number}" for name, number in shown.items()], "in the same digits"
    assert slides[EVIL]["target"] == "tumour"
    assert slides[EVIL]["wrong"] is (stated["predicted"] != "tumour")
    assert slides["broken"]["status"] == "failed"
    assert slides["broken"]["odd"][0].startswith("failed: ")
    assert slides["broken"]["prediction"] is None


def test_a_table_of_ids_and_labels_says_what_is_true(serve: Serve, made: Results, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("slide_id,label\nplain,normal\nanother,tumour\n")
    slides = {
        slide["id"]: slide for slide in serve(made.results, tmp_path / "labels.csv").json("api/collection")["slides"]
    }
    assert set(slides) == {"plain", EVIL, "broken"}
    assert slides["plain"]["target"] == "normal"
    assert slides["plain"]["wrong"] is (not slides["plain"]["prediction"].startswith("normal"))


def test_one_feature_file_shows_its_slide_and_grid(serve: Serve, made: Results) -> None:
    viewer = serve(made.features / "plain.h5")
    facts = viewer.json(api("plain"))
    assert facts["pixels"]["size"] == [1024, 768]
    assert facts["grid"]["tiles"] == len(read_features(made.features / "plain.h5").coords)


def test_the_tissue_of_a_bare_slide_is_that_which_embed_finds(serve: Serve, made: Results) -> None:
    bare, embedded = serve(made.slides), serve(made.features)
    assert bare.json(api("plain"))["tissue"] == []
    found = bare.json(api("plain", "/tissue"))["tissue"]
    assert found == embedded.json(api("plain"))["tissue"] != []


def test_a_slide_that_vanished_is_said_and_the_viewer_goes_on(serve: Serve, made: Results, tmp_path: Path) -> None:
    shutil.copytree(made.slides, tmp_path / "slides")
    viewer = serve(tmp_path / "slides")
    assert viewer.ask(api("plain", "/tiles/10/0_0"))[0] == 200
    (tmp_path / "slides" / "plain.svs").unlink()
    status, body, _ = viewer.ask(api("plain", "/tiles/10/0_0"))
    assert (status, "No such file" in json.loads(body)["error"]) == (422, True)
    assert "plain.svs" in viewer.json(api("plain"))["pixels"]["error"]
    assert "truncated" in viewer.json(api("broken"))["pixels"]["error"] or viewer.json(api("broken"))["pixels"]["error"]
    assert viewer.ask(api(EVIL, "/tiles/10/0_0"))[0] == 200
    assert len(viewer.json("api/collection")["slides"]) == 3


def test_a_slide_written_anew_shows_its_new_pixels(serve: Serve, made: Results, tmp_path: Path) -> None:
    path = Path(shutil.copy(made.slides / "plain.svs", tmp_path / "a.svs"))
    viewer = serve(path)
    version = viewer.json(api("a"))["pixels"]["version"]
    paths = {name: api("a", name) for name in ("/thumbnail", "/region?x=0&y=0&size=512&px=64")}
    before = {name: viewer.ask(at) for name, at in paths.items()}
    for name, at in paths.items():
        _, _, headers = before[name]
        assert headers["cache-control"] == "private, no-cache", "the browser asks whether it is still so"
        assert viewer.ask(at, headers={"If-None-Match": headers["etag"]})[0] == 304
        named = f"{at}{'&' if '?' in at else '?'}v={version}"
        assert "max-age" in viewer.ask(named)[2]["cache-control"], "unless the address says of which version it is"
    shutil.copyfile(made.slides / f"{EVIL}.svs", tmp_path / "b.svs")
    (tmp_path / "b.svs").replace(path)
    for name, at in paths.items():
        status, picture, headers = viewer.ask(at, headers={"If-None-Match": before[name][2]["etag"]})
        assert (status, headers["etag"] != before[name][2]["etag"]) == (200, True)
        assert picture != before[name][1]
        assert viewer.ask(f"{at}{'&' if '?' in at else '?'}v={version}")[2]["cache-control"] == "private, no-cache"


def test_features_of_a_slide_that_is_away_show_their_grid(serve: Serve, made: Results, tmp_path: Path) -> None:
    shutil.copytree(made.slides, tmp_path / "slides")
    (tmp_path / "slides" / "broken.svs").unlink()
    (tmp_path / "tiny.yaml").write_text((made.slides.parent / "tiny.yaml").read_text())
    embed(
        [tmp_path / "slides"],
        tmp_path / "features",
        str(tmp_path / "tiny.yaml"),
        tile_checkpoint="random",
        device="cpu",
    )
    shutil.rmtree(tmp_path / "slides")
    facts = serve(tmp_path / "features").json(api("plain"))
    assert "No such file" in facts["pixels"]["error"]
    assert facts["pixels"]["size"] == [1024, 768]
    assert facts["grid"]["tiles"] == len(read_features(tmp_path / "features" / "plain.h5").coords)
    assert facts["tissue"]


def test_results_of_a_newer_version_are_one_line(
    made: Results, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made.results, tmp_path / "results")
    for path in (tmp_path / "results").glob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 99}))
    assert main(["view", str(tmp_path / "results"), "--no-browser"]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "written by a newer Longslide (schema 99)" in line


def test_one_slide_whose_json_cannot_be_read_takes_no_other_along(
    serve: Serve, made: Results, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(made.results, tmp_path / "results")
    first = json.loads((made.results / f"{EVIL}.json").read_text())["slide_id"]
    (tmp_path / "results" / f"{first}.json").write_text('{"task": ')
    viewer = serve(tmp_path / "results")
    listed = {slide["id"]: slide["prediction"] for slide in viewer.json("api/collection")["slides"]}
    assert listed[first], "the table has it"
    assert listed["plain"]
    assert f"{first}.json" in caplog.text
    assert any(f"{first}.json" in remark for remark in viewer.json(api(first))["remarks"])


def test_predictions_of_other_columns_are_one_line(
    made: Results, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made.results, tmp_path / "results")
    table = tmp_path / "results" / "predictions.csv"
    table.write_text(table.read_text().replace("probability_tumour", "score_tumour"))
    assert main(["view", str(tmp_path / "results"), "--no-browser"]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "predictions.csv: the row of" in line


def test_scores_without_features_have_the_grid_of_the_prediction(serve: Serve, made: Results, tmp_path: Path) -> None:
    shutil.copytree(made.results, tmp_path / "results")
    summary = tmp_path / "results" / "summary.csv"
    summary.write_text(summary.read_text().replace(str(made.features), str(tmp_path / "away")))
    away, there = serve(tmp_path / "results"), serve(made.results)
    facts = away.json(api("plain"))
    assert "feature file" not in facts["facts"]
    assert facts["grid"] == there.json(api("plain"))["grid"]
    key = facts["layers"][0]["key"]
    np.testing.assert_array_equal(
        away.array(api("plain", f"/layers/{key}"), "<f4"), there.array(api("plain", f"/layers/{key}"), "<f4")
    )


@pytest.mark.parametrize("given", ["missing", "empty"])
def test_nothing_to_see_is_one_line(given: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["view", str(tmp_path / given), "--no-browser"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_port_in_use_is_one_line(made: Results, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["view", str(made.results), "--port", str(port), "--no-browser"]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert f"--port {port}" in line
    assert "in use" in line


def test_a_list_of_5000_slides_is_there_within_two_seconds(serve: Serve, tmp_path: Path) -> None:
    folder = tmp_path / "features"
    folder.mkdir()
    lines = ["slide_id,slide,status,reason,tiles,tissue_mm2"]
    for number in range(5000):
        (folder / f"slide-{number}.h5").touch()
        lines.append(f"slide-{number},slides/slide-{number}.svs,done,,{number},{number / 100}")
    (folder / "summary.csv").write_text("\n".join(lines) + "\n")
    started = time.process_time()  # of an idle core: the machine may be busy
    viewer = serve(folder)
    slides = viewer.json("api/collection")["slides"]
    assert time.process_time() - started < 2
    assert len(slides) == 5000
    assert {slide["id"]: slide["tiles"] for slide in slides}["slide-4999"] == 4999


def test_predictions_of_5000_slides_are_there_within_two_seconds(serve: Serve, made: Results, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    [summary_head, summary_row] = [
        line
        for line in (made.results / "summary.csv").read_text().splitlines()
        if line.startswith(("slide_id", "plain"))
    ]
    lines = (made.results / "predictions.csv").read_text().splitlines()
    row = next(line for line in lines if ",plain," in line)
    numbers = range(5000)
    (folder / "summary.csv").write_text(
        "\n".join([summary_head, *(summary_row.replace("plain", f"plain-{number}", 1) for number in numbers)]) + "\n"
    )
    (folder / "predictions.csv").write_text(
        "\n".join([lines[0], *(row.replace(",plain,", f",plain-{number},") for number in numbers)]) + "\n"
    )
    content = (made.results / "plain.json").read_text()
    for number in numbers:
        (folder / f"plain-{number}.json").write_text(content)
    started = time.process_time()  # of an idle core: the machine may be busy
    slides = serve(folder).json("api/collection")["slides"]
    assert time.process_time() - started < 2
    assert len(slides) == 5000
    assert {slide["prediction"] for slide in slides} == {slides[0]["prediction"]} != {None}


def test_a_missing_package_is_named(made: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    from longslide.pipeline.view.view import view

    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(LongslideError, match=r"pip install 'longslide\[view\]'"):
        view(made.results, no_browser=True)
