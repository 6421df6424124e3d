"""The HTTP server of the status page: a few files and one JSON, read-only, to this host's browsers.

A page of another site can have a browser ask a server on loopback, under any name that leads there:
so that only names of loopback are answered there, and no page may embed or read ours.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

from topq_dist.ps.security.address import Address
from topq_dist.ps.server.coordinator import Coordinator
from topq_dist.ps.server.page.status_json import StatusJson

_log = logging.getLogger(__name__)
_STATIC = files(__package__) / "static"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_FILES = {
    "/": "index.html",
    "/page.css": "page.css",
    "/page.js": "page.js",
    "/charts.js": "charts.js",
    "/format.js": "format.js",
    "/icon.svg": "icon.svg",
    "/vendor/preact.min.umd.js": "vendor/preact.min.umd.js",
    "/vendor/hooks.umd.js": "vendor/hooks.umd.js",
    "/vendor/htm.umd.js": "vendor/htm.umd.js",
    "/vendor/uPlot.iife.min.js": "vendor/uPlot.iife.min.js",
    "/vendor/uPlot.min.css": "vendor/uPlot.min.css",
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_STATUS_PATH = "/api/status"
_SILENT_S = 10.0
_MOST_CONNECTIONS = 64
_LONGEST_TEXT = 64


class _File(NamedTuple):
    content: bytes
    kind: str


def _load() -> dict[str, _File]:
    return {
        path: _File(_STATIC.joinpath(name).read_bytes(), _TYPES[name[name.rindex(".") :]])
        for path, name in _FILES.items()
    }


class PageServer:
    """Serves the status page of a coordinator from threads of its own, until it is closed.

    host: an address or a name of this machine. port: 0 takes a free one, which `address` says.
    Raises OSError, naming the address, where it cannot be had.
    """

    def __init__(self, coordinator: Coordinator, host: str, port: int) -> None:
        where = Address(host=host, port=port)
        try:
            self._server = _Server(where, _load(), StatusJson(coordinator))
        except OSError as error:
            raise OSError(f"status page at {where}: {error}") from error
        self.address: tuple[str, int] = (host, int(self._server.server_address[1]))
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="status page", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Serve no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = _MOST_CONNECTIONS
    # a thread that waits for a silent browser keeps nobody
    block_on_close = False

    def __init__(self, where: Address, pages: Mapping[str, _File], status: StatusJson) -> None:
        family, *_, bound = socket.getaddrinfo(
            where.host, where.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        self.address_family = family
        self.pages = pages
        self.status = status
        self.only_loopback = where.is_loopback
        self._free = threading.BoundedSemaphore(_MOST_CONNECTIONS)
        self._open: set[socket.socket] = set()
        super().__init__(bound, _Handler)  # type: ignore[arg-type] # IPv6 has four parts

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._open.discard(request)
            self._free.release()

    def server_close(self) -> None:
        """Listen no more, and hang up on browsers that keep a connection."""
        super().server_close()
        for one in list(self._open):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        _log.debug("a browser at %s", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    server_version = "topq"
    sys_version = ""
    timeout = _SILENT_S

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        if not self._is_for_us():
            self._say(HTTPStatus.MISDIRECTED_REQUEST, "this server is asked by names of loopback")
        elif parts.path == _STATUS_PATH:
            self._answer_status(parts.query)
        elif parts.path in self.server.pages:
            page = self.server.pages[parts.path]
            self._send(HTTPStatus.OK, page.content, page.kind)
        else:
            self._say(HTTPStatus.NOT_FOUND, "no such page")

    do_HEAD = do_GET  # noqa: N815

    def _answer_status(self, query: str) -> None:
        given = parse_qs(query, max_num_fields=8)
        after, instance = given.get("after", ["-1"])[0], given.get("instance", [""])[0]
        if not after.removeprefix("-").isdecimal() or len(after) > _LONGEST_TEXT:
            self._say(HTTPStatus.BAD_REQUEST, "after: expected a version, a whole number")
            return
        text = self.server.status.text(after=int(after), instance=instance[:_LONGEST_TEXT])
        self._send(HTTPStatus.OK, text.encode(), "application/json")

    def _is_for_us(self) -> bool:
        if not self.server.only_loopback:
            return True
        host = self.headers.get("Host", "")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        return Address(host=name.strip("[]")).is_loopback

    def _say(self, status: HTTPStatus, text: str) -> None:
        self._send(status, json.dumps({"error": text}).encode(), "application/json")

    def _send(self, status: HTTPStatus, content: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what is no request, or one that would change something."""
        if code == HTTPStatus.NOT_IMPLEMENTED:
            code = HTTPStatus.METHOD_NOT_ALLOWED
        self.close_connection = True
        self._say(HTTPStatus(code), message or HTTPStatus(code).phrase)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - as its base has it
        _log.debug(format, *args)
