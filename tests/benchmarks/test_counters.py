from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from harness.counters import busy_cores, interface_sent_bytes, tcp_sent_bytes

PAYLOAD_BYTES = 3_000_017


def test_counting_leaves_no_descriptor_behind(tmp_path: Path) -> None:
    with (tmp_path / "no socket").open("w"):
        before = len(list(Path("/proc/self/fd").iterdir()))
        tcp_sent_bytes()
        assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_tcp_and_interface_count_what_was_sent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        sender = socket.create_connection(server.getsockname())
        receiver, _ = server.accept()
    with sender, receiver:
        tcp_before, interface_before = tcp_sent_bytes(), interface_sent_bytes("lo")
        left = PAYLOAD_BYTES
        while left:
            left -= sender.send(bytes(min(left, 65_536)))
            received = receiver.recv(1_000_000)
            assert received
        receiver.setblocking(False)
        sent = _tcp_bytes_at_rest(tcp_before + PAYLOAD_BYTES) - tcp_before
        assert sent == PAYLOAD_BYTES
        assert interface_sent_bytes("lo") - interface_before >= PAYLOAD_BYTES


def _tcp_bytes_at_rest(expected: int) -> int:
    """The acknowledgement of the last bytes may come a moment after they were read."""
    deadline = time.monotonic() + 5.0
    while tcp_sent_bytes() < expected and time.monotonic() < deadline:
        time.sleep(0.01)
    return tcp_sent_bytes()


def test_busy_cores_stay_within_the_machine() -> None:
    assert 0.0 <= busy_cores(0.1) <= (os.cpu_count() or 1)
