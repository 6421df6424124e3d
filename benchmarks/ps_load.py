"""The load that a parameter server carries: rounds a second, GB/s, CPU seconds and memory.

    python benchmarks/ps_load.py

A server process, and 32 workers as threads of this one that send prepared frames over loopback and
read what comes back, with no training in between. "large" frames (a model of 4 M numbers, all of
them sent as fp32) show how much is left of the bytes a second of raw TCP, and of gRPC without a
parameter server behind it: as many connections, the same bytes up, a barrier, the same bytes down.
"sparse" frames (q = 0.99, fp16, 1 M numbers) show rounds a second, and "small" ones, for 10,000
rounds, whether memory stays flat. Workers and server share the cores of this machine, so that the
CPU seconds of both count. Prints a table and writes runs/ps_load.json, in which the rows of loads
that were not run stay. Needs Linux.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass

import grpc
import torch
from harness.console import integer_from, option_parser, say, text_table, write_report
from harness.counters import cpu_seconds, resident_bytes
from harness.load_baselines import HOST, bare_grpc_round_s, raw_tcp_round_s, run_threads
from harness.ps_server import parameter_server

from topq_dist import Compressor
from topq_dist.ps.client.connection import Connection
from topq_dist.ps.model.flat import FlatModel
from topq_dist.ps.model.spec import ModelSpec
from topq_dist.ps.protocol.types import START, PushRecord, push_digest
from topq_dist.ps.security import ClientSecurity
from topq_dist.ps.wire.codec import spec_to_wire
from topq_dist.v1 import parameter_server_pb2 as pb

CALL_LIMIT_S = 120.0
START_LIMIT_S = 60.0
WARM_ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class Load:
    """The frames that the workers of one row send, and what the server may keep of updates."""

    numel: int
    q: float
    value_format: str
    downlink: str
    rounds: int
    history_bytes: int


LOADS = {
    "large": Load(
        numel=4_000_000,
        q=0.0,
        value_format="fp32",
        downlink="dense",
        rounds=20,
        history_bytes=64 << 20,
    ),
    "sparse": Load(
        numel=1_000_000,
        q=0.99,
        value_format="fp16",
        downlink="topq",
        rounds=300,
        history_bytes=1 << 20,
    ),
    "small": Load(
        numel=1_000,
        q=0.9,
        value_format="fp16",
        downlink="exact",
        rounds=10_000,
        history_bytes=1 << 20,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One load: the median round, payload GB/s both ways together, CPU seconds a round, memory.

    raw_tcp_gb_per_s, bare_grpc_gb_per_s: of the same bytes in the same run. rss_bytes: the server's
    resident memory after each tenth of the rounds. history_bytes: what it may keep of updates.
    """

    load: str
    workers: int
    rounds: int
    round_s: float
    up_bytes: int
    down_bytes: int
    gb_per_s: float
    raw_tcp_gb_per_s: float
    bare_grpc_gb_per_s: float
    server_cpu_s: float
    workers_cpu_s: float
    history_bytes: int
    rss_bytes: list[int]


