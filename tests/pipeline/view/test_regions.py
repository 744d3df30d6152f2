"""Regions that are drawn: what is saved, where, and that `embed` takes it."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from longslide import LongslideError, embed, open_slide, read_features
from longslide.data.tissue.mask import read_tissue_mask
from longslide.pipeline.view.content import SlideContent
from longslide.pipeline.view.regions import Regions
from longslide.pipeline.view.viewed_slide import ViewedSlide
from served_viewer import EVIL, Results, Served

Serve = Callable[..., Served]

SQUARE = [[100.0, 100.0], [500.0, 100.0], [500.0, 500.0], [100.0, 500.0], [100.0, 100.0]]
HOLE = [[200.0, 200.0], [300.0, 200.0], [300.0, 300.0], [200.0, 300.0], [200.0, 200.0]]
NOTHING: dict[str, Any] = {"type": "FeatureCollection", "features": []}


def changed(viewer: Served, regions: Any, ring: Any, change: str) -> dict[str, Any]:
    body = {"regions": regions, "ring": ring, "change": change}
    status, answer, _ = viewer.ask("api/slides/plain/regions", method="POST", body=body)
    assert status == 200, answer
    found: dict[str, Any] = json.loads(answer)["regions"]
    return found


def area(regions: dict[str, Any]) -> float:
    from shapely.geometry import shape

    return float(sum(shape(feature["geometry"]).area for feature in regions["features"]))


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_areas_are_added_cut_away_and_kept_within_the_slide(serve: Serve, made: Results) -> None:
    viewer = serve(made.slides)
    drawn = changed(viewer, NOTHING, SQUARE, "add")
    assert area(drawn) == 400 * 400
    cut = changed(viewer, drawn, HOLE, "remove")
    assert len(cut["features"][0]["geometry"]["coordinates"]) == 2
    assert area(cut) == 400 * 400 - 100 * 100
    assert area(changed(viewer, cut, HOLE, "add")) == 400 * 400
    outside = changed(viewer, NOTHING, [[-500, -500], [2000, -500], [2000, 5000], [-500, 5000], [-500, -500]], "add")
    assert area(outside) == 1024 * 768
    bow = changed(viewer, NOTHING, [[0, 0], [100, 100], [100, 0], [0, 100], [0, 0]], "add")
    assert area(bow) == pytest.approx(2 * 100 * 50 / 2), "an outline that crosses itself is mended"


def test_embed_takes_what_was_saved_and_nothing_is_written_elsewhere(
    serve: Serve, made: Results, tmp_path: Path
) -> None:
    before = files(made.slides.parent)
    viewer = serve(made.results, made.features, output=tmp_path / "out")
    regions = changed(viewer, changed(viewer, NOTHING, SQUARE, "add"), HOLE, "remove")
    status, answer, _ = viewer.ask("api/slides/plain/regions", method="PUT", body=regions)
    assert status == 200, answer
    saved = json.loads(answer)
    assert files(made.slides.parent) == before
    assert files(tmp_path) == {"out/regions/plain.geojson", "out/regions/slides.csv"}
    assert viewer.json("api/slides/plain/regions")["regions"] == regions

    with open_slide(made.slides / "plain.svs") as slide:
        tissue = read_tissue_mask(saved["path"], slide)
    assert tissue.area_mm2(0.0005 * 1000) == pytest.approx((400 * 400 - 100 * 100) * 0.5**2 / 1e6, rel=0.02)
    [result] = embed([saved["table"]], tmp_path / "features", str(made.slides.parent / "tiny.yaml"),
                     tile_checkpoint="random", device="cpu")  # fmt: skip
    assert result.ok, result.reason
    features = read_features(tmp_path / "features" / "plain.h5")
    assert features.tissue_method is not None
    assert features.tissue_method.startswith("mask:plain.geojson")
    centres = features.coords + features.tile_size_level0 / 2
    assert len(centres) > 20
    assert ((centres > 60) & (centres < 540)).all()
    assert not ((features.coords >= 200) & (features.coords + features.tile_size_level0 <= 300)).all(1).any()

    assert viewer.ask("api/slides/plain/regions", method="PUT", body=NOTHING)[0] == 200
    assert files(tmp_path / "out") == set(), "what is cleared is removed"


def test_regions_of_a_slide_with_a_hostile_name_stay_in_their_folder(
    serve: Serve, made: Results, tmp_path: Path
) -> None:
    from urllib.parse import quote

    viewer = serve(made.results, output=tmp_path)
    path = f"api/slides/{quote(EVIL, safe='')}/regions"
    regions = changed(viewer, NOTHING, SQUARE, "add")
    assert viewer.ask(path, method="PUT", body=regions)[0] == 200
    assert files(tmp_path) == {f"regions/{EVIL}.geojson", "regions/slides.csv"}
    assert viewer.json(path)["regions"] == regions


@pytest.mark.parametrize(
    "body",
    [
        b"no json",
        b"[" * 200_000,
        {},
        [],
        {"features": [{"geometry": None}]},
        {"features": [{"geometry": {"type": "Polygon", "coordinates": [[[0, 0], [1]]]}}]},
        {"features": [{"geometry": {"type": "Polygon", "coordinates": [[[0, 0], ["a", 1], [1, 1], [0, 0]]]}}]},
        {"features": [{"geometry": {"type": "Polygon", "coordinates": [[[0, 0], [1e999, 1], [1, 1], [0, 0]]]}}]},
    ],
)
def test_what_is_no_region_is_refused_and_nothing_is_lost(
    serve: Serve, made: Results, tmp_path: Path, body: Any
) -> None:
    viewer = serve(made.results, output=tmp_path)
    regions = changed(viewer, NOTHING, SQUARE, "add")
    viewer.ask("api/slides/plain/regions", method="PUT", body=regions)
    status, answer, _ = viewer.ask("api/slides/plain/regions", method="PUT", body=body)
    assert status == 422
    assert json.loads(answer)["error"]
    assert viewer.json("api/slides/plain/regions")["regions"] == regions


def test_without_an_output_folder_nothing_can_be_saved(serve: Serve, made: Results) -> None:
    viewer = serve(made.slides)
    before = files(made.slides.parent)
    assert viewer.json("api/slides/plain")["saves"] is False
    regions = changed(viewer, NOTHING, SQUARE, "add")
    status, answer, _ = viewer.ask("api/slides/plain/regions", method="PUT", body=regions)
    assert status == 422
    assert "--output" in json.loads(answer)["error"]
    assert files(made.slides.parent) == before


def test_microns_per_pixel_by_the_users_word_go_along(serve: Serve, made: Results, tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text(f"slide,slide_mpp,patient_id\n{made.slides / 'plain.svs'},0.25,p1\n")
    viewer = serve(tmp_path / "table.csv", output=tmp_path / "out")
    assert viewer.json("api/slides/plain")["pixels"]["mpp"] == 0.25
    viewer.ask("api/slides/plain/regions", method="PUT", body=changed(viewer, NOTHING, SQUARE, "add"))
    header, row = (tmp_path / "out" / "regions" / "slides.csv").read_text().splitlines()
    assert header == "slide,slide_id,slide_mpp,patient_id,tissue_mask"
    assert row == f"{made.slides / 'plain.svs'},plain,0.25,p1,plain.geojson"
    assert np.isfinite(viewer.json("api/slides/plain")["pixels"]["size"]).all()


def test_slides_saved_at_the_same_time_are_all_in_the_table(tmp_path: Path) -> None:
    regions = Regions(tmp_path)
    drawn = {"features": [{"geometry": {"type": "Polygon", "coordinates": [SQUARE]}}]}
    contents = [SlideContent(ViewedSlide(f"s{number}", [tmp_path / f"s{number}.svs"])) for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda content: regions.write(content, drawn), contents))
    rows = (tmp_path / "regions" / "slides.csv").read_text().splitlines()[1:]
    assert [row.split(",")[1] for row in rows] == [content.slide.slide_id for content in contents]


def test_a_draft_is_there_for_the_next_viewer_unless_it_is_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    draft = {"regions": NOTHING, "ring": SQUARE[:2], "change": "add"}
    assert Regions(tmp_path).keep_draft("a.b", draft)
    for name, content in (
        ("cut off", '{"regions"'),
        ("other", '{"regions": 5, "ring": [], "change": null}'),
        ("list", "[]"),
    ):
        (tmp_path / "regions" / ".drafts" / f"{name}.json").write_text(content)
    regions = Regions(tmp_path)
    assert regions.drafts == {"a.b": draft}
    assert all(f"{name}.json" in caplog.text for name in ("cut off", "other", "list"))
    assert regions.keep_draft("a.b", None)
    assert not Regions(tmp_path).drafts
    with pytest.raises(LongslideError, match="draft"):
        regions.keep_draft("a.b", [])
