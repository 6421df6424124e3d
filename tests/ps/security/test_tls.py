"""TLS handshakes: who is refused, by which end, and in which words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives import serialization
from ps.certificates import Authority, Pair
from ps.health_server import ask, client_tls, server_tls, serving, unchecked_call

from topq_dist.ps.client.probe import diagnose_connection
from topq_dist.ps.security.policy import ClientSecurity, ServerSecurity
from topq_dist.ps.security.tls import ClientTls


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("foreign"), "foreign-ca")


@pytest.fixture(scope="module")
def server_pair(ours: Authority) -> Pair:
    return ours.issue("server", server=True)


@pytest.fixture(scope="module")
def client_pair(ours: Authority) -> Pair:
    return ours.issue("client", server=False)


class TestTls:
    def test_the_server_shows_its_certificate(self, ours: Authority, server_pair: Pair) -> None:
        with serving(ServerSecurity(tls=server_tls(server_pair))) as where:
            tls = client_tls(ours.certificate)
            assert ask(where, ClientSecurity(tls=tls)) is grpc.StatusCode.OK
            assert diagnose_connection(where, tls) is None

    def test_a_certificate_of_another_ca_is_refused(
        self, ours: Authority, foreign: Authority
    ) -> None:
        pair = foreign.issue("server", server=True)
        with serving(ServerSecurity(tls=server_tls(pair))) as where:
            tls = client_tls(ours.certificate)
            assert ask(where, ClientSecurity(tls=tls)) is grpc.StatusCode.UNAVAILABLE
            why = diagnose_connection(where, tls)
        assert why is not None
        assert "unable to get local issuer certificate" in why
        assert str(ours.certificate) in why

    def test_another_name_is_refused_unless_expected(
        self, ours: Authority, server_pair: Pair
    ) -> None:
        with serving(ServerSecurity(tls=server_tls(server_pair)), "127.0.0.2:0") as where:
            tls = client_tls(ours.certificate)
            assert ask(where, ClientSecurity(tls=tls)) is grpc.StatusCode.UNAVAILABLE
            why = diagnose_connection(where, tls)
            assert why is not None
            assert "127.0.0.2" in why
            named = replace(tls, server_name="localhost")
            assert ask(where, ClientSecurity(tls=named)) is grpc.StatusCode.OK
            assert diagnose_connection(where, named) is None

    def test_one_side_without_tls_is_told_so(self, ours: Authority, server_pair: Pair) -> None:
        tls = client_tls(ours.certificate)
        with serving(ServerSecurity()) as where:
            assert ask(where, ClientSecurity(tls=tls)) is grpc.StatusCode.UNAVAILABLE
            assert diagnose_connection(where, tls) == "the server does not speak TLS"
        with serving(ServerSecurity(tls=server_tls(server_pair))) as where:
            assert ask(where, ClientSecurity()) is grpc.StatusCode.UNAVAILABLE
            assert "speaks TLS" in str(diagnose_connection(where, None))
        assert "refused" in str(diagnose_connection(where, None))


class TestMutualTls:
    def test_takes_clients_of_its_ca_alone(
        self, ours: Authority, foreign: Authority, server_pair: Pair, client_pair: Pair
    ) -> None:
        security = ServerSecurity(tls=server_tls(server_pair, ours.certificate))
        stranger = foreign.issue("client", server=False)
        with serving(security) as where:
            tls = client_tls(ours.certificate, client_pair)
            assert ask(where, ClientSecurity(tls=tls)) is grpc.StatusCode.OK
            assert diagnose_connection(where, tls) is None

            tls = client_tls(ours.certificate)
            assert ask(where, ClientSecurity(tls=tls)) is grpc.StatusCode.UNAVAILABLE
            assert "without certificate" in str(diagnose_connection(where, tls))

            tls = client_tls(ours.certificate, stranger)
            assert ask(where, ClientSecurity(tls=tls)) is grpc.StatusCode.UNAVAILABLE
            assert str(stranger.certificate) in str(diagnose_connection(where, tls))

    def test_an_expired_certificate_is_refused_at_both_ends(
        self, ours: Authority, server_pair: Pair
    ) -> None:
        expired = ours.issue("expired", server=False, days=-2)
        with serving(ServerSecurity(tls=server_tls(server_pair, ours.certificate))) as where:
            with pytest.raises(ValueError, match="certificate has expired") as caught:
                ask(where, ClientSecurity(tls=client_tls(ours.certificate, expired)))
            assert str(expired.certificate) in str(caught.value)
            code = unchecked_call(where, ours.certificate, expired)
            assert code is grpc.StatusCode.UNAVAILABLE

    def test_a_server_certificate_is_no_clients(
        self, ours: Authority, server_pair: Pair, client_pair: Pair
    ) -> None:
        with serving(ServerSecurity(tls=server_tls(server_pair, ours.certificate))) as where:
            tls = client_tls(ours.certificate, server_pair)
            assert ask(where, ClientSecurity(tls=tls)) is grpc.StatusCode.UNAVAILABLE
            assert str(server_pair.certificate) in str(diagnose_connection(where, tls))
        with pytest.raises(ValueError, match=r"^certificate=.*purpose"):
            server_tls(client_pair).credentials()

    def test_a_server_certificate_can_be_trusted_by_itself(
        self, server_pair: Pair, foreign: Authority
    ) -> None:
        with serving(ServerSecurity(tls=server_tls(server_pair))) as where:
            tls = client_tls(server_pair.certificate)
            assert ask(where, ClientSecurity(tls=tls)) is grpc.StatusCode.OK
            assert diagnose_connection(where, tls) is None
            tls = client_tls(foreign.issue("server", server=True).certificate)
            assert ask(where, ClientSecurity(tls=tls)) is grpc.StatusCode.UNAVAILABLE


class TestFilesOfTls:
    def test_what_does_not_fit_is_named(
        self, ours: Authority, server_pair: Pair, client_pair: Pair, tmp_path: Path
    ) -> None:
        good = server_tls(server_pair)
        junk = tmp_path / "junk"
        junk.write_text("no PEM at all")
        junk.chmod(0o600)
        cases = {
            "certificate=.*No such file": replace(good, certificate=tmp_path / "absent"),
            "key=.*No such file": replace(good, key=tmp_path / "absent"),
            "key=.*regular file|Is a directory": replace(good, key=tmp_path),
            "key=.*not the key of": replace(good, key=client_pair.key),
            "expected a certificate chain": replace(good, certificate=junk),
            "key=.*as PEM": replace(good, key=junk),
            "client_ca=.*as PEM": replace(good, client_ca=junk),
            "client_ca=.*No such file": replace(good, client_ca=tmp_path / "absent"),
        }
        for message, tls in cases.items():
            with pytest.raises(ValueError, match=message):
                tls.credentials()
        for content in (b"no PEM", b"", b"\xff\x00", b"-----BEGIN CERTIFICATE-----\nAAAA\n"):
            junk.write_bytes(content)
            with pytest.raises(ValueError, match=r"^ca=.*as PEM"):
                ClientTls(ca=junk).credentials()
            with pytest.raises(ValueError, match="expected a certificate chain"):
                replace(good, certificate=junk).credentials()
        with pytest.raises(ValueError, match="expected both or neither"):
            ClientTls(certificate=client_pair.certificate)

    def test_an_encrypted_key_is_refused_without_asking(
        self, server_pair: Pair, tmp_path: Path
    ) -> None:
        key = serialization.load_pem_private_key(server_pair.key.read_bytes(), None)
        locked = tmp_path / "locked.key"
        locked.touch(0o600)
        locked.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.BestAvailableEncryption(b"secret"),
            )
        )
        with pytest.raises(ValueError, match=r"key=.*not encrypted"):
            replace(server_tls(server_pair), key=locked).credentials()

    def test_a_key_that_others_may_read_is_refused(self, ours: Authority) -> None:
        pair = ours.issue("open", server=True)
        pair.key.chmod(0o644)
        with pytest.raises(ValueError, match=r"key=.*mode 0644.*0600"):
            server_tls(pair).credentials()
