"""The HTTP server of metrics and of the status page."""

from __future__ import annotations

import logging
import socket
import threading
import urllib.error
from collections.abc import Iterator
from contextlib import suppress

import pytest
from http_get import got

from topq_dist.telemetry.http_server import Answer, HttpServer, Request


def respond(request: Request) -> Answer:
    if request.path == "/broken":
        raise RuntimeError("out of order")
    return Answer(request.path.encode(), "text/plain")


@pytest.fixture
def server() -> Iterator[HttpServer]:
    made = HttpServer("test", "127.0.0.1", 0, respond)
    yield made
    made.close()
    made.close()


def answer_to(server: HttpServer, sent: bytes) -> bytes:
    """Return all that is answered to these bytes."""
    with socket.create_connection(server.address, 10) as end:
        end.sendall(sent)
        end.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: end.recv(4096), b""))


@pytest.mark.parametrize("path", ["http://[x/", "http://[::1/x", "//[x]y"])
def test_a_path_that_is_none_is_refused(server: HttpServer, path: str) -> None:
    said = answer_to(server, f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert said.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 200 ")), said
    assert said.startswith(b"HTTP/1.1 400 ") == path.startswith("http"), said


def test_what_fails_is_answered_and_logged_once(
    server: HttpServer, caplog: pytest.LogCaptureFixture
) -> None:
    url = "http://{}:{}/".format(*server.address)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            with pytest.raises(urllib.error.HTTPError) as refused:
                got(url + "broken")
            with refused.value as answer:
                assert (answer.code, b"order" in answer.read()) == (500, False)
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.exc_info
    assert got(url) == "/"


def test_what_is_logged_of_a_request_is_one_line(
    server: HttpServer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        answer_to(
            server, b"GET /\x1b[31m\x0b\rtopq: CRITICAL: x HTTP/1.1\r\nHost: localhost\r\n\r\n"
        )
    said = [record.getMessage() for record in caplog.records if "CRITICAL" in record.getMessage()]
    assert said
    assert all(one.isprintable() for one in said), said


@pytest.mark.parametrize("begun", [b"", b"GET / HTTP/1.1\r\nHost: localhost\r\nX: "])
def test_who_drips_has_no_more_time_than_who_is_silent(begun: bytes) -> None:
    server = HttpServer("test", "127.0.0.1", 0, respond, limit_s=0.3)
    ended = threading.Event()
    with socket.create_connection(server.address, 10) as end:
        end.sendall(begun)

        def drip() -> None:
            while not ended.wait(0.02):
                try:
                    end.sendall(b"G")
                except OSError:
                    return

        dripping = threading.Thread(target=drip)
        dripping.start()
        try:
            assert end.recv(1) == b""
        except ConnectionError:
            pass  # what had dripped was not read any more
        finally:
            ended.set()
            dripping.join()
    server.close()


def test_a_connection_is_kept_from_request_to_request(server: HttpServer) -> None:
    asked = b"GET /a HTTP/1.1\r\nHost: localhost\r\n\r\nHEAD /b HTTP/1.1\r\nHost: localhost\r\n\r\n"
    said = answer_to(server, asked)
    assert said.count(b"HTTP/1.1 200 OK") == 2
    assert said.count(b"\r\n\r\n/") == 1


@pytest.mark.parametrize(
    "header", ["Content-Length: 46", "Content-Length: x", "Transfer-Encoding: chunked"]
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_what_comes_with_a_request_is_no_request(
    server: HttpServer, method: str, header: str
) -> None:
    asked = f"{method} /a HTTP/1.1\r\nHost: localhost\r\n{header}\r\n\r\n"
    with socket.create_connection(server.address, 10) as end:
        end.sendall(asked.encode() + b"GET /b HTTP/1.1\r\nHost: localhost\r\n\r\n    ")
        said = bytearray()
        # the end may be a reset, since something was not read
        with suppress(ConnectionResetError):
            while part := end.recv(4096):
                said += part
    assert said.count(b"HTTP/1.1 ") <= 1
    assert b"/b" not in said


def test_a_length_of_none_is_no_body(server: HttpServer) -> None:
    asked = b"GET /a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
    assert answer_to(server, 2 * asked).count(b"HTTP/1.1 200 OK") == 2
