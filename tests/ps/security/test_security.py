"""The addresses that a server may listen at, and what travels in the clear."""

from __future__ import annotations

import socket
from pathlib import Path

import grpc
import pytest
from ps.health_server import ask, serving

from topq_dist.ps.client.probe import diagnose_connection
from topq_dist.ps.security.address import Address
from topq_dist.ps.security.policy import ClientSecurity, ServerSecurity
from topq_dist.ps.security.tls import ClientTls, ServerTls

TOKEN = "b" * 32


class TestWhereAServerListens:
    @pytest.mark.parametrize("address", ["127.0.0.1:0", "[::1]:0", "localhost:0"])
    def test_in_the_clear_on_loopback(self, address: str) -> None:
        with serving(ServerSecurity(), address) as where:
            assert where.port > 0
            assert ask(where, ClientSecurity()) is grpc.StatusCode.OK
            assert diagnose_connection(where, None) is None

    def test_on_a_unix_socket(self, tmp_path: Path) -> None:
        with serving(ServerSecurity(), f"unix:{tmp_path}/socket") as where:
            assert ask(where, ClientSecurity()) is grpc.StatusCode.OK

    @pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "10.0.0.1:0", "example.org:0"])
    def test_not_beyond_it_unless_told(self, address: str) -> None:
        with pytest.raises(ValueError, match="loopback alone") as caught:
            ServerSecurity().check(address)
        assert repr(address) in str(caught.value)
        ServerSecurity(insecure=True).check(address)
        ServerSecurity(tls=ServerTls(certificate=Path("c"), key=Path("k"))).check(address)

    def test_tokens_do_not_travel_in_the_clear(self, tmp_path: Path) -> None:
        tokens = tmp_path / "tokens"
        with pytest.raises(ValueError, match="tokens="):
            ServerSecurity(tokens=tokens, insecure=True).check("0.0.0.0:1")
        ServerSecurity(tokens=tokens).check("127.0.0.1:1")
        with pytest.raises(ValueError, match="token in the clear"):
            ClientSecurity(token=TOKEN).check("10.0.0.1:1")
        ClientSecurity(token=TOKEN).check("localhost:1")
        ClientSecurity(token=TOKEN, tls=ClientTls()).check("10.0.0.1:1")

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

    def test_a_unix_socket_left_behind_is_taken_over(self, tmp_path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as left_behind:
            left_behind.bind(f"{tmp_path}/socket")
        with serving(ServerSecurity(), f"unix:{tmp_path}/socket") as where:
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
