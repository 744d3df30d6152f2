"""Results of real jobs on drawn slides, and viewers that serve them."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from classifier_files import ENCODER, write_classifier
from longslide import embed, predict, write_synthetic_slide
from served_viewer import EVIL, TOKEN, Results, Served


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
    """A function that serves inputs as `longslide view` does, on a free port, until the test ends."""
    import uvicorn
    from longslide.pipeline.view.app import create_app
    from longslide.pipeline.view.collection import read_collection

    with ExitStack() as ending:

        def start(*inputs: Path, output: Path | None = None) -> Served:
            listening = ending.enter_context(socket.create_server(("127.0.0.1", 0)))
            port = listening.getsockname()[1]
            app = create_app(read_collection(inputs, output), TOKEN)
            server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
            thread.start()
            ending.callback(thread.join, 10)
            ending.callback(setattr, server, "should_exit", True)
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            return Served(f"http://127.0.0.1:{port}/{TOKEN}/", port)

        yield start
