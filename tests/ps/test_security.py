"""Who may connect, and who may speak in whose name."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from ps.certificates import Authority, Pair

from topq_dist.ps import secret_files
from topq_dist.ps.protocol import UnauthenticatedError, WrongTokenError
from topq_dist.ps.reach import why_unreachable
from topq_dist.ps.security import (
    Address,
    Authenticator,
    ClientSecurity,
    ClientTls,
    ServerSecurity,
    ServerTls,
)
from topq_dist.ps.tokens import read_token

TOKENS = {"alice": "a" * 32, "bob": "b" * 32}


@contextmanager
def serving(security: ServerSecurity, address: str = "127.0.0.1:0") -> Iterator[Address]:
    server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
    health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)
    where = security.bind(server, address)
    server.start()
    try:
        yield where
    finally:
        server.stop(None).wait()


def code_of(error: grpc.RpcError) -> grpc.StatusCode:
    assert isinstance(error, grpc.Call)
    return error.code()


def ask(where: Address, security: ClientSecurity, *, timeout_s: float = 10) -> grpc.StatusCode:
    with security.channel(str(where)) as channel:
        try:
            health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=timeout_s
            )
        except grpc.RpcError as error:
            return code_of(error)
    return grpc.StatusCode.OK


def server_tls(pair: Pair, client_ca: Path | None = None) -> ServerTls:
    return ServerTls(certificate=pair.certificate, key=pair.key, client_ca=client_ca)


def client_tls(ca: Path, pair: Pair | None = None) -> ClientTls:
    if pair is None:
        return ClientTls(ca=ca)
    return ClientTls(ca=ca, certificate=pair.certificate, key=pair.key)


def unchecked_call(where: Address, ca: Path, pair: Pair) -> grpc.StatusCode:
    """Ask as a client would that does not look at its own certificate first."""
    credentials = grpc.ssl_channel_credentials(
        ca.read_bytes(), pair.key.read_bytes(), pair.certificate.read_bytes()
    )
    with grpc.secure_channel(str(where), credentials) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        return code_of(caught.value)


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


def tokens_file(folder: Path, text: str | None = None, mode: int = 0o600) -> Path:
    path = folder / "tokens"
    path.write_text(
        "".join(f"{name} {token}\n" for name, token in TOKENS.items()) if text is None else text
    )
    path.chmod(mode)
    return path


def bearer(token: str) -> list[tuple[str, str | bytes]]:
    return [("user-agent", "test"), ("authorization", f"Bearer {token}")]


class TestAddress:
    @pytest.mark.parametrize(
        ("text", "host", "port"),
        [
            ("127.0.0.1:50051", "127.0.0.1", 50051),
            ("[::1]:0", "::1", 0),
            ("localhost:65535", "localhost", 65535),
            ("ps-0.ps.svc:1", "ps-0.ps.svc", 1),
        ],
    )
    def test_reads_host_and_port(self, text: str, host: str, port: int) -> None:
        address = Address.parse(text)
        assert (address.host, address.port, str(address)) == (host, port, text)

    @pytest.mark.parametrize("text", ["unix:/run/topq.sock", "unix:///run/topq.sock"])
    def test_reads_a_path(self, text: str) -> None:
        assert Address.parse(text) == Address(path="/run/topq.sock")

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "50051",
            ":50051",
            "::1:50051",
            "[::1]",
            "[localhost]:1",
            "localhost",
            "localhost:65536",
            "localhost:-1",
            "localhost:http",
            "localhost:1\n",
            "http://localhost:1",
            "a,b:1",
            "unix:",
            "unix:/" + "x" * 200,
        ],
    )
    def test_refuses_the_rest_naming_it(self, text: str) -> None:
        with pytest.raises(ValueError, match=r"^address=.*expected") as caught:
            Address.parse(text)
        assert repr(text) in str(caught.value)

    @pytest.mark.parametrize(
        ("text", "loopback"),
        [
            ("127.0.0.1:0", True),
            ("127.9.9.9:1", True),
            ("[::1]:0", True),
            ("LocalHost:1", True),
            ("unix:/x", True),
            ("0.0.0.0:1", False),
            ("[::]:1", False),
            ("10.0.0.1:1", False),
            ("localhost.evil.example:1", False),
            ("127.1:1", False),
            ("0:1", False),
        ],
    )
    def test_knows_loopback(self, text: str, loopback: bool) -> None:
        assert Address.parse(text).is_loopback is loopback

    def test_a_server_on_all_interfaces_is_reached_on_loopback(self) -> None:
        assert str(Address.parse("0.0.0.0:7").to_reach()) == "127.0.0.1:7"
        assert str(Address.parse("[::]:7").to_reach()) == "[::1]:7"
        assert str(Address.parse("10.0.0.1:7").to_reach()) == "10.0.0.1:7"
        with pytest.raises(ValueError, match="not 0"):
            Address.parse("127.0.0.1:0").to_reach()


class TestWhereAServerListens:
    @pytest.mark.parametrize("address", ["127.0.0.1:0", "[::1]:0", "localhost:0"])
    def test_in_the_clear_on_loopback(self, address: str) -> None:
        with serving(ServerSecurity(), address) as where:
            assert where.port > 0
            assert ask(where, ClientSecurity()) is grpc.StatusCode.OK
            assert why_unreachable(where, None) is None

    def test_on_a_unix_socket(self, tmp_path: Path) -> None:
        with serving(ServerSecurity(), f"unix:{tmp_path}/socket") as where:
            assert ask(where, ClientSecurity()) is grpc.StatusCode.OK

    @pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "10.0.0.1:0", "example.org:0"])
    def test_not_beyond_it_unless_told(self, address: str, server_pair: Pair) -> None:
        with pytest.raises(ValueError, match="loopback alone") as caught:
            ServerSecurity().check(address)
        assert repr(address) in str(caught.value)
        ServerSecurity(insecure=True).check(address)
        ServerSecurity(tls=server_tls(server_pair)).check(address)

    def test_tokens_do_not_travel_in_the_clear(self, tmp_path: Path) -> None:
        tokens = tmp_path / "tokens"
        with pytest.raises(ValueError, match="tokens="):
            ServerSecurity(tokens=tokens, insecure=True).check("0.0.0.0:1")
        ServerSecurity(tokens=tokens).check("127.0.0.1:1")
        with pytest.raises(ValueError, match="token in the clear"):
            ClientSecurity(token=TOKENS["bob"]).check("10.0.0.1:1")
        ClientSecurity(token=TOKENS["bob"]).check("localhost:1")
        ClientSecurity(token=TOKENS["bob"], tls=ClientTls()).check("10.0.0.1:1")

    def test_a_taken_port_is_refused_with_the_reason(self) -> None:
        with (
            serving(ServerSecurity()) as where,
            pytest.raises(OSError, match=f"{where}: Address already in use"),
            serving(ServerSecurity(), str(where)),
        ):
            pass

    def test_a_taken_unix_socket_is_not_stolen(self, tmp_path: Path) -> None:
        address = f"unix:{tmp_path}/socket"
        with serving(ServerSecurity(), address) as where:
            with pytest.raises(OSError, match="already"), serving(ServerSecurity(), address):
                pass
            assert ask(where, ClientSecurity()) is grpc.StatusCode.OK

    def test_a_foreign_address_is_refused_with_the_reason(self) -> None:
        with pytest.raises(OSError, match=r"203\.0\.113\.1:0: Cannot assign"):
            Address.parse("203.0.113.1:0").check_free()

    def test_a_proxy_of_the_environment_stays_out_of_loopback(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("no_proxy", "no_grpc_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        for name in ("http_proxy", "grpc_proxy", "https_proxy"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")
        with serving(ServerSecurity()) as where:
            assert ask(where, ClientSecurity()) is grpc.StatusCode.OK


class TestTls:
    def test_the_server_shows_its_certificate(self, ours: Authority, server_pair: Pair) -> None:
        with serving(ServerSecurity(tls=server_tls(server_pair))) as where:
            tls = client_tls(ours.certificate)
            assert ask(where, ClientSecurity(tls=tls)) is grpc.StatusCode.OK
            assert why_unreachable(where, tls) is None

    def test_a_certificate_of_another_ca_is_refused(
        self, ours: Authority, foreign: Authority
    ) -> None:
        pair = foreign.issue("server", server=True)
        with serving(ServerSecurity(tls=server_tls(pair))) as where:
            tls = client_tls(ours.certificate)
            assert ask(where, ClientSecurity(tls=tls)) is grpc.StatusCode.UNAVAILABLE
            why = why_unreachable(where, tls)
        assert why is not None
        assert "unable to get local issuer certificate" in why
        assert str(ours.certificate) in why

    def test_another_name_is_refused_unless_expected(
        self, ours: Authority, server_pair: Pair
    ) -> None:
        with serving(ServerSecurity(tls=server_tls(server_pair)), "127.0.0.2:0") as where:
            tls = client_tls(ours.certificate)
            assert ask(where, ClientSecurity(tls=tls)) is grpc.StatusCode.UNAVAILABLE
            why = why_unreachable(where, tls)
            assert why is not None
            assert "127.0.0.2" in why
            named = replace(tls, server_name="localhost")
            assert ask(where, ClientSecurity(tls=named)) is grpc.StatusCode.OK
            assert why_unreachable(where, named) is None

    def test_one_side_without_tls_is_told_so(self, ours: Authority, server_pair: Pair) -> None:
        tls = client_tls(ours.certificate)
        with serving(ServerSecurity()) as where:
            assert ask(where, ClientSecurity(tls=tls)) is grpc.StatusCode.UNAVAILABLE
            assert why_unreachable(where, tls) == "the server does not speak TLS"
        with serving(ServerSecurity(tls=server_tls(server_pair))) as where:
            assert ask(where, ClientSecurity()) is grpc.StatusCode.UNAVAILABLE
            assert "speaks TLS" in str(why_unreachable(where, None))
        assert "refused" in str(why_unreachable(where, None))


class TestMutualTls:
    def test_takes_clients_of_its_ca_alone(
        self, ours: Authority, foreign: Authority, server_pair: Pair, client_pair: Pair
    ) -> None:
        security = ServerSecurity(tls=server_tls(server_pair, ours.certificate))
        stranger = foreign.issue("client", server=False)
        with serving(security) as where:
            tls = client_tls(ours.certificate, client_pair)
            assert ask(where, ClientSecurity(tls=tls)) is grpc.StatusCode.OK
            assert why_unreachable(where, tls) is None

            tls = client_tls(ours.certificate)
            assert ask(where, ClientSecurity(tls=tls)) is grpc.StatusCode.UNAVAILABLE
            assert "without certificate" in str(why_unreachable(where, tls))

            tls = client_tls(ours.certificate, stranger)
            assert ask(where, ClientSecurity(tls=tls)) is grpc.StatusCode.UNAVAILABLE
            assert str(stranger.certificate) in str(why_unreachable(where, tls))

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
            assert str(server_pair.certificate) in str(why_unreachable(where, tls))
        with pytest.raises(ValueError, match=r"^certificate=.*purpose"):
            server_tls(client_pair).credentials()

    def test_a_server_certificate_can_be_trusted_by_itself(
        self, server_pair: Pair, foreign: Authority
    ) -> None:
        with serving(ServerSecurity(tls=server_tls(server_pair))) as where:
            tls = client_tls(server_pair.certificate)
            assert ask(where, ClientSecurity(tls=tls)) is grpc.StatusCode.OK
            assert why_unreachable(where, tls) is None
            tls = client_tls(foreign.issue("server", server=True).certificate)
            assert ask(where, ClientSecurity(tls=tls)) is grpc.StatusCode.UNAVAILABLE


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

    def test_new_files_are_shown_to_the_next_connection(
        self, ours: Authority, foreign: Authority
    ) -> None:
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
            newer = ours.issue("half", server=True).key.read_bytes()
            pair.key.write_bytes(key)  # the new certificate with the old key
            assert self.shown(where, ours.certificate) == before
            assert "not the key" in caplog.text
            pair.certificate.unlink()
            assert self.shown(where, ours.certificate) == before
            ours.issue("half", server=True, days=-2)
            assert self.shown(where, ours.certificate) == before
            assert "expired" in caplog.text
            assert newer
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
        from cryptography.hazmat.primitives import serialization

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


class TestTokens:
    def test_bound_to_the_worker(self, tmp_path: Path) -> None:
        authenticator = Authenticator(tokens_file(tmp_path))
        authenticator.check(bearer(TOKENS["alice"]), "alice")
        authenticator.check(bearer(TOKENS["bob"]), "bob")
        authenticator.check(bearer(TOKENS["bob"]), None)
        with pytest.raises(WrongTokenError, match="worker='alice'"):
            authenticator.check(bearer(TOKENS["bob"]), "alice")

    @pytest.mark.parametrize(
        "metadata",
        [
            [],
            [("authorization", "")],
            [("authorization", "Bearer")],
            [("authorization", "Bearer ")],
            [("authorization", TOKENS["alice"])],
            [("authorization", f"Basic {TOKENS['alice']}")],
            [("authorization", f"Bearer {TOKENS['alice']}".encode())],
            [("authorization", f"Bearer {TOKENS['alice']}")] * 2,
        ],
    )
    def test_no_token(self, tmp_path: Path, metadata: list[tuple[str, str | bytes]]) -> None:
        with pytest.raises(UnauthenticatedError, match="no token"):
            Authenticator(tokens_file(tmp_path)).check(metadata, "alice")

    @pytest.mark.parametrize(
        "token",
        ["c" * 32, TOKENS["alice"][:-1], TOKENS["alice"] + " ", "alice", "ä" * 20, "x" * 9999],
    )
    def test_unknown_token(self, tmp_path: Path, token: str) -> None:
        with pytest.raises(UnauthenticatedError, match="unknown token") as caught:
            Authenticator(tokens_file(tmp_path)).check(bearer(token), "alice")
        assert repr(token) not in str(caught.value)

    def test_a_client_brings_its_token(self, tmp_path: Path) -> None:
        authenticator = Authenticator(tokens_file(tmp_path))
        authenticator.check(ClientSecurity(token=TOKENS["alice"]).metadata(), "alice")
        assert ClientSecurity().metadata() == ()
        assert TOKENS["alice"] not in repr(ClientSecurity(token=TOKENS["alice"]))

    def test_read_again_when_it_changes(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = tokens_file(tmp_path)
        authenticator = Authenticator(path)
        tokens_file(tmp_path, f"# a new one for alice\nalice {'n' * 32}\n\nalice {'m' * 32}\n")
        authenticator.check(bearer("n" * 32), "alice")
        authenticator.check(bearer("m" * 32), "alice")
        for gone in TOKENS.values():
            with pytest.raises(UnauthenticatedError):
                authenticator.check(bearer(gone), "alice")
        path.write_text("alice")
        authenticator.check(bearer("n" * 32), "alice")
        authenticator.check(bearer("n" * 32), "alice")
        assert caplog.text.count("going on with what was there before") == 1
        path.unlink()
        authenticator.check(bearer("n" * 32), "alice")
        assert "No such file" in caplog.text
        tokens_file(tmp_path)
        authenticator.check(bearer(TOKENS["bob"]), "bob")

    def test_from_many_threads_while_it_changes(self, tmp_path: Path) -> None:
        path = tokens_file(tmp_path)
        authenticator = Authenticator(path)
        failures: list[Exception] = []
        stop = threading.Event()

        def check() -> None:
            while not stop.is_set():
                try:
                    authenticator.check(bearer(TOKENS["alice"]), "alice")
                except Exception as error:  # noqa: BLE001 - whatever it is
                    failures.append(error)

        threads = [threading.Thread(target=check) for _ in range(4)]
        for thread in threads:
            thread.start()
        for turn in range(20):
            newer = tmp_path / "newer"
            newer.touch(0o600)
            newer.write_text(f"alice {TOKENS['alice']}\ncarol {'c' * 30}{turn:02}\n")
            newer.replace(path)
        stop.set()
        for thread in threads:
            thread.join()
        assert not failures

    @pytest.mark.parametrize("mode", [0o604, 0o644, 0o660, 0o602])
    def test_a_file_that_others_may_touch_is_refused(self, tmp_path: Path, mode: int) -> None:
        with pytest.raises(ValueError, match=rf"tokens=.*mode {mode:04o}"):
            Authenticator(tokens_file(tmp_path, mode=mode))

    @pytest.mark.parametrize("mode", [0o400, 0o600, 0o440, 0o640])
    def test_a_file_for_owner_and_group_is_taken(self, tmp_path: Path, mode: int) -> None:
        Authenticator(tokens_file(tmp_path, mode=mode))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "a line 'worker token' at least"),
            ("# nobody\n", "a line 'worker token' at least"),
            ("alice\n", "line 1: expected a worker's name"),
            ("\nalice short\n", "line 2: expected a worker's name and its token of 16"),
            (f"al/ice {'a' * 32}\n", "line 1: worker='al/ice'"),
            (f"alice {'a' * 32} more\n", "line 1"),
            (f"alice {'a' * 32}\nbob {'a' * 32}\n", "line 2: expected a token of its own"),
        ],
    )
    def test_a_file_of_something_else_is_refused(
        self, tmp_path: Path, text: str, message: str
    ) -> None:
        with pytest.raises(ValueError, match=r"^tokens=") as caught:
            Authenticator(tokens_file(tmp_path, text))
        assert message in str(caught.value)
        assert "a" * 16 not in str(caught.value)

    def test_a_file_of_bytes_is_refused(self, tmp_path: Path) -> None:
        path = tokens_file(tmp_path)
        path.write_bytes(b"\xff\xfe")
        with pytest.raises(ValueError, match=r"tokens=.*UTF-8"):
            Authenticator(path)

    def test_a_workers_own_file(self, tmp_path: Path) -> None:
        assert read_token(tokens_file(tmp_path, "t" * 32 + "\n")) == "t" * 32
        with pytest.raises(ValueError, match=r"token_file=.*nothing else"):
            read_token(tokens_file(tmp_path, f"alice {'a' * 32}"))
        with pytest.raises(ValueError, match="mode 0644"):
            read_token(tokens_file(tmp_path, "t" * 32, mode=0o644))
        for token in ("short", "with a space in between", "line\nbreak" * 3):
            with pytest.raises(ValueError, match=r"^token: expected") as caught:
                ClientSecurity(token=token)
            assert token not in str(caught.value)
