"""The status page over HTTP: a few files and one JSON."""

from __future__ import annotations

from http import HTTPStatus
from importlib.resources import files
from urllib.parse import parse_qs

from topq_dist.ps.security.address import Address
from topq_dist.ps.server.coordinator import Coordinator
from topq_dist.ps.server.page.status_json import StatusJson
from topq_dist.telemetry.http_server import Answer, HttpServer, Request, refusal

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
_STATUS_PATH = "/api/status"
_LONGEST_TEXT = 64
_MOST_FIELDS = 8


def _load() -> dict[str, Answer]:
    return {
        path: Answer(_STATIC.joinpath(name).read_bytes(), _TYPES[name[name.rindex(".") :]])
        for path, name in _FILES.items()
    }


class PageServer:
    """Serves the status page of a coordinator from threads of its own, until it is closed.

    host: an address or a name of this machine. port: 0 takes a free one, which `address` says.
    Raises OSError, naming the address, where it cannot be had.
    """

    def __init__(self, coordinator: Coordinator, host: str, port: int) -> None:
        self._pages = _load()
        self._status = StatusJson(coordinator)
        try:
            self._server = HttpServer("status page", host, port, self._respond)
        except OSError as error:
            where = Address(host=host, port=port)
            raise OSError(f"status page at {where}: {error}") from error
        self.address: tuple[str, int] = (host, self._server.address[1])

    def close(self) -> None:
        """Serve no more."""
        self._server.close()

    def _respond(self, request: Request) -> Answer:
        if request.path == _STATUS_PATH:
            return self._say_status(request.query)
        page = self._pages.get(request.path)
        return page or refusal(HTTPStatus.NOT_FOUND, "no such page")

    def _say_status(self, query: str) -> Answer:
        try:
            given = parse_qs(query, max_num_fields=_MOST_FIELDS)
        except ValueError:
            return refusal(HTTPStatus.BAD_REQUEST, f"expected {_MOST_FIELDS} fields at most")
        after, instance = given.get("after", ["-1"])[0], given.get("instance", [""])[0]
        if not after.removeprefix("-").isdecimal() or len(after) > _LONGEST_TEXT:
            return refusal(HTTPStatus.BAD_REQUEST, "after: expected a version, a whole number")
        text = self._status.text(after=int(after), instance=instance[:_LONGEST_TEXT])
        return Answer(text.encode(), "application/json")
