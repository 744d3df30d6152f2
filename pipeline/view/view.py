"""The command `view`: a viewer of slides, features and predictions in the browser of this machine."""

import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...data.slides.slide_table import IdFrom
from ...errors import LongslideError
from ...plurals import count
from ...ranges import checked
from ..batch.ledger import make_output_folder
from ..signals import Stopped, abandon
from .collection import Collection, read_collection

ENDING_SECONDS = 5
"""Seconds for what was asked for and is being computed when a viewer is ended."""


@dataclass(frozen=True)
class ViewResult:
    """A viewer that has ended.

    Attributes:
        slides: Slides that it showed.
    """

    slides: int

    @property
    def ok(self) -> bool:
        """Whether it does not count against the exit status."""
        return True


@checked
def view(
    inputs: str | Path | Sequence[str | Path],
    port: int | None = None,
    output: str | Path | None = None,
    no_browser: bool = False,
    slide_timeout: float = 120.0,
    id_from: IdFrom = "name",
) -> ViewResult:
    """Show slides, features and predictions in the browser, from this machine to this machine alone; Ctrl-C ends it.

    Args:
        inputs: Output folders of `longslide predict` and `embed`, run folders, feature files, slide files, folders of
            slides, and slide tables. What they say of a slide is joined by its id; a table that has the columns of the
            labels says what is true.
        port: The port. Default: a free one.
        output: Folder for regions that are drawn: `regions/` in it. Default: the first output folder of `predict` or `embed`
            that is given.
        no_browser: Only print the address.
        slide_timeout: Seconds that opening a slide or drawing a picture may take; then the page says so, and the viewer goes
            on.
        id_from: What ids of slide files are made of, as `embed` takes it: `path` where folders have slides of the same name.

    Returns:
        How many slides were shown.

    Raises:
        LongslideError: Nothing to see, results of a newer Longslide, a port in use, or a package that is missing.
    """
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise LongslideError(f"view needs the package {error.name}: pip install 'longslide[view]'") from error
    if output is not None:
        make_output_folder(Path(output))
    given = [inputs] if isinstance(inputs, str | Path) else inputs
    collection = read_collection(given, None if output is None else Path(output), id_from)
    listening = _listen(port)
    _serve(collection, listening, slide_timeout, opens_browser=not no_browser)
    return ViewResult(len(collection.slides))


def _listen(port: int | None) -> socket.socket:
    """A socket on the loopback interface.

    Raises:
        LongslideError: The port is in use, or may not be used.
    """
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(("127.0.0.1", port or 0))
        listening.listen(128)
    except OSError as error:
        listening.close()
        raise LongslideError(
            f"--port {port}: cannot listen there ({error.strerror}); choose another, or leave it out for a free one"
        ) from error
    return listening


def _serve(collection: Collection, listening: socket.socket, slide_timeout: float, *, opens_browser: bool) -> None:
    import uvicorn

    from .app import create_app

    token, once = secrets.token_urlsafe(16), secrets.token_urlsafe(16)
    root = f"http://127.0.0.1:{listening.getsockname()[1]}/"
    app = create_app(collection, token, slide_timeout, once)
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    # In a thread of its own: the signals are the command line's.
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="viewer")
    before = set(threading.enumerate())
    try:
        thread.start()
        print(
            f"{count(len(collection.slides), 'slide')} at\n\n  {root}{token}/\n\nfor this machine alone; Ctrl-C ends it",
            flush=True,
        )
        has_browser = sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
        if opens_browser and has_browser:
            webbrowser.open(root + once)
        thread.join()
    except KeyboardInterrupt as end:  # Ctrl-C is how a viewer ends
        if isinstance(end, Stopped) and end.number != signal.SIGINT:
            raise
    finally:
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # of requests that are cut off
        server.should_exit = True
        app.close()  # what waits for a slide is answered at once
        try:
            _join(thread, before)
        finally:
            listening.close()


def _join(server: threading.Thread, before: set[threading.Thread]) -> None:
    """Wait for the server and for the threads of its requests, which it does not wait for itself."""
    until = time.monotonic() + ENDING_SECONDS
    try:
        server.join(ENDING_SECONDS)
        for thread in set(threading.enumerate()) - before:
            thread.join(max(0.0, until - time.monotonic()))
    finally:
        abandon(set(threading.enumerate()) - before)
