"""An HTTP server for what is looked at: read-only, of few connections, each with little time.

A page of another site can have a browser ask a server on loopback, under any name that leads there:
so that only names of loopback are answered there, and no page may embed or read ours.
"""

from __future__ import annotations

import io
import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from topq_dist.loopback import is_loopback
from topq_dist.telemetry.logs import one_line

_log = logging.getLogger(__name__)
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
_MOST_CONNECTIONS = 64
_LIMIT_S = 10.0


class Request(NamedTuple):
    """What is asked for: path, query and Accept header, as they came."""

    path: str
    query: str
    accept: str


class Answer(NamedTuple):
    """What is answered; kind: its Content-Type."""

    content: bytes
    kind: str
    status: HTTPStatus = HTTPStatus.OK


def refusal(status: HTTPStatus, text: str) -> Answer:
    """Return the answer that says why there is none."""
    return Answer(json.dumps({"error": text}).encode(), "application/json", status)


class HttpServer:
    """Serves what `respond` answers, from threads of its own, until it is closed.

    name: its thread's, and the log's. host: an address or a name of this machine. port: 0 takes a
    free one. address: (host, port) as it is bound. limit_s: how long a request may be on its
    way, and an answer. Raises OSError where the address cannot be had.
    """

    def __init__(
        self,
        name: str,
        host: str,
        port: int,
        respond: Callable[[Request], Answer],
        *,
        limit_s: float = _LIMIT_S,
    ) -> None:
        self._server = _Server(name, host, port, respond, limit_s)
        bound = self._server.server_address
        self.address: tuple[str, int] = (str(bound[0]), int(bound[1]))
        self._thread = threading.Thread(target=self._server.serve_forever, name=name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Serve no more, and hang up; to close again does nothing."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingTCPServer):  # http.server's own would ask the resolver for this host's name
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = _MOST_CONNECTIONS
    # a thread that waits for a silent client keeps nobody
    block_on_close = False

    def __init__(
        self,
        name: str,
        host: str,
        port: int,
        respond: Callable[[Request], Answer],
        limit_s: float,
    ) -> None:
        family, *_, bound = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        self.address_family = family
        self.name = name
        self.respond = respond
        self.limit_s = limit_s
        self.only_loopback = is_loopback(host)
        self._free = threading.BoundedSemaphore(_MOST_CONNECTIONS)
        self._open: set[socket.socket] = set()
        self._has_failed = False
        super().__init__(bound, _Handler)  # type: ignore[arg-type] # IPv6 has four parts

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        self._open.add(request)
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._leave(request)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._leave(request)

    def _leave(self, request: socket.socket) -> None:
        self._open.discard(request)
        self._free.release()

    def server_close(self) -> None:
        """Listen no more, and hang up on clients that keep a connection."""
        super().server_close()
        for one in list(self._open):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        _log.debug("%s: a client at %s", self.name, client_address, exc_info=True)

    def tell_failure(self) -> None:
        """Log the exception in hand: an error once, since who asked will ask again."""
        level = logging.DEBUG if self._has_failed else logging.ERROR
        self._has_failed = True
        _log.log(level, "%s: a request could not be answered", self.name, exc_info=True)


class _Incoming(io.RawIOBase):
    """A connection's bytes until a deadline, so that one which drips has no more time than one that
    is silent.
    """

    def __init__(self, connection: socket.socket, limit_s: float) -> None:
        self._connection = connection
        self._limit_s = limit_s
        self.begin()

    def begin(self) -> None:
        """Begin a request's time."""
        self._end_s = time.monotonic() + self._limit_s

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left_s = self._end_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError(f"no whole request within {self._limit_s:g} s")
        self._connection.settimeout(left_s)
        try:
            return self._connection.recv_into(buffer)
        finally:
            self._connection.settimeout(self._limit_s)  # of what is sent


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    server_version = "topq"
    sys_version = ""

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self._incoming = _Incoming(self.connection, self.server.limit_s)
        self.rfile = io.BufferedReader(self._incoming)

    def handle_one_request(self) -> None:
        """Answer a request, if it is there in time."""
        self._incoming.begin()
        super().handle_one_request()

    def do_GET(self) -> None:
        # what is not read would be taken for the next request
        self.close_connection |= self._has_body()
        self._send(self._answer())

    do_HEAD = do_GET  # noqa: N815

    def _answer(self) -> Answer:
        if not self._is_for_us():
            text = "this server is asked by names of loopback"
            return refusal(HTTPStatus.MISDIRECTED_REQUEST, text)
        try:
            parts = urlsplit(self.path)
        except ValueError:
            return refusal(HTTPStatus.BAD_REQUEST, "that is no path")
        try:
            accept = self.headers.get("Accept", "")
            return self.server.respond(Request(parts.path, parts.query, accept))
        except Exception:  # noqa: BLE001 - it is logged, and is nobody's end
            self.server.tell_failure()
            return refusal(HTTPStatus.INTERNAL_SERVER_ERROR, "the server's log says why")

    def _has_body(self) -> bool:
        lengths = self.headers.get_all("Content-Length", [])
        return "Transfer-Encoding" in self.headers or any(one.strip() != "0" for one in lengths)

    def _is_for_us(self) -> bool:
        if not self.server.only_loopback:
            return True
        host = self.headers.get("Host", "")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        return is_loopback(name.strip("[]"))

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", answer.kind)
        self.send_header("Content-Length", str(len(answer.content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.content)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what is no request, or one that would change something."""
        if code == HTTPStatus.NOT_IMPLEMENTED:
            code = HTTPStatus.METHOD_NOT_ALLOWED
        self.close_connection = True
        self._send(refusal(HTTPStatus(code), message or HTTPStatus(code).phrase))

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - as its base has it
        _log.debug("%s: %s", self.server.name, one_line(format % args))
