"""Who may ask a viewer, and what its answers forbid."""

import secrets
from collections.abc import Callable

from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK_NAMES = ("127.0.0.1", "localhost", "[::1]")

OPENSEADRAGON_STYLE = "sha256-9xTiqzfwFaL2SGb1rmr8gysEwVVjIvqWAgmZgqFqpEE="
"""The one inline style that is allowed: what OpenSeadragon adds to take the focus ring away on touch screens."""

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; "
    f"style-src 'self' '{OPENSEADRAGON_STYLE}'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class Guard:
    """Lets only those in who know the token and name this machine, and adds the headers of `HEADERS` to every answer.

    A page of another site whose name was made to mean this machine (DNS rebinding) sends its own name as Host; one that
    posts here sends its own name as Origin.

    Args:
        app: The application behind it.
        token: The first part of every path; without it there is nothing.
        close: Called when the server ends, and by whoever ends it sooner.
        once: A path that leads to the first page, once: for the command line of a browser, which others on this machine
            can read.
    """

    def __init__(self, app: ASGIApp, token: str, close: Callable[[], None], once: str = "") -> None:
        self._app = app
        self._token = token
        self.close = close
        self._once = once

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, as ASGI has it."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        if scope["type"] != "http":
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"], *((name.lower().encode(), value.encode()) for name, value in HEADERS.items())
                ]  # fmt: skip
            await send(message)

        await self._answer(scope)({**scope, "root_path": f"/{self._token}"}, receive, send_guarded)

    def _answer(self, scope: Scope) -> ASGIApp:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        origin = headers.get(b"origin")
        first = scope["path"].lstrip("/").partition("/")[0]
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if name.lower() not in LOOPBACK_NAMES or origin not in (None, f"http://{host}".encode("latin-1")):
            return PlainTextResponse("This viewer answers to 127.0.0.1 and localhost alone.\n", 403)
        if self._once and secrets.compare_digest(first.encode("utf-8", "surrogateescape"), self._once.encode()):
            self._once = ""
            return RedirectResponse(f"/{self._token}/")
        if not secrets.compare_digest(first.encode("utf-8", "surrogateescape"), self._token.encode()):
            return PlainTextResponse("Not found. The viewer's address has a key in it: copy all of it.\n", 404)
        if scope["path"] == f"/{self._token}":  # the address without its last slash, to which the pages are relative
            return RedirectResponse(f"/{self._token}/")
        return self._app

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await send({"type": "lifespan.startup.complete"})
            else:
                self.close()
                await send({"type": "lifespan.shutdown.complete"})
                return
