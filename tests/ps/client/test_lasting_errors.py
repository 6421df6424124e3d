"""Errors that no further try cures: a worker that starts says so within seconds, not at the end."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ps.certificates import Authority, Pair
from ps.client.test_optimizer import PLAIN, connect
from ps.security.test_proxy import carry
from ps.servers import serving
from ps.workers import backward, batch, make_model

from topq_dist.ps import ParameterServerOptimizer, ServerLostError
from topq_dist.ps.client import connection, retry_deadline
from topq_dist.ps.client.call_errors import TransientError
from topq_dist.ps.client.probe import diagnose_connection, lasting_reason
from topq_dist.ps.protocol.errors import NotReadyError
from topq_dist.ps.security.address import Address
from topq_dist.ps.security.policy import ServerSecurity
from topq_dist.ps.security.tls import ClientTls, ServerTls

PATIENT_S = 60.0


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def pair(ours: Authority) -> Pair:
    return ours.issue("server", server=True)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("foreign"), "foreign-ca")


@pytest.mark.parametrize(
    ("at_server", "at_worker", "words"),
    [
        ("tls", "clear", "the server speaks TLS: give the CA of its certificate"),
        ("clear", "tls", "the server does not speak TLS"),
        ("tls", "foreign", "does not hold against"),
        ("mutual", "tls", "a client without certificate"),
        ("tls", "other name", "certificate does not hold"),
    ],
)
def test_it_is_said_within_seconds(
    tmp_path: Path,
    ours: Authority,
    pair: Pair,
    foreign: Authority,
    at_server: str,
    at_worker: str,
    words: str,
) -> None:
    server_tls = ServerTls(certificate=pair.certificate, key=pair.key)
    security = {
        "clear": ServerSecurity(),
        "tls": ServerSecurity(tls=server_tls),
        "mutual": ServerSecurity(tls=replace(server_tls, client_ca=ours.certificate)),
    }[at_server]
    tls = {
        "clear": None,
        "tls": ClientTls(ca=ours.certificate),
        "foreign": ClientTls(ca=foreign.certificate),
        "other name": ClientTls(ca=ours.certificate, server_name="elsewhere.example"),
    }[at_worker]
    began_s = time.monotonic()
    with (
        serving(tmp_path, PLAIN, security=security) as server,
        pytest.raises(ServerLostError, match=words) as caught,
    ):
        connect(make_model(), server, timeout_s=PATIENT_S, tls=tls)
    assert time.monotonic() - began_s < PATIENT_S / 2
    assert str(server.address) in str(caught.value)


def test_a_server_that_is_not_there_yet_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry_deadline, "_LOOK_EVERY_S", 0.0)
    with pytest.raises(ServerLostError, match=r"no answer within 2 s: connection refused"):
        ParameterServerOptimizer(
            make_model().named_parameters(), "127.0.0.1:1", worker="a", timeout_s=2
        )


def test_later_certificates_may_be_changing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody looks once a server has answered: it may be on its way back, with other files."""
    monkeypatch.setattr(retry_deadline, "_LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(connection, "lasting_reason", lambda *_: "wrong for the moment")
    model = make_model()
    with serving(tmp_path, PLAIN) as server, connect(model, server) as optimizer:
        step = connection.Connection.step
        failures = iter([True] * 4)

        def failing(*arguments):  # type: ignore[no-untyped-def]
            if next(failures, False):
                raise TransientError("Socket closed")
            return step(*arguments)

        monkeypatch.setattr(connection.Connection, "step", failing)
        backward(model, [batch(0, 0)])
        optimizer.step()
        assert server.coordinator.status().point.version == 1


def test_one_look_alone_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that ends in the middle of a handshake looks like one that wants a certificate."""
    monkeypatch.setattr(retry_deadline, "_LOOK_EVERY_S", 0.0)
    reasons = iter(["wants one", None, "wants one", "something else", None] + [None] * 50)
    monkeypatch.setattr(connection, "lasting_reason", lambda *_: next(reasons))
    monkeypatch.setattr(connection, "diagnose_connection", lambda *_: "it was silent")
    with pytest.raises(ServerLostError, match="no answer within 3 s: it was silent"):
        ParameterServerOptimizer(
            make_model().named_parameters(), "127.0.0.1:1", worker="a", timeout_s=3
        )


class PortProxy:
    """Accepts, and hangs up on, everybody until `target` is there; then carries bytes to it."""

    def __init__(self, hang_up: Callable[[socket.socket], None]) -> None:
        self.target: Address | None = None
        self.sent_away = 0
        self._hang_up = hang_up
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = self._listener.accept()[0]
                if self.target is None:
                    self._hang_up(near)
                    self.sent_away += 1
                    continue
                far = self.target.connect(10)
                far.settimeout(None)
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=carry_and_close, args=ends, daemon=True).start()

    def close(self) -> None:
        self._listener.close()


def carry_and_close(source: socket.socket, sink: socket.socket) -> None:
    with source:
        carry(source, sink)


def reset(end: socket.socket) -> None:
    end.recv(1)  # Python leaves a socket open that is reset before it is wrapped
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.close()


def after_hello(end: socket.socket) -> None:
    end.recv(1 << 16)
    end.close()


@pytest.mark.parametrize("hang_up", [socket.socket.close, reset, after_hello])
@pytest.mark.parametrize("over_tls", [True, False])
def test_a_port_that_is_forwarded_before_there_is_a_server_is_waited_for(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ours: Authority,
    pair: Pair,
    hang_up: Callable[[socket.socket], None],
    over_tls: bool,
) -> None:
    monkeypatch.setattr(retry_deadline, "_LOOK_EVERY_S", 0.0)
    server_tls = ServerTls(certificate=pair.certificate, key=pair.key) if over_tls else None
    tls = ClientTls(ca=ours.certificate) if over_tls else None
    proxy = PortProxy(hang_up)
    with serving(tmp_path, PLAIN, security=ServerSecurity(tls=server_tls)) as server:
        looks: list[str | None] = []

        def looking(*arguments: Any) -> str | None:
            looks.append(lasting_reason(*arguments))
            if len(looks) == 3:
                proxy.target = server.address
            return looks[-1]

        monkeypatch.setattr(connection, "lasting_reason", looking)
        model = make_model()
        with ParameterServerOptimizer(
            model.named_parameters(), proxy.address, worker="a", timeout_s=PATIENT_S, tls=tls
        ) as optimizer:
            backward(model, [batch(0, 0)])
            optimizer.step()
        assert server.coordinator.status().point.version == 1
    assert proxy.sent_away >= 3
    proxy.close()


def test_a_server_that_says_it_is_not_ready_is_not_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry_deadline, "_LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(connection, "lasting_reason", lambda *_: "it wants a certificate")
    with serving(tmp_path, PLAIN) as server:
        join, failures = type(server.coordinator).join, iter([True] * 4)

        def starting(*arguments: Any, **options: Any) -> Any:
            if next(failures, False):
                raise NotReadyError("starting")
            return join(*arguments, **options)

        monkeypatch.setattr(type(server.coordinator), "join", starting)
        connect(make_model(), server).close()


def test_without_a_ca_only_grpc_says_whether_a_certificate_holds(
    tmp_path: Path, pair: Pair
) -> None:
    security = ServerSecurity(tls=ServerTls(certificate=pair.certificate, key=pair.key))
    with serving(tmp_path, PLAIN, security=security) as server:
        assert lasting_reason(server.address, ClientTls()) is None
        why = diagnose_connection(server.address, ClientTls())
    assert why is not None
    assert "does not hold against this machine's CAs" in why
