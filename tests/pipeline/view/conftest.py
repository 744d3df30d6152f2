"""Results of real jobs on drawn slides, and viewers that serve them."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
from classifier_files import ENCODER, write_classifier
from longslide import embed, predict, write_synthetic_slide
from served_viewer import EVIL, Results, Served, chromium, serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Results:
    home = tmp_path_factory.mktemp("viewed")
    (home / "tiny.yaml").write_text(ENCODER)
    (home / "slides").mkdir()
    for seed, name in enumerate(("plain", EVIL)):
        write_synthetic_slide(home / "slides" / f"{name}.svs", size=(1024, 768), seed=seed)
    options: dict[str, Any] = {"tile_checkpoint": "random", "device": "cpu"}
    embed([home / "slides"], home / "features", str(home / "tiny.yaml"), **options)
    write_classifier(home / "best.ckpt", home / "features")
    (home / "slides" / "broken.svs").write_bytes((home / "slides" / "plain.svs").read_bytes()[:5000])
    job = {"checkpoint": str(home / "best.ckpt"), "features": home / "features", "device": "cpu"}
    job["tile_encoder"] = str(home / "tiny.yaml")
    for method in ("integrated-gradients", "attention"):
        found = predict([home / "slides"], output=home / method, explain=method, tile_checkpoint="random", **job)
    quoted = EVIL.replace('"', '""')
    wrong = "normal" if found[1].predicted == "tumour" else "tumour"
    labels = home / "labels.csv"
    labels.write_text(
        f'slide,slide_id,label\nslides/plain.svs,plain,{wrong}\n"slides/{quoted}.svs","{quoted}",tumour\n'
    )
    return Results(home / "slides", home / "features", home / "integrated-gradients", home / "attention", labels)


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    """A function that serves inputs until the test ends."""
    with ExitStack() as ending:
        yield lambda *inputs, **options: ending.enter_context(serving(*inputs, **options))


@pytest.fixture(scope="session")
def browser() -> Iterator["Browser"]:
    with chromium() as found:
        yield found
