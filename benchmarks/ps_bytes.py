"""The bytes that a whole training puts on a worker's link, as its interface counts them.

    sudo python benchmarks/ps_bytes.py

Trains digits (or another data set) on hosts of their own: two ranks of dense DDP, then a server and
two workers, q = 0.99 both ways, and reads each worker's interface before and after: headers,
acknowledgements, joining, the first fetch and all. Prints a table beside the workers' own counters,
and writes runs/ps_bytes.json. Needs root and iproute2.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness.console import option_parser, say, text_table, write_report
from harness.netns import INTERFACE, Hosts, HostsError, hosts, missing_requirement
from harness.ps_server import ADDRESS, WORKERS, server_on_first_host
from harness.worker_pool import killed_at_the_end

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 500.0
MASTER_PORT = "7100"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to train: accuracy, and the bytes of the busiest worker.

    out_bytes and in_bytes are the interface's, counted_out_bytes and counted_in_bytes the worker's.
    """

    data: str
    way: str
    test_accuracy: float
    out_bytes: int
    in_bytes: int
    counted_out_bytes: int
    counted_in_bytes: int


def dense(data: str) -> Row:
    """Train by plain DDP between two hosts."""
    say(f"{data}: dense DDP")
    with hosts(WORKERS) as made:
        environment = {
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "MASTER_ADDR": "10.77.0.1",
            "MASTER_PORT": MASTER_PORT,
            "WORLD_SIZE": str(WORKERS),
        }
        commands = [
            ({**environment, "RANK": str(rank)}, ["train.py", "--data", data, "--dense"])
            for rank in range(WORKERS)
        ]
        return _row(data, "dense DDP", _trained(made, commands))


def through_server(data: str) -> Row:
    """Train by a server and workers, each on a host of its own."""
    say(f"{data}: parameter server")
    with (
        hosts(1 + WORKERS) as made,
        server_on_first_host(made, ["--lr", "0.1", "--downlink", "topq", "--downlink-q", "0.99"]),
    ):
        workers = Hosts(namespaces=made.namespaces[1:])
        commands = [
            (
                {"RANK": str(rank), "WORLD_SIZE": str(WORKERS)},
                ["ps_worker.py", "--data", data, "--q", "0.99", "--server", ADDRESS],
            )
            for rank in range(WORKERS)
        ]
        return _row(data, "server, q = 0.99 both ways", _trained(workers, commands))


def _trained(
    made: Hosts, commands: Sequence[tuple[dict[str, str], list[str]]]
) -> tuple[dict[str, Any], int, int]:
    """Run a command a host; return the first one's result and the most bytes out and in."""
    before = [_interface_bytes(made, host) for host in range(len(made))]
    with tempfile.TemporaryDirectory(prefix="topq-bench-") as folder:
        result = Path(folder) / "result.json"
        with killed_at_the_end() as processes:
            for host, (environment, (script, *arguments)) in enumerate(commands):
                argv = [sys.executable, str(ROOT / "launch" / script), *arguments]
                argv += ["--result", str(result if host == 0 else Path(folder) / f"{host}.json")]
                environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
                processes.append(
                    subprocess.Popen(
                        made.command(host, argv),
                        env=environment,
                        stdout=subprocess.DEVNULL,
                        text=True,
                    )
                )
            statuses = [process.wait(LIMIT_S) for process in processes]
        if any(statuses):
            raise HostsError(f"the training ended with {statuses}")
        found = json.loads(result.read_text())
    after = [_interface_bytes(made, host) for host in range(len(made))]
    moved = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(before, after, strict=True)]
    return found, max(out for out, _ in moved), max(into for _, into in moved)


def _interface_bytes(made: Hosts, host: int) -> tuple[int, int]:
    files = [f"/sys/class/net/{INTERFACE}/statistics/{way}_bytes" for way in ("tx", "rx")]
    argv = made.command(host, ["cat", *files])
    out, into = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.split()
    return int(out), int(into)


def _row(data: str, way: str, trained: tuple[dict[str, Any], int, int]) -> Row:
    found, out_bytes, in_bytes = trained
    received = found["received_bytes"]
    return Row(
        data=data,
        way=way,
        test_accuracy=found["test_accuracy"],
        out_bytes=out_bytes,
        in_bytes=in_bytes,
        counted_out_bytes=int(found["sent_bytes"][-1]),
        counted_in_bytes=int(received[-1]) if received else 0,
    )


def table(rows: Sequence[Row]) -> str:
    """Return what is printed, with how many times fewer bytes than dense."""
    tables = []
    for data in dict.fromkeys(row.data for row in rows):
        shown = [row for row in rows if row.data == data]
        cells = {
            row.way: [
                f"{100 * row.test_accuracy:.2f} %",
                *(
                    f"{mine / 1e6:.2f} MB ({whole / mine:.0f} x)"
                    for mine, whole in (
                        (row.out_bytes, shown[0].out_bytes),
                        (row.in_bytes, shown[0].in_bytes),
                    )
                ),
                f"{row.counted_out_bytes / 1e6:.2f}, {row.counted_in_bytes / 1e6:.2f} MB",
            ]
            for row in shown
        }
        heads = ["accuracy", "interface, out", "interface, in", "own count"]
        tables.append(text_table(data, heads, cells))
    return "\n\n".join(tables)


def main(argv: list[str] | None = None) -> int:
    parser = option_parser(__doc__)
    parser.add_argument("--data", nargs="+", default=["digits", "fashion-mnist"])
    options = parser.parse_args(argv)
    reason = missing_requirement()
    if reason is not None:
        say(f"ps_bytes: {reason}")
        return 2
    try:
        rows = [way(data) for data in options.data for way in (dense, through_server)]
    except HostsError as error:
        say(f"ps_bytes: {error}")
        return 1
    report = {"benchmark": "ps_bytes", "rows": [asdict(row) for row in rows]}
    write_report(options.out, "ps_bytes", report)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
