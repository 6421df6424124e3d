"""Addresses: how they are written, and which of them stay on the machine."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from served import START_S, environment

from topq_dist.ps.security.address import Address

UNSHARE = shutil.which("unshare")


class TestAddress:
    @pytest.mark.parametrize(
        ("text", "host", "port"),
        [
            ("127.0.0.1:50051", "127.0.0.1", 50051),
            ("[::1]:0", "::1", 0),
            ("localhost:65535", "localhost", 65535),
            ("ps-0.ps.svc:1", "ps-0.ps.svc", 1),
            ("[fe80::1%eth0]:1", "fe80::1%eth0", 1),
            ("[fe80::1%25]:1", "fe80::1%25", 1),
        ],
    )
    def test_reads_host_and_port(self, text: str, host: str, port: int) -> None:
        address = Address.parse(text)
        assert (address.host, address.port, str(address)) == (host, port, text)

    def test_reads_a_zone_as_urls_have_it(self) -> None:
        address = Address.parse("[fe80::1%25eth0]:1")
        assert (address.host, str(address)) == ("fe80::1%eth0", "[fe80::1%eth0]:1")
        assert address.name == "fe80::1"

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
            ("[::1%lo]:0", True),
            ("[fe80::1%lo]:0", False),
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


class TestAddressesOfAName:
    """Addresses that a name leads to: this machine may have one and not another."""

    HERE, ELSEWHERE = "127.0.0.1", "192.0.2.1"  # the other is of nobody, RFC 5737

    def lead_to(self, patch: pytest.MonkeyPatch, *hosts: str) -> None:
        def found(_: str, port: int, **__: Any) -> list[Any]:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port)) for host in hosts]

        patch.setattr(socket, "getaddrinfo", found)

    def test_one_that_is_here_will_do(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lead_to(monkeypatch, self.ELSEWHERE, self.HERE)
        Address.parse("localhost:0").check_free()

    def test_none_that_is_here_will_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lead_to(monkeypatch, self.ELSEWHERE)
        with pytest.raises(OSError, match=r"address localhost:0: .*assign"):
            Address.parse("localhost:0").check_free()

    def test_nor_one_that_is_taken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with socket.create_server((self.HERE, 0)) as taken:
            self.lead_to(monkeypatch, self.ELSEWHERE, self.HERE)
            with pytest.raises(OSError, match="in use"):
                Address.parse(f"localhost:{taken.getsockname()[1]}").check_free()

    @pytest.mark.skipif(
        UNSHARE is None or not hasattr(os, "geteuid") or os.geteuid() != 0,
        reason="network namespaces are root's",
    )
    def test_a_server_listens_where_ipv6_is_off(self, tmp_path: Path) -> None:
        hosts = tmp_path / "hosts"
        hosts.write_text("127.0.0.1 localhost\n::1 localhost ip6-localhost\n")
        words = f"-m topq_dist.cli serve --address localhost:0 --state-dir {tmp_path / 'state'}"
        script = f"""
            ip link set lo up && mount --bind {hosts} /etc/hosts || exit 77
            echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6 || true
            {sys.executable} {words} --inner-opt sgd --lr 0.1 --workers 1 &
            server=$!
            for _ in $(seq 600); do
                [ -s {tmp_path / "said"} ] && break
                kill -0 $server || break
                sleep 0.1
            done
            kill $server && wait $server
        """
        with (tmp_path / "said").open("w") as said:
            done = subprocess.run(
                [str(UNSHARE), "-n", "-m", "bash", "-c", script],
                env=environment({}),
                stdout=said,
                stderr=subprocess.PIPE,
                text=True,
                timeout=2 * START_S,
                check=False,
            )
        if done.returncode == 77 or "Operation not permitted" in done.stderr:
            pytest.skip("no network namespaces here")
        assert (tmp_path / "said").read_text().startswith("listening on localhost:"), done.stderr
