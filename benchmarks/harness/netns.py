"""Hosts on one machine: network namespaces joined by a bridge, every link shaped by tbf.

Needs root, Linux and iproute2. The bridge lives in a namespace of its own, so that nothing is
added to the machine's own network and removing the namespaces removes everything.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from harness.console import say

INTERFACE = "eth0"
# tbf's words for the links that are measured, and what a reader knows them as
LINK_RATES = {"loopback": None, "1gbit": "1gbit", "100mbit": "100mbit"}
LINK_TITLES = {"loopback": "loopback speed", "1gbit": "1 Gbit", "100mbit": "100 Mbit"}
DEFAULT_BURST = "256kb"
QUEUE_LATENCY = "200ms"
_PREFIX = "topq-bench"
_NETNS_DIR = Path("/run/netns")


class HostsError(RuntimeError):
    """Namespaces cannot be made here, or a command that makes them failed."""


@dataclass(frozen=True, kw_only=True)
class Hosts:
    """Namespaces that see each other through `INTERFACE`, one a rank."""

    namespaces: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.namespaces)

    def command(self, rank: int, argv: Sequence[str]) -> list[str]:
        """Return the command that runs `argv` on host `rank`; the process keeps its own pid."""
        return [_tool("ip"), "netns", "exec", self.namespaces[rank], *argv]


def missing_requirement() -> str | None:
    """Return why hosts cannot be made here, or None where nothing is known to be missing."""
    if sys.platform != "linux":
        return f"network namespaces need Linux, this is {sys.platform}"
    if os.geteuid() != 0:
        return "network namespaces need root, this is an ordinary user: run it with sudo"
    for name in ("ip", "tc"):
        if shutil.which(name) is None:
            return f"the command {name!r} is missing: install iproute2"
    return None


@contextmanager
def told_of_ends(benchmark: str) -> Iterator[None]:
    """Have the process end with a word, and without hosts, where it is asked to or has none.

    Exits with 2 where hosts cannot be made, 130 after Ctrl-C, 128 + its number after a signal.
    """
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, lambda number, _: sys.exit(128 + number))
    try:
        yield
    except HostsError as error:
        say(f"{benchmark}: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        say(f"{benchmark}: interrupted, hosts removed")
        sys.exit(130)


@contextmanager
def hosts(count: int, *, rate: str | None = None, burst: str = DEFAULT_BURST) -> Iterator[Hosts]:
    """Make `count` hosts on one switch and remove them at the end, whatever ends the block.

    `rate` and `burst` are tbf's own words ("1gbit", "256kb"), applied to both ends of each link;
    no rate leaves the links as fast as the kernel moves packets.

    Raises ValueError for fewer than two or more than 254 hosts, and HostsError where namespaces
    cannot be made or tbf refuses its arguments.
    """
    if not 2 <= count <= 254:
        raise ValueError(f"count={count}: expected 2 to 254 hosts")
    reason = missing_requirement()
    if reason is not None:
        raise HostsError(reason)
    _remove_leftovers()
    run = f"{_PREFIX}-{os.getpid()}-{os.urandom(3).hex()}"
    switch = f"{run}-switch"
    made = Hosts(namespaces=tuple(f"{run}-h{rank}" for rank in range(count)))
    try:
        _make_switch(switch)
        for rank, namespace in enumerate(made.namespaces):
            _connect(namespace, switch, rank)
            if rate is not None:
                _shape(namespace, INTERFACE, rate, burst)
                _shape(switch, _port(rank), rate, burst)
        yield made
    finally:
        with uninterrupted():
            for namespace in (*made.namespaces, switch):
                _remove(namespace)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back SIGINT and SIGTERM during a clean-up, from children started in it as well."""
    held = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _make_switch(switch: str) -> None:
    _run("ip", "netns", "add", switch)
    _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
    _run("ip", "-n", switch, "link", "set", "bridge", "up")


def _connect(namespace: str, switch: str, rank: int) -> None:
    port = _port(rank)
    _run("ip", "netns", "add", namespace)
    _run("ip", "-n", namespace, "link", "set", "lo", "up")
    peer = ("peer", "name", INTERFACE, "netns", namespace)
    _run("ip", "-n", switch, "link", "add", port, "type", "veth", *peer)
    _run("ip", "-n", switch, "link", "set", port, "master", "bridge")
    # IPv6 would send its own packets, which the interface's counters would count as ours
    _run("ip", "-n", switch, "link", "set", port, "addrgenmode", "none", "up")
    _run("ip", "-n", namespace, "addr", "add", f"10.77.0.{rank + 1}/24", "dev", INTERFACE)
    _run("ip", "-n", namespace, "link", "set", INTERFACE, "addrgenmode", "none", "up")


def _shape(namespace: str, device: str, rate: str, burst: str) -> None:
    tbf = ("tbf", "rate", rate, "burst", burst, "latency", QUEUE_LATENCY)
    _run("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", *tbf)


def _port(rank: int) -> str:
    return f"port{rank}"


def _remove(namespace: str) -> None:
    if (_NETNS_DIR / namespace).exists():
        _run("ip", "netns", "del", namespace)


def _remove_leftovers() -> None:
    """Remove namespaces of runs that were killed outright: their process is no more."""
    if not _NETNS_DIR.is_dir():
        return
    for path in _NETNS_DIR.iterdir():
        match = re.fullmatch(rf"{_PREFIX}-(\d+)-.*", path.name)
        if match and not Path(f"/proc/{match[1]}").exists():
            _remove(path.name)


def _tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise HostsError(f"the command {name!r} is missing: install iproute2")
    return path


def _run(name: str, *arguments: str) -> None:
    done = subprocess.run([_tool(name), *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        words = " ".join((name, *arguments))
        raise HostsError(f"{words!r} failed: {done.stderr.strip() or done.returncode}")
