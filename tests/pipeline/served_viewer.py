"""Viewers that run for a test, and what they show."""

import json
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

EVIL = """<img src=x onerror='document.title="hacked"'>&"quoted"; drop #1?% Größe 切片"""
"""A name that is HTML, JavaScript, a bad URL and no ASCII at once."""

TOKEN, ONCE = "a-token-of-the-tests", "a-path-that-works-once"


@dataclass
class Results:
    """Folders of one cohort: the slides `plain`, `EVIL` and `broken`, features, and results of two methods."""

    slides: Path
    features: Path
    results: Path
    attention: Path
    labels: Path


@dataclass
class Served:
    """A viewer that runs."""

    address: str
    port: int

    def ask(
        self,
        path: str = "",
        *,
        method: str = "GET",
        body: Any = None,
        headers: dict[str, str] | None = None,
        at: str = "",
    ) -> tuple[int, bytes, dict[str, str]]:
        """Status, body and headers of an answer."""
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request((at or self.address) + path, data, headers or {}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.read(), dict(answer.headers)
        except urllib.error.HTTPError as error:
            return error.code, error.read(), dict(error.headers)

    def json(self, path: str) -> Any:
        """The JSON of an answer that must be one."""
        status, body, _ = self.ask(path)
        assert status == 200, body
        return json.loads(body)

    def array(self, path: str, kind: str) -> np.ndarray:
        """The numbers of a binary answer."""
        status, body, _ = self.ask(path)
        assert status == 200, body
        return np.frombuffer(body, kind)


@contextmanager
def serving(*inputs: Path, output: Path | None = None, slide_timeout: float = 60) -> Iterator[Served]:
    """Serve inputs as `longslide view` does, on a free port."""
    import uvicorn
    from longslide.pipeline.view.app import create_app
    from longslide.pipeline.view.collection import read_collection

    with ExitStack() as ending:
        listening = ending.enter_context(socket.create_server(("127.0.0.1", 0)))
        app = create_app(read_collection(inputs, output), TOKEN, slide_timeout, ONCE)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        ending.callback(thread.join, 10)
        ending.callback(setattr, server, "should_exit", True)
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        port = listening.getsockname()[1]
        yield Served(f"http://127.0.0.1:{port}/{TOKEN}/", port)


@contextmanager
def chromium() -> Iterator["Browser"]:
    """The Chromium of this machine; the test is skipped where there is none."""
    api = pytest.importorskip("playwright.sync_api")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium on this machine")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-dev-shm-usage"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def tab(
    browser: "Browser", width: int = 1280, height: int = 800, told: str | None = None, touch: bool = False
) -> Iterator["Page"]:
    """A tab; what goes wrong in its pages, or is forbidden by their policy, fails the test, but for what is `told`."""
    page = browser.new_page(viewport={"width": width, "height": height}, has_touch=touch)
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.set_default_timeout(15_000)
    yield page
    page.close()
    wrong = [text for text in wrong if "Failed to load resource" not in text and (told is None or told not in text)]
    assert not wrong, wrong


def until(page: "Page", expression: str, seconds: float = 15) -> None:
    """Wait until an expression of JavaScript is true: the pages' policy forbids what Playwright's own waiting evaluates."""
    end = time.monotonic() + seconds
    while not page.evaluate(f"Boolean({expression})"):
        assert time.monotonic() < end, f"never: {expression}"
        time.sleep(0.05)
