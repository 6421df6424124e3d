"""Errors that no further try cures: a worker that starts says so within seconds, not at the end."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
from ps.certificates import Authority, Pair
from ps.client.test_optimizer import PLAIN, connect
from ps.servers import serving
from ps.workers import backward, batch, make_model

from topq_dist.ps import ParameterServerOptimizer, ServerLostError
from topq_dist.ps.client import connection, retry_deadline
from topq_dist.ps.client.call_errors import TransientError
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