def measure(name: str, workers: int, rounds: int | None) -> Row:
    """Return the row of one load."""
    load = LOADS[name]
    rounds = rounds or load.rounds
    say(f"{name}: {workers} workers, {rounds} rounds")
    with server(load, workers) as (address, pid):
        places = [Worker(address, number, load) for number in range(workers)]
        for worker in places:
            worker.join()
        ends_s: list[float] = []
        rss_bytes: list[int] = []

        def round_done() -> None:
            ends_s.append(time.perf_counter())
            if len(ends_s) > 1 and (len(ends_s) - 1) % max(1, rounds // 10) == 0:
                rss_bytes.append(resident_bytes(pid))

        # what is compiled, loaded and connected once is no part of a round
        run_threads([worker.step for worker in places], WARM_ROUNDS, lambda: None)
        cpu_s = [cpu_seconds(pid), cpu_seconds(os.getpid())]
        run_threads([worker.step for worker in places], rounds, round_done)
        cpu_s = [cpu_seconds(pid) - cpu_s[0], cpu_seconds(os.getpid()) - cpu_s[1]]
        for worker in places:
            worker.connection.close()
    round_s = statistics.median(b - a for a, b in itertools.pairwise(ends_s))
    up_bytes = places[0].frame.nbytes
    down_bytes = places[0].received_bytes // (WARM_ROUNDS + rounds)
    moved_gb = 1e-9 * workers * (up_bytes + down_bytes)
    return Row(
        load=name,
        workers=workers,
        rounds=rounds,
        round_s=round_s,
        up_bytes=up_bytes,
        down_bytes=down_bytes,
        gb_per_s=moved_gb / round_s,
        raw_tcp_gb_per_s=moved_gb / raw_tcp_round_s(workers, up_bytes, down_bytes),
        bare_grpc_gb_per_s=moved_gb / bare_grpc_round_s(workers, up_bytes, down_bytes),
        server_cpu_s=cpu_s[0] / rounds,
        workers_cpu_s=cpu_s[1] / rounds,
        history_bytes=load.history_bytes,
        rss_bytes=rss_bytes,
    )


class Worker:
    """A place in the run, and one prepared frame that is sent again and again."""

    def __init__(self, address: str, number: int, load: Load) -> None:
        self.connection = Connection(address, ClientSecurity())
        self.name = f"worker-{number:03}"
        generator = torch.Generator().manual_seed(number)
        gradient = torch.randn(load.numel, generator=generator)
        compressor = Compressor(q=load.q, value_format=load.value_format)
        self.frame = compressor.compress("gradient", gradient).numpy().data
        self.digest = push_digest((), [self.frame])
        self.spec = ModelSpec.of([("gradient", gradient)])
        self.id = pb.WorkerId()
        self.point = START
        self.sequence = 1
        self.received_bytes = 0

    def join(self) -> None:
        """Take a place, bring the model where asked to, and take what the run has."""
        request = pb.JoinRequest(
            worker=self.name, instance=os.urandom(16), model=spec_to_wire(self.spec)
        )
        joined = self.connection.join(request, CALL_LIMIT_S)
        self.id = joined.id
        if joined.upload:
            zeros = FlatModel(self.spec).raw()
            self.connection.upload(self.id, zeros, CALL_LIMIT_S)
        which = pb.FetchRequest.WHICH_WORKERS
        self.point, *_ = self.connection.fetch(self.id, which, self.spec, CALL_LIMIT_S)

    def step(self) -> None:
        """Push the frame, and read the answer."""
        push = PushRecord(
            sequence=self.sequence,
            base=self.point,
            frames=(self.frame,),
            lr=(),
            digest=self.digest,
        )
        answer = self.connection.step(self.id, push, self.spec, CALL_LIMIT_S, lambda: None)
        if answer.applied is None:
            raise RuntimeError(f"{self.name}: push {self.sequence} was refused as stale")
        self.received_bytes += sum(update.payload_bytes for update in answer.updates)
        self.point = answer.updates[-1].point
        self.sequence += 1


@contextmanager
def server(load: Load, workers: int) -> Iterator[tuple[str, int]]:
    """Run a parameter server on loopback: yield its address and process id, and end it."""
    with closing(socket.create_server((HOST, 0))) as probe:
        address = f"{HOST}:{probe.getsockname()[1]}"
    options = [
        *("--lr", "0.001", "--workers", str(workers), "--mode", "sync"),
        *("--downlink", load.downlink, "--snapshot-every", "1000000"),
        *("--history-bytes", str(load.history_bytes)),
    ]
    with parameter_server(address, options) as process:
        channel = grpc.insecure_channel(address)
        grpc.channel_ready_future(channel).result(START_LIMIT_S)
        channel.close()
        yield address, process.pid


def table(rows: Sequence[Row]) -> str:
    """Return what is printed."""
    cells = {}
    for row in rows:
        first, last = row.rss_bytes[0] / 1e6, row.rss_bytes[-1] / 1e6
        cells[f"{row.load}, {row.up_bytes / 1e3:.1f} kB up"] = [
            f"{1 / row.round_s:.1f}",
            f"{row.gb_per_s:.3f}",
            f"{row.gb_per_s / row.raw_tcp_gb_per_s:.0%} of {row.raw_tcp_gb_per_s:.2f}",
            f"{row.gb_per_s / row.bare_grpc_gb_per_s:.0%} of {row.bare_grpc_gb_per_s:.3f}",
            f"{1e3 * row.server_cpu_s:.1f} and {1e3 * row.workers_cpu_s:.1f} ms",
            f"{first:.0f} to {last:.0f} MB, {last - first:+.0f}",
        ]
    heads = ["rounds a second", "GB/s", "of raw TCP", "of bare gRPC"]
    heads += ["CPU, server and workers", "server's memory"]
    return text_table(f"{rows[0].workers} workers", heads, cells)


def main(argv: list[str] | None = None) -> None:
    parser = option_parser(__doc__)
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS))
    parser.add_argument("--workers", type=integer_from(2), default=32)
    parser.add_argument("--rounds", type=integer_from(10), help="of each load, instead of its own")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = [measure(name, options.workers, options.rounds) for name in options.loads]
    found = options.out / "ps_load.json"
    others = json.loads(found.read_text())["rows"] if found.exists() else []
    others = [row for row in others if row["load"] not in options.loads]
    report = {
        "benchmark": "ps_load",
        "machine": {"cores": os.cpu_count(), "torch": torch.__version__, "grpc": grpc.__version__},
        "rows": sorted(
            [*map(asdict, rows), *others], key=lambda row: list(LOADS).index(row["load"])
        ),
    }
    write_report(options.out, "ps_load", report)
    print(table(rows))


if __name__ == "__main__":
    main()
