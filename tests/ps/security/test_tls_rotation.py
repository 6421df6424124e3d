"""Certificates, keys and CAs that change while the server runs."""

from __future__ import annotations

import ssl
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from ps.certificates import Authority
from ps.health_server import ask, client_tls, server_tls, serving

from topq_dist.ps.client.call_errors import DoubtfulError, TransientError
from topq_dist.ps.client.connection import Connection
from topq_dist.ps.security import secret_files
from topq_dist.ps.security.address import Address
from topq_dist.ps.security.policy import ClientSecurity, ServerSecurity
from topq_dist.v1 import parameter_server_pb2 as pb


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ours"))


class TestRotation:
    def shown(self, where: Address, ca: Path) -> bytes:
        context = ssl.create_default_context(cafile=ca)
        context.set_alpn_protocols(["h2"])
        with (
            where.connect(5) as end,
            context.wrap_socket(end, server_hostname="localhost") as encrypted,
        ):
            certificate = encrypted.getpeercert(binary_form=True)
        assert certificate is not None
        return certificate

    def test_new_files_are_shown_to_the_next_connection(self, ours: Authority) -> None:
        pair = ours.issue("rotating", server=True)
        with serving(ServerSecurity(tls=server_tls(pair))) as where:
            security = ClientSecurity(tls=client_tls(ours.certificate))
            with security.channel(str(where)) as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
                before = self.shown(where, ours.certificate)
                ours.issue("rotating", server=True)
                assert self.shown(where, ours.certificate) != before
                stub.Check(health_pb2.HealthCheckRequest(), timeout=10)  # goes on undisturbed
            assert ask(where, security) is grpc.StatusCode.OK

    def test_files_that_do_not_work_change_nothing(
        self, ours: Authority, caplog: pytest.LogCaptureFixture
    ) -> None:
        pair = ours.issue("half", server=True)
        key = pair.key.read_bytes()
        with serving(ServerSecurity(tls=server_tls(pair))) as where:
            before = self.shown(where, ours.certificate)
            ours.issue("half", server=True)
            pair.key.write_bytes(key)  # the new certificate with the old key
            assert self.shown(where, ours.certificate) == before
            assert "not the key" in caplog.text
            pair.certificate.unlink()
            assert self.shown(where, ours.certificate) == before
            ours.issue("half", server=True, days=-2)
            assert self.shown(where, ours.certificate) == before
            assert "expired" in caplog.text
            ours.issue("half", server=True)
            assert self.shown(where, ours.certificate) != before

    def test_the_clients_ca_rotates_too(self, ours: Authority, tmp_path: Path) -> None:
        first, second = Authority(tmp_path / "1", "first"), Authority(tmp_path / "2", "second")
        trusted = tmp_path / "trusted.pem"
        trusted.write_bytes(first.certificate.read_bytes())
        tls = server_tls(ours.issue("server", server=True), trusted)
        old, new = (
            ClientSecurity(tls=client_tls(ours.certificate, ca.issue("client", server=False)))
            for ca in (first, second)
        )
        with serving(ServerSecurity(tls=tls)) as where:
            assert ask(where, old) is grpc.StatusCode.OK
            assert ask(where, new) is grpc.StatusCode.UNAVAILABLE
            trusted.write_bytes(second.certificate.read_bytes())
            assert ask(where, new) is grpc.StatusCode.OK
            assert ask(where, old) is grpc.StatusCode.UNAVAILABLE

    def test_an_old_file_is_not_read_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(secret_files, "_YOUNG_S", 0.0)
        path = tmp_path / "file"
        path.write_text("1")
        reads = []

        def load() -> str:
            reads.append(path.read_text())
            return reads[-1]

        watched = secret_files.Watched((path,), load)
        assert [watched.current() for _ in range(3)] == ["1"] * 3
        assert reads == ["1"]
        path.write_text("22")
        assert [watched.current() for _ in range(3)] == ["22"] * 3
        assert reads == ["1", "22"]

    def test_a_client_gets_over_files_that_do_not_work_for_a_while(self, ours: Authority) -> None:
        pair = ours.issue("own", server=False)
        with serving(ServerSecurity(tls=server_tls(ours.issue("mutual", server=True)))) as where:
            connection = Connection(
                str(where), ClientSecurity(tls=client_tls(ours.certificate, pair))
            )
            worker = pb.WorkerId(run="run", worker="a", epoch=1)
            with pytest.raises(DoubtfulError, match="UNIMPLEMENTED"):  # it has health alone
                connection.renew(worker, 10)
            content = pair.certificate.read_bytes()
            pair.certificate.write_bytes(content[:100])
            connection.refresh()
            with pytest.raises(TransientError, match="certificate"):
                connection.renew(worker, 10)
            pair.certificate.write_bytes(content)
            with pytest.raises(DoubtfulError, match="UNIMPLEMENTED"):
                connection.renew(worker, 10)
            connection.close()
