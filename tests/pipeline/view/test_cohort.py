"""What the viewer says of tiles: which are alike over all slides, and which one sees which."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd
import pytest
from classifier_files import write_classifier
from longslide import TileIndex, dilated_attention, predict, read_features
from longslide.data.features.feature_file import write_features
from longslide.data.features.features import Features
from longslide.data.features.tile_colours import TileColours
from longslide.models.aggregators.registry import AggregatorChoice
from longslide.models.slide_encoder.spec import load_slide_encoder_spec
from longslide.pipeline.attention_map.sight import Sight, sight_of_model, sight_of_spec
from longslide.pipeline.view.attention import IN_SEGMENT, Sights, marks_of
from longslide.pipeline.view.collection import read_collection
from longslide.pipeline.view.content import SlideContent
from longslide.pipeline.view.viewed_slide import Model
from served_viewer import EVIL, Results, Served

Serve = Callable[..., Served]


def similar(viewer: Served, slide_id: str, tile: int, query: str = "") -> dict:
    """The answer, once the index is made."""
    while "making" in (answer := viewer.json(f"api/slides/{quote(slide_id, safe='')}/similar/{tile}{query}")):
        time.sleep(0.05)
    return answer


def test_the_tiles_alike_are_those_of_the_index_on_all_slides(serve: Serve, made: Results) -> None:
    viewer = serve(made.features)
    index = TileIndex.open(made.features)
    answer = similar(viewer, "plain", 3)
    wanted = index.similar("plain", 3)
    assert [(hit["slide"], hit["tile"], hit["x"], hit["y"], hit["size"]) for hit in answer["hits"]] == [
        (one.slide_id, one.tile, one.x, one.y, one.size) for one in wanted
    ]
    assert [hit["similarity"] for hit in answer["hits"]] == pytest.approx([one.similarity for one in wanted])
    assert (answer["tiles"], answer["slides"]) == (len(index), 2)
    others = similar(viewer, "plain", 3, "?other_slides=1")["hits"]
    assert {hit["slide"] for hit in others} == {EVIL}
    for hit in others[:2]:
        where = f"region?x={hit['x']}&y={hit['y']}&size={hit['size']}&px=64"
        assert viewer.ask(f"api/slides/{quote(EVIL, safe='')}/{where}")[0] == 200, "its picture"


def test_slides_that_are_not_shown_are_not_among_them(serve: Serve, made: Results) -> None:
    answer = similar(serve(made.features / "plain.h5"), "plain", 0)
    assert {hit["slide"] for hit in answer["hits"]} == {"plain"}


def test_features_written_anew_are_compared_anew(serve: Serve, tmp_path: Path) -> None:
    coords = np.stack([np.arange(9) % 3, np.arange(9) // 3], 1) * 512
    rows = np.random.default_rng(0).normal(size=(9, 8)).astype(np.float16)

    def write(embeddings: np.ndarray) -> None:
        features = Features("a", embeddings, coords, 512, 512, 256, 0, 0.5, 0.25, (1536, 1536))
        write_features(tmp_path / "a.h5", features)

    write(rows)
    viewer = serve(tmp_path)
    assert similar(viewer, "a", 0)["hits"][0]["similarity"] < 0.999
    rows[5] = rows[0]
    write(rows)
    assert similar(viewer, "a", 0)["hits"][0]["tile"] == 5


def test_features_that_are_added_while_the_viewer_runs_are_compared_too(
    serve: Serve, made: Results, tmp_path: Path
) -> None:
    home = tmp_path / "results"
    shutil.copytree(made.results, home)
    summary = pd.read_csv(home / "summary.csv", dtype=str)
    summary.assign(features="").to_csv(home / "summary.csv", index=False)
    (home / "features").mkdir(exist_ok=True)
    shutil.copy(made.features / "plain.h5", home / "features")
    viewer = serve(home)
    assert similar(viewer, "plain", 0)["slides"] == 1
    shutil.copy(made.features / f"{EVIL}.h5", home / "features")
    assert similar(viewer, "plain", 0)["slides"] == 2
    assert viewer.json(f"api/slides/{quote(EVIL, safe='')}")["grid"] is not None
    assert similar(viewer, EVIL, 0)["hits"]


def test_a_tile_or_embeddings_that_are_not_there_are_an_error_in_words(serve: Serve, made: Results) -> None:
    viewer = serve(made.features, made.slides)
    tiles = len(read_features(made.features / "plain.h5").coords)
    for _ in range(100):
        status, body, _ = viewer.ask(f"api/slides/plain/similar/{tiles}")
        if status != 200:
            break
        time.sleep(0.05)
    assert status == 422
    assert f"has no tile {tiles}" in body.decode()
    status, body, _ = viewer.ask("api/slides/broken/similar/0")
    assert status == 422
    assert "has no feature file" in body.decode()
    assert viewer.ask("api/slides/unknown/similar/0")[0] == 404
    assert "clusters" not in [layer["key"] for layer in viewer.json("api/slides/broken")["layers"]]


def test_features_that_cannot_be_compared_are_an_error_each_time(serve: Serve, tmp_path: Path) -> None:
    coords = np.array([[0, 0], [512, 0]])
    for name, width in (("a", 8), ("b", 9)):
        write_features(tmp_path / f"{name}.h5", Features(name, np.ones((2, width), np.float16), coords, 512, 512))
    viewer = serve(tmp_path)
    for _ in range(2):
        for _ in range(100):
            status, body, _ = viewer.ask("api/slides/a/similar/0")
            if status != 200:
                break
            time.sleep(0.05)
        assert status == 422
        assert "mixed width" in body.decode()


def test_the_layers_by_embedding_are_those_of_the_cohort(serve: Serve, made: Results) -> None:
    viewer = serve(made.features)
    colours = TileColours.of(TileIndex.open(made.features))
    layers = {layer["key"]: layer for layer in viewer.json("api/slides/plain")["layers"]}
    assert (layers["clusters"]["kind"], layers["components"]["kind"]) == ("categories", "colours")
    clusters = viewer.array("api/slides/plain/layers/clusters", "<i4")
    assert (clusters == colours.clusters("plain")).all()
    assert clusters.max() < len(layers["clusters"]["ends"])
    components = viewer.array("api/slides/plain/layers/components", "u1").reshape(-1, 3)
    assert (components == colours.components("plain")).all()


def published(name: str, tiles: int) -> Sight:
    spec = load_slide_encoder_spec(name)
    branches = tuple(zip(spec.segment_lengths, spec.dilated_ratios, strict=True))
    return sight_of_spec(spec, spec.heads, branches, tiles)


def test_what_a_tile_sees_is_what_the_attention_lets_through() -> None:
    """By the gradients of dilated attention itself, on a slide longer than two of GigaPath's first segments."""
    import torch

    spec = load_slide_encoder_spec("gigapath")
    tiles, tile = 2500, 1700
    sight, heads = published("gigapath", tiles), spec.heads
    q, k = (torch.randn(1, tiles + 1, heads, 2, dtype=torch.float64) for _ in range(2))
    v = torch.randn(1, tiles + 1, heads, 2, dtype=torch.float64, requires_grad=True)
    output = dilated_attention(q, k, v, spec.segment_lengths, spec.dilated_ratios, backend="naive")
    (flows,) = torch.autograd.grad(output[0, tile + 1].sum(), v)
    reached = (flows[0, 1:] != 0).any(-1).numpy()
    assert ((marks_of(sight, tile, "heads", 0) >= 0) == reached.any(1)).all()
    for head in (0, 7, 15):
        assert ((marks_of(sight, tile, "head", head) >= 0) == reached[:, head]).all()
    of_branches = np.stack([marks_of(sight, tile, "branch", branch) for branch in range(5)])
    assert ((of_branches >= 0) & (of_branches < IN_SEGMENT)).any(0).tolist() == reached.any(1).tolist()
    assert (of_branches[0] >= 0).nonzero()[0].tolist() == list(range(1023, 2047)), "one segment of 1,024 tokens"
    layers = marks_of(sight, tile, "layers", 0)
    assert layers[tile] == 0
    assert ((layers == 1) == reached.any(1) & (np.arange(tiles) != tile)).all()


