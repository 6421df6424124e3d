"""Addresses: how they are written, and which of them stay on the machine."""

from __future__ import annotations

import pytest

from topq_dist.ps.security.address import Address


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
