"""Serve the page of `tiler view` over HTTP: on loopback only, under a path known only to this user, and only names that
are on a short list or consist of numbers."""

from __future__ import annotations

import json
import re
import secrets
import threading
import time
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

from tiler.viewing.pyramid import OVERLAP, SIDE, Pyramid

HOST = "127.0.0.1"
_ONCE = "once"  # the path of tickets
_TICKET = 60.0  # seconds that a browser has to start
_FILES = {
    "": ("index.html", "text/html; charset=utf-8"),
    "view.js": ("view.js", "text/javascript; charset=utf-8"),
    "openseadragon.min.js": ("openseadragon.min.js", "text/javascript; charset=utf-8"),
}
_PAGE = Path(__file__).with_name("page")
_TILE = re.compile(r"tiles/(\d{1,2})/(\d{1,6})_(\d{1,6})\.jpg")
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class PageServer:
    """Serves `pyramid` inside the `with` block, in threads of its own; `url` is its page. Other users of the machine
    can read a browser's command line, so the browser is started with a `ticket` instead."""

    def __init__(self, pyramid: Pyramid) -> None:
        self._server = _Server((HOST, 0), _Handler)  # the system chooses a free port
        self._server.pyramid, self._server.secret = pyramid, secrets.token_urlsafe(12)
        self._server.tickets = {}
        self.port = int(self._server.server_address[1])
        self.url = f"http://{HOST}:{self.port}/{self._server.secret}/"
        self._thread = threading.Thread(target=self._server.serve_forever, name="page", daemon=True)

    def ticket(self) -> str:
        """Return an address that leads to the page once, within _TICKET seconds, and then to nothing."""
        ticket = secrets.token_urlsafe(12)
        self._server.tickets[ticket] = time.monotonic() + _TICKET
        return f"http://{HOST}:{self.port}/{_ONCE}/{ticket}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True  # a browser keeps its connections open
    block_on_close = False
    pyramid: Pyramid
    secret: str
    tickets: dict[str, float]  # each with the time when it ends

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # the browser has closed the connection


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        port = self.server.server_address[1]
        # If another site's name is made to resolve to this machine, its pages send that name as Host.
        if self.headers.get("Host") not in (f"{HOST}:{port}", f"localhost:{port}"):
            self._answer(HTTPStatus.FORBIDDEN)
            return
        secret, _, name = self.path.removeprefix("/").partition("?")[0].partition("/")
        if secret == _ONCE:
            self._redirect(name)
        elif not secrets.compare_digest(secret.encode(), self.server.secret.encode()):
            self._answer(HTTPStatus.NOT_FOUND)
        elif name in _FILES:
            file, kind = _FILES[name]
            self._answer(HTTPStatus.OK, (_PAGE / file).read_bytes(), kind)
        elif name == "facts.json":
            self._answer(HTTPStatus.OK, json.dumps(self._facts()).encode(), "application/json")
        elif (match := _TILE.fullmatch(name)) is not None:
            self._tile(*map(int, match.groups()))
        else:
            self._answer(HTTPStatus.NOT_FOUND)

    def _redirect(self, ticket: str) -> None:
        if time.monotonic() < self.server.tickets.pop(ticket, 0.0):
            self._answer(HTTPStatus.SEE_OTHER, more={"Location": f"/{self.server.secret}/"})
        else:
            self._answer(HTTPStatus.NOT_FOUND)

    def _facts(self) -> dict[str, Any]:
        """Return the facts that the page needs."""
        p = self.server.pyramid
        return {
            "name": p.path.name, "width": p.width, "height": p.height, "levels": p.levels, "side": SIDE,
            "overlap": OVERLAP, "whole": p.is_whole, "fault": p.fault,
        }  # fmt: skip

    def _tile(self, level: int, column: int, row: int) -> None:
        pyramid = self.server.pyramid
        whole = pyramid.is_whole  # read before the tile, which may appear in between
        if (data := pyramid.tile(level, column, row)) is not None:
            self._answer(HTTPStatus.OK, data, "image/jpeg", "private, max-age=3600")
        else:
            self._answer(HTTPStatus.NOT_FOUND if whole else HTTPStatus.SERVICE_UNAVAILABLE)  # the page retries on 503

    def _answer(
        self, status: HTTPStatus, body: bytes = b"", kind: str = "text/plain", keep: str = "no-store",
        more: Mapping[str, str] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        self.send_response(status)
        sent = {"Content-Type": kind, "Content-Length": str(len(body)), "Cache-Control": keep, **_HEADERS, **more}
        for header, value in sent.items():
            self.send_header(header, value)
        self.end_headers()
        self.wfile.write(body)

    def version_string(self) -> str:
        return "tiler"

    def log_message(self, format: str, *args: Any) -> None:
        pass
