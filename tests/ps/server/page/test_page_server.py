"""The status page's HTTP server: what it says, and what it does not."""

from __future__ import annotations

import hashlib
import http.client
import json
import socket
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from ps.servers import serving
from ps.workers import backward, batch, make_model

import topq_dist.ps.server.page
from topq_dist.ps import ParameterServerOptimizer
from topq_dist.ps.server.process import ParameterServer

SGD = {"inner_opt": "sgd", "options": {"lr": 0.1}}
STATIC = files(topq_dist.ps.server.page) / "static"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ParameterServer]:
    with serving(tmp_path_factory.mktemp("run"), SGD, http="127.0.0.1:0") as server:
        model = make_model()
        with ParameterServerOptimizer(
            model.named_parameters(), str(server.address), worker="a"
        ) as optimizer:
            for step in range(3):
                backward(model, [batch(0, step)])
                optimizer.report(loss=float("nan") if step else 0.5)
                optimizer.step()
            yield server


def answer_to(
    server: ParameterServer, method: str, path: str, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    port = int(server.views["http"].rsplit(":", 1)[1].strip("/"))
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.headers), answer.read()
    finally:
        connection.close()


def status_of(server: ParameterServer, query: str = "") -> dict[str, Any]:
    code, _, text = answer_to(server, "GET", f"/api/status{query}")
    assert code == 200
    told: dict[str, Any] = json.loads(text)
    return told


def test_it_tells_of_the_run_and_then_what_is_new(server: ParameterServer) -> None:
    told = status_of(server)
    assert (told["version"], told["numel"], told["mode"]) == (3, 212, "sync")
    (worker,) = told["workers"]
    assert (worker["worker"], worker["lag"], worker["late"]) == ("a", 0, 0)
    assert worker["loss"] is None  # NaN is no JSON
    assert [point[0] for point in told["points"]] == [1, 2, 3]
    assert told["points"][0][5] == 0.5
    assert told["received_dense_bytes"] == 3 * 4 * 212
    later = status_of(server, f"?after=2&instance={told['instance']}")
    assert [point[0] for point in later["points"]] == [3]
    assert len(status_of(server, "?after=2&instance=another")["points"]) == 3


def test_every_answer_keeps_a_browser_from_all_else(server: ParameterServer) -> None:
    for path, code in (("/", 200), ("/page.js", 200), ("/api/status", 200), ("/nothing", 404)):
        found, headers, text = answer_to(server, "GET", path)
        assert (found, len(text)) == (code, int(headers["Content-Length"]))
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; ")
        assert "unsafe" not in policy
        assert "http" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cache-Control"] == "no-store"
    found, headers, text = answer_to(server, "HEAD", "/")
    assert (found, text) == (200, b"")
    assert int(headers["Content-Length"]) > 500


@pytest.mark.parametrize(
    "path",
    ["/../config.py", "/%2e%2e/http_server.py", "//etc/passwd", "/vendor/", "/vendor/vendor.json"],
)
def test_only_the_pages_own_files_are_there(server: ParameterServer, path: str) -> None:
    assert answer_to(server, "GET", path)[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "NONSENSE"])
def test_nothing_can_be_changed(server: ParameterServer, method: str) -> None:
    assert answer_to(server, method, "/api/status")[0] == 405


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", ""])
def test_other_names_for_loopback_are_not_answered(server: ParameterServer, host: str) -> None:
    # as a page of that name would have a browser ask, once the name leads here
    code, _, text = answer_to(server, "GET", "/api/status", Host=host)
    assert code == 421
    assert b"version" not in text
    for name in ("localhost", "localhost:80", "[::1]:80", "127.0.0.1:1"):
        assert answer_to(server, "GET", "/api/status", Host=name)[0] == 200


@pytest.mark.parametrize("after", ["x", "1.5", "1e9", "9" * 80, "--1", ""])
def test_a_version_that_is_none_is_refused(server: ParameterServer, after: str) -> None:
    code, _, text = answer_to(server, "GET", f"/api/status?after={after}")
    assert code == (200 if not after else 400), text


def test_too_many_fields_are_refused(server: ParameterServer) -> None:
    assert answer_to(server, "GET", "/api/status?" + "&".join(["a=1"] * 20))[0] == 400


def test_bytes_that_are_no_request_end_only_their_connection(server: ParameterServer) -> None:
    port = int(server.views["http"].rsplit(":", 1)[1].strip("/"))
    for junk in (b"\x16\x03\x01\x02\x00\n\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\n" * 9):
        with socket.create_connection(("127.0.0.1", port), 10) as raw:
            raw.sendall(junk)
            raw.shutdown(socket.SHUT_WR)
            while raw.recv(4096):
                pass
    assert status_of(server)["version"] == 3


def test_silent_connections_do_not_shut_others_out_for_long(server: ParameterServer) -> None:
    port = int(server.views["http"].rsplit(":", 1)[1].strip("/"))
    silent = [socket.create_connection(("127.0.0.1", port), 10) for _ in range(50)]
    try:
        assert status_of(server)["version"] == 3
    finally:
        for one in silent:
            one.close()


def test_a_port_that_is_taken_is_an_error_that_names_it(
    server: ParameterServer, tmp_path: Path
) -> None:
    where = server.views["http"].removeprefix("http://").strip("/")
    with (
        pytest.raises(OSError, match=rf"status page at {where}: .*in use"),
        serving(tmp_path, SGD, http=where),
    ):
        pass


def test_what_others_wrote_is_as_they_published_it_with_its_licence() -> None:
    vendor = STATIC / "vendor"
    pins = json.loads(vendor.joinpath("vendor.json").read_text())
    assert {one.name for one in vendor.iterdir()} == {*pins, "vendor.json"}
    for name, pin in pins.items():
        assert hashlib.sha256(vendor.joinpath(name).read_bytes()).hexdigest() == pin["sha256"]
        assert f"{ {'uplot': 'uPlot'}.get(pin['package'], pin['package']) }.LICENSE" in pins
    assert sum(len(one.read_bytes()) for one in vendor.iterdir()) < 100_000


def test_the_page_names_nothing_that_is_elsewhere() -> None:
    for name in ("index.html", "page.css", "page.js", "charts.js", "format.js"):
        text = STATIC.joinpath(name).read_text()
        assert "//" not in text.replace("// ", "").replace("\n//", ""), name