def test_the_page_gets_marks_of_every_tile_and_no_other_question_is_answered(serve: Serve, made: Results) -> None:
    viewer = serve(made.features)
    tiles = len(read_features(made.features / "plain.h5").coords)
    models = viewer.json("api/slides/plain/attention")
    assert models["trained"] == []
    assert "gigapath" in [one["key"] for one in models["published"]]
    assert viewer.json("api/slides/plain/attention/gigapath")["branches"][0] == [1024, 1]
    sight = published("gigapath", tiles)
    for show, what, number in (
        ("heads", "heads", 0),
        ("head-3", "head", 3),
        ("branch-1", "branch", 1),
        ("layers",) * 2 + (0,),
    ):
        marks = viewer.array(f"api/slides/plain/attention/gigapath/2?show={show}", "i1")
        assert (marks == marks_of(sight, 2, what, number)).all()
    strange = ("head-16", "branch-5", "head-x", "head-%C2%B2", "all")  # a superscript two is a digit, and no number
    paths = (f"gigapath/{tiles}", *(f"gigapath/0?show={show}" for show in strange), "..%2Fx/0", "model-0", "titan/0")
    for path in paths:
        assert viewer.ask(f"api/slides/plain/attention/{path}")[0] == 404, path


SMALL = {"layers": 2, "width": 32, "heads": 4, "ffn_width": 32}


