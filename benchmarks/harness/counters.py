"""Counters of the kernel: bytes over an interface or by sockets, memory, CPU time, busy cores."""

from __future__ import annotations

import os
import socket
import struct
import time
from pathlib import Path

from harness.console import say

BUSY_CORES_LIMIT = 0.2

# tcpi_bytes_acked of struct tcp_info in linux/tcp.h, there since Linux 4.1
_BYTES_ACKED_OFFSET = 120
_TCP_INFO_BYTES = 256


def interface_sent_bytes(interface: str) -> int:
    """Return the bytes that ever left `interface`, as this network namespace counts them."""
    return int(Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text())


def interface_received_bytes(interface: str) -> int:
    """Return the bytes that ever came in by `interface`, as this network namespace counts them."""
    return int(Path(f"/sys/class/net/{interface}/statistics/rx_bytes").read_text())


def tcp_sent_bytes() -> int:
    """Return the payload bytes that peers have acknowledged on this process's open TCP sockets."""
    return sum(_acked_bytes(int(entry.name)) for entry in Path("/proc/self/fd").iterdir())


def _acked_bytes(descriptor: int) -> int:
    try:
        copy = os.dup(descriptor)
    except OSError:
        return 0  # closed since it was listed
    try:
        one = socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        return 0  # no socket
    try:
        with one:
            if one.type != socket.SOCK_STREAM or one.family not in (
                socket.AF_INET,
                socket.AF_INET6,
            ):
                return 0
            info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    except OSError:
        return 0
    return int(struct.unpack_from("=Q", info, _BYTES_ACKED_OFFSET)[0])


def resident_bytes(pid: int) -> int:
    """Return the memory that a process has resident."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds, user's and system's, that a process has used."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, after_name[11:13])) / os.sysconf("SC_CLK_TCK")


def busy_cores(sample_s: float = 0.5) -> float:
    """Return how many cores were busy on average over the next `sample_s` seconds."""
    before, start = _idle_s(), time.monotonic()
    time.sleep(sample_s)
    idle_cores = (_idle_s() - before) / (time.monotonic() - start)
    return max(0.0, (os.cpu_count() or 1) - idle_cores)


def busy_cores_before() -> float:
    """Return how many cores other work keeps busy, and say so where it will be heard."""
    busy = busy_cores()
    if busy > BUSY_CORES_LIMIT:
        say(f"other work keeps {busy:.1f} of {os.cpu_count()} cores busy: expect noise")
    return busy


def _idle_s() -> float:
    idle, waiting = Path("/proc/stat").read_text().split("\n", 1)[0].split()[4:6]
    return (int(idle) + int(waiting)) / os.sysconf("SC_CLK_TCK")
