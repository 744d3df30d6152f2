"""Weights from the hub: what a user sees of a download, and of a hub that does not answer."""

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub.utils import logging as hub_logging
from longslide import write_synthetic_slide
from longslide.models.checkpoint_file import _errors_alone

WEIGHTS = bytes(100_000)


@contextmanager
def hub(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """A hub on this machine that knows every file; how it sends one is `answer`."""

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            for name, value in (("ETag", '"0123"'), ("X-Repo-Commit", "0" * 40), ("Content-Length", len(WEIGHTS))):
                self.send_header(name, str(value))
            self.end_headers()

        def do_GET(self) -> None:
            answer(self)

        def log_message(self, *words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def whole(request: BaseHTTPRequestHandler) -> None:
    request.do_HEAD()  # type: ignore[attr-defined]
    request.wfile.write(WEIGHTS)


def cut(request: BaseHTTPRequestHandler) -> None:
    request.connection.close()


def embed(folder: Path, endpoint: str) -> subprocess.CompletedProcess[str]:
    """`longslide embed` with weights from a hub, without the half minute that huggingface_hub waits between its tries."""
    write_synthetic_slide(folder / "a.svs", size=(512, 512))
    script = "import sys, time; time.sleep = lambda seconds: None; from longslide.pipeline.cli import main; "
    script += "sys.exit(main(sys.argv[1:]))"
    words = ["embed", str(folder / "a.svs"), "--output", str(folder / "out"), "--tile-encoder", "kaiko-vits8"]
    known = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    # TQDM_POSITION: a bar although standard error is no terminal.
    more = {"HF_HOME": str(folder / "cache"), "HF_ENDPOINT": endpoint, "TQDM_POSITION": "-1", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", script, *words, "--device", "cpu"]
    return subprocess.run(command, env=known | more, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_of_a_hub_that_cannot_be_reached_the_user_sees_one_line(tmp_path: Path) -> None:
    done = embed(tmp_path, "http://127.0.0.1:9")
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith(
        "longslide embed: Tile encoder 'kaiko-vits8': the weights are neither in the hub's cache nor"
    )
    assert "refused. Connect once" in line, "the reason, now that the hub's own lines do not say it"
    assert "--tile-checkpoint" in line


def test_who_asks_for_the_hubs_own_lines_gets_them_all() -> None:
    before = hub_logging.get_verbosity()
    try:
        for asked, taken in ((logging.WARNING, logging.ERROR), (logging.INFO, logging.INFO)):
            hub_logging.set_verbosity(asked)
            with _errors_alone():
                assert hub_logging.get_verbosity() == taken
            assert hub_logging.get_verbosity() == asked
    finally:
        hub_logging.set_verbosity(before)


@pytest.mark.slow
@pytest.mark.parametrize("answer", [whole, cut])
def test_a_download_has_its_progress_bar_and_one_that_breaks_off_is_one_line(
    answer: Callable[[BaseHTTPRequestHandler], None], tmp_path: Path
) -> None:
    with hub(answer) as endpoint:
        done = embed(tmp_path, endpoint)
    assert done.returncode == 2
    *bars, line = done.stderr.strip().splitlines()
    assert line.startswith("longslide embed: ")
    assert "Traceback" not in done.stderr
    if answer is whole:
        assert any("model.safetensors: 100%" in bar for bar in bars)
        assert "not a readable checkpoint" in line, "zeros are no weights"
    else:
        assert bars == []
        assert "disconnected" in line