def write_longnet(path: Path, features: Path, **options: Any) -> Path:
    write_classifier(path, features, aggregator=AggregatorChoice("longnet", SMALL | options))
    return path


def test_the_attention_is_that_of_the_model_that_made_the_predictions(
    serve: Serve, made: Results, tmp_path: Path
) -> None:
    checkpoint = write_longnet(
        tmp_path / "runs" / "mine" / "fold_1" / "best.ckpt", made.features, dilated_ratios=[1, 2]
    )
    job: dict[str, Any] = {
        "features": made.features,
        "device": "cpu",
        "tile_encoder": str(made.slides.parent / "tiny.yaml"),
    }
    predict([made.slides / "plain.svs"], checkpoint=str(checkpoint), output=tmp_path / "results", **job)
    viewer = serve(tmp_path / "results")
    [model] = viewer.json("api/slides/plain/attention")["trained"]
    assert model == {"key": "model-0", "name": "mine, fold 1 (results)"}
    wanted = sight_of_model(checkpoint, read_features(made.features / "plain.h5"))
    described = viewer.json("api/slides/plain/attention/model-0")
    assert described["branches"] == [list(branch) for branch in wanted.branches]
    assert (described["heads"], described["layers"]) == (4, 2)
    marks = viewer.array("api/slides/plain/attention/model-0/3?show=branch-1", "i1")
    assert (marks == marks_of(wanted, 3, "branch", 1)).all()
    write_longnet(checkpoint, made.features, dilated_ratios=[1, 4])
    status, body, _ = viewer.ask("api/slides/plain/attention/model-0/3")
    assert status == 422
    assert "is not the model of these predictions any more" in body.decode()
    checkpoint.unlink()
    status, body, _ = viewer.ask("api/slides/plain/attention/model-0/3")
    assert status == 422
    assert "is no longer there" in body.decode()


def test_a_learned_pattern_shows_the_blocks_that_the_model_chooses_and_abmil_has_none(
    serve: Serve, made: Results, tmp_path: Path
) -> None:
    learned = write_longnet(tmp_path / "best.ckpt", made.features, pattern="learned", block_size=2, chosen_blocks=1)
    features = read_features(made.features / "plain.h5")
    viewer = serve(made.results)  # of ABMIL
    status, body, _ = viewer.ask("api/slides/plain/attention/model-0")
    assert status == 422
    assert "abmil has no attention pattern" in body.decode()
    content = SlideContent(read_collection([made.features]).slides["plain"])
    sight = Sights([Model("mine", learned)]).of(content, "model-0")
    assert sight is not None
    marks = marks_of(sight, 5, "heads", 0)
    assert ((marks == 0) == sight_of_model(learned, features).seen_by(5)[0, :, 1:].any(0)).all()
    assert 0 < (marks == 0).sum() < len(marks)
