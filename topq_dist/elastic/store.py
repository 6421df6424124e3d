"""Keeps the store of elastic runs: `python -m topq_dist.elastic.store HOST:PORT`, until stopped.

For a machine that no rank's loss takes along. It holds names, numbers and no gradients; whoever can
reach it can speak in a run's name, so keep it, as the ranks' own ports, on a trusted network.
"""

from __future__ import annotations

import contextlib
import sys
import threading

import torch.distributed as dist


def serve(address: str) -> dist.TCPStore:
    """Return a TCPStore on the port of "host:port", a free one where that is 0.

    It listens on every address. Raises ValueError for what is no host:port.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"address={address!r}: expected host:port")
    return dist.TCPStore(host, int(port), None, True, wait_for_workers=False)


def main(arguments: list[str]) -> int:
    """Serve until interrupted."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m topq_dist.elastic.store HOST:PORT\n")
        return 2
    try:
        store = serve(arguments[0])
    except (ValueError, RuntimeError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"store of elastic runs on port {store.port}\n")
    sys.stdout.flush()
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
