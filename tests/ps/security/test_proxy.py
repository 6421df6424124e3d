"""The proxy of the environment: gRPC's road, and the diagnosis on the same one."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator

import grpc
import pytest
from ps.health_server import ask
from ps.health_server import serving as healthy

from topq_dist.ps.client.probe import diagnose_connection, lasting_reason
from topq_dist.ps.security.address import Address
from topq_dist.ps.security.policy import ClientSecurity, ServerSecurity
from topq_dist.ps.security.proxy import Proxy, proxy_of

# a name of this machine that is not localhost: gRPC goes to it through a proxy
HOST = socket.gethostname()


class HttpProxy:
    """A proxy for CONNECT that takes everybody to `target`, or says `refusal`."""

    def __init__(self, target: Address | None, refusal: str = "403 Forbidden") -> None:
        self.target, self.refusal = target, refusal
        self.asked: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(
                    target=self._serve, args=(self._listener.accept()[0],), daemon=True
                ).start()

    def _serve(self, near: socket.socket) -> None:
        head = b""
        with contextlib.suppress(OSError), near:
            while b"\r\n\r\n" not in head:
                head += near.recv(1)
            self.asked.append(head.decode())
            if self.target is None:
                near.sendall(f"HTTP/1.1 {self.refusal}\r\n\r\n".encode())
                return
            with self.target.connect(10) as far:
                far.settimeout(None)
                near.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                back = threading.Thread(target=carry, args=(far, near), daemon=True)
                back.start()
                carry(near, far)
                back.join()

    def close(self) -> None:
        self._listener.close()


def carry(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while chunk := source.recv(1 << 16):
            sink.sendall(chunk)
        sink.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def refusing() -> Iterator[HttpProxy]:
    proxy = HttpProxy(None)
    yield proxy
    proxy.close()


P = "http://127.0.0.1:3128"
ROADS: list[tuple[str, dict[str, str], str | None]] = [
    ("far:1", {"http_proxy": P}, "http_proxy"),
    ("far:1", {"https_proxy": P, "http_proxy": "http://10.9.9.9:1"}, "https_proxy"),
    ("far:1", {"grpc_proxy": P, "https_proxy": "http://10.9.9.9:1"}, "grpc_proxy"),
    ("far:1", {"grpc_proxy": "", "http_proxy": P}, None),
    ("far:1", {"HTTP_PROXY": P, "all_proxy": P}, None),
    ("far:1", {"http_proxy": "https://127.0.0.1:3128"}, None),
    ("far:1", {"http_proxy": "127.0.0.1:3128"}, None),
    ("far:1", {"http_proxy": "http://127.0.0.1:port"}, None),
    ("far:1", {"http_proxy": P, "no_proxy": "near, far ,x"}, None),
    ("far:1", {"http_proxy": P, "no_proxy": "FAR"}, None),
    ("far:1", {"http_proxy": P, "no_proxy": ".far"}, None),
    ("ps.far:1", {"http_proxy": P, "no_proxy": "far"}, None),
    ("far:1", {"http_proxy": P, "no_proxy": "ar"}, "http_proxy"),
    ("far:1", {"http_proxy": P, "no_proxy": "*"}, "http_proxy"),
    ("far:1", {"http_proxy": P, "no_proxy": "far:1"}, "http_proxy"),
    ("far:1", {"http_proxy": P, "no_proxy": "far", "no_grpc_proxy": ""}, "http_proxy"),
    ("far:1", {"http_proxy": P, "NO_PROXY": "far"}, "http_proxy"),
    ("10.1.2.3:1", {"http_proxy": P, "no_proxy": "10.0.0.0/8"}, None),
    ("11.1.2.3:1", {"http_proxy": P, "no_proxy": "10.0.0.0/8"}, "http_proxy"),
    ("[fd00::2]:1", {"http_proxy": P, "no_proxy": "fd00::/8"}, None),
    ("far:1", {"http_proxy": P, "no_proxy": "10.0.0.0/8"}, "http_proxy"),
    # ours: they stay on the machine, whatever the environment says
    ("127.0.0.1:1", {"http_proxy": P}, None),
    ("localhost:1", {"http_proxy": P}, None),
    ("[::1]:1", {"http_proxy": P}, None),
    ("unix:/run/x", {"http_proxy": P}, None),
]


@pytest.mark.parametrize(("address", "environment", "variable"), ROADS)
def test_the_road_is_the_one_that_grpc_takes(
    address: str, environment: dict[str, str], variable: str | None
) -> None:
    proxy = proxy_of(Address.parse(address), environment)
    assert (proxy and proxy.variable) == variable
    if proxy is not None:
        assert (proxy.host, proxy.port) == ("127.0.0.1", 3128)


@pytest.mark.usefixtures("no_proxies")
@pytest.mark.parametrize(
    "names",
    [
        {"http_proxy"},
        {"grpc_proxy", "https_proxy"},
        {"HTTP_PROXY"},
        {"http_proxy", "no_proxy"},
        {"http_proxy", "NO_PROXY"},
    ],
)
def test_grpc_takes_it_too(
    monkeypatch: pytest.MonkeyPatch, refusing: HttpProxy, names: set[str]
) -> None:
    """The rules above are gRPC's, and not written down anywhere: so here it is asked."""
    for name in names:
        monkeypatch.setenv(name, HOST if name.lower() == "no_proxy" else refusing.url)
    where = Address.parse(f"{HOST}:1")
    ask(where, ClientSecurity(), timeout_s=5)
    assert bool(refusing.asked) == (proxy_of(where) is not None)


@pytest.mark.usefixtures("no_proxies")
def test_a_proxy_that_does_not_lead_there_is_named(
    monkeypatch: pytest.MonkeyPatch, refusing: HttpProxy
) -> None:
    monkeypatch.setenv("https_proxy", refusing.url.replace("//", "//user:pass%40word@"))
    where = Address.parse("parameter-server.example:50051")
    why = diagnose_connection(where, None)
    assert why is not None
    assert f"the proxy {refusing.url.removeprefix('http://')} of https_proxy" in why
    assert "HTTP/1.1 403 Forbidden" in why
    assert "add parameter-server.example to no_proxy" in why
    assert "pass" not in why
    assert "Proxy-Authorization: Basic dXNlcjpwYXNzQHdvcmQ=" in refusing.asked[0]
    assert lasting_reason(where, None) is None


@pytest.mark.usefixtures("no_proxies")
def test_a_proxy_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
    why = diagnose_connection(Address.parse("parameter-server.example:50051"), None)
    assert why is not None
    assert f"127.0.0.1:{port} of http_proxy: Connection refused" in why


@pytest.mark.usefixtures("no_proxies")
def test_a_server_behind_a_proxy_is_reached_and_diagnosed(monkeypatch: pytest.MonkeyPatch) -> None:
    with healthy(ServerSecurity()) as where:
        proxy = HttpProxy(where)
        monkeypatch.setenv("grpc_proxy", proxy.url)
        far = Address.parse(f"parameter-server.example:{where.port}")
        assert ask(far, ClientSecurity()) is grpc.StatusCode.OK
        assert diagnose_connection(far, None) is None
        proxy.close()
    assert {head.split(" HTTP/1.")[0] for head in proxy.asked} == {f"CONNECT {far}"}


def test_a_proxys_words_hide_the_password() -> None:
    proxy = Proxy(variable="http_proxy", host="h", port=1, credentials="user:secret")
    assert "secret" not in f"{proxy} {proxy!r}"
