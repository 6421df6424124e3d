"""What a parameter server carries: rounds a second, GB/s beside raw TCP, and its memory.

    python benchmarks/ps_load.py

A server process, and 32 workers as threads of this one that send prepared frames over loopback and
read what comes back, with no training in between. "large" frames (a model of 4 M numbers, all of
them sent as fp32) show how much of a raw TCP transfer of the same bytes is left: the same number
of connections, the same bytes up, a barrier, the same bytes down. "sparse" frames (q = 0.99, fp16,
1 M numbers) show rounds a second, and "small" ones, for 10,000 rounds, whether memory stays flat.
Prints a table and writes runs/ps_load.json. Needs Linux.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import grpc
import torch
from console import integer_from, say, text_table

from topq_dist import Compressor
from topq_dist.ps.model import ModelSpec
from topq_dist.ps.protocol import START, Point, push_digest
from topq_dist.ps.wire import (
    point_from_wire,
    read_answer,
    spec_to_wire,
    step_requests,
    upload_requests,
)
from topq_dist.v1 import parameter_server_pb2 as pb
from topq_dist.v1.parameter_server_pb2_grpc import ParameterServerStub

OUT = Path(__file__).resolve().parents[1] / "runs"
HOST = "127.0.0.1"
CALL_LIMIT_S = 120.0
START_LIMIT_S = 60.0
CHANNELS = 4
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, kw_only=True)
class Load:
    """What the workers of one row send."""

    numel: int
    q: float
    value_format: str
    downlink: str
    rounds: int
    raw_tcp: bool


LOADS = {
    "large": Load(
        numel=4_000_000, q=0.0, value_format="fp32", downlink="dense", rounds=6, raw_tcp=True
    ),
    "sparse": Load(
        numel=1_000_000, q=0.99, value_format="fp16", downlink="topq", rounds=60, raw_tcp=True
    ),
    "small": Load(
        numel=1_000, q=0.9, value_format="fp16", downlink="exact", rounds=10_000, raw_tcp=False
    ),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One load: rounds a second, payload GB/s both ways together, and the server's memory.

    raw_tcp_gb_per_s: of the same bytes in the same run. rss_bytes: the server's resident memory
    after each tenth of the rounds.
    """

    load: str
    workers: int
    rounds: int
    round_s: float
    up_bytes: int
    down_bytes: int
    gb_per_s: float
    raw_tcp_gb_per_s: float | None
    rss_bytes: list[int]


def measure(name: str, workers: int, rounds: int | None) -> Row:
    """Return the row of one load."""
    load = LOADS[name]
    rounds = rounds or load.rounds
    say(f"{name}: {workers} workers, {rounds} rounds")
    with server(load, workers) as (address, pid):
        crew = join(address, load, workers)
        ends_s = [time.perf_counter()]
        rss_bytes: list[int] = []

        def round_done() -> None:
            ends_s.append(time.perf_counter())
            if (len(ends_s) - 1) % max(1, rounds // 10) == 0:
                rss_bytes.append(resident_bytes(pid))

        run_threads(crew, rounds, round_done)
    round_s = statistics.median(b - a for a, b in itertools.pairwise(ends_s))
    up_bytes = crew[0].frame.nbytes
    down_bytes = crew[0].received_bytes // rounds
    moved_bytes = workers * (up_bytes + down_bytes)
    raw_s = raw_tcp_round_s(workers, up_bytes, down_bytes) if load.raw_tcp else None
    return Row(
        load=name,
        workers=workers,
        rounds=rounds,
        round_s=round_s,
        up_bytes=up_bytes,
        down_bytes=down_bytes,
        gb_per_s=1e-9 * moved_bytes / round_s,
        raw_tcp_gb_per_s=None if raw_s is None else 1e-9 * moved_bytes / raw_s,
        rss_bytes=rss_bytes,
    )


class Worker:
    """A place in the run, and one prepared frame that is sent again and again."""

    def __init__(self, channel: grpc.Channel, number: int, load: Load) -> None:
        self.stub = ParameterServerStub(channel)
        self.name = f"worker-{number:03}"
        generator = torch.Generator().manual_seed(number)
        gradient = torch.randn(load.numel, generator=generator)
        compressor = Compressor(q=load.q, value_format=load.value_format)
        self.frame = compressor.compress("gradient", gradient).numpy().data
        self.digest = push_digest((), [self.frame])
        self.spec = ModelSpec.of([("gradient", gradient)])
        self.id = pb.WorkerId()
        self.point: Point = START
        self.sequence = 1
        self.received_bytes = 0

    def join(self) -> None:
        """Take a place, and bring the model where asked to."""
        request = pb.JoinRequest(
            worker=self.name,
            instance=os.urandom(16),
            model=spec_to_wire(self.spec),
        )
        joined = self.stub.Join(request, timeout=CALL_LIMIT_S, wait_for_ready=True)
        self.id.CopyFrom(joined.id)
        if joined.upload:
            zeros = torch.zeros(self.spec.numel).numpy()
            vectors = [zeros.data.cast("B")]
            self.stub.Upload(upload_requests(self.id, vectors), timeout=CALL_LIMIT_S)
        else:
            self.point = point_from_wire(joined.point)
        if self.point == START:
            # the point of version 0, for whoever came before the model did
            headers = self.stub.Fetch(
                pb.FetchRequest(id=self.id, which=pb.FetchRequest.WHICH_WORKERS),
                timeout=CALL_LIMIT_S,
            )
            self.point = point_from_wire(next(headers).header.point)
            for _ in headers:
                pass

    def step(self) -> None:
        """Push the frame, and read the answer."""
        requests = step_requests(
            self.id,
            sequence=self.sequence,
            base=self.point,
            frames=[self.frame],
            lr=(),
            digest=self.digest,
        )
        answer = read_answer(self.stub.Step(requests, timeout=CALL_LIMIT_S), self.spec)
        if answer.applied is None:
            raise RuntimeError(f"{self.name}: push {self.sequence} was refused as stale")
        self.received_bytes += sum(update.payload_bytes for update in answer.updates)
        self.point = answer.updates[-1].point
        self.sequence += 1


def join(address: str, load: Load, workers: int) -> list[Worker]:
    """Return workers that have joined, the first of them with the model."""
    # gRPC starts a thread for each channel that goes from idle to busy, which 32 workers of one
    # process would do all the time: a few channels are rarely idle
    channels = [grpc.insecure_channel(address, options=[("channel", n)]) for n in range(CHANNELS)]
    crew = [Worker(channels[number % CHANNELS], number, load) for number in range(workers)]
    for worker in crew:
        worker.join()
    return crew


def run_threads(crew: Sequence[Worker], rounds: int, round_done: Callable[[], None]) -> None:
    """Let every worker take `rounds` steps at once; raises what one of them raised."""
    barrier = threading.Barrier(len(crew), action=round_done)
    failures: list[BaseException] = []

    def work(worker: Worker) -> None:
        try:
            for _ in range(rounds):
                worker.step()
                barrier.wait()
        except threading.BrokenBarrierError:
            pass
        except BaseException as error:  # noqa: BLE001 - raised below
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(worker,)) for worker in crew]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def raw_tcp_round_s(connections: int, up_bytes: int, down_bytes: int, rounds: int = 12) -> float:
    """Return the median seconds of a round of plain sockets between two processes."""
    with closing(socket.create_server((HOST, 0), backlog=connections)) as listener:
        port = listener.getsockname()[1]
        argv = [*(sys.executable, __file__, "--raw-peer", str(port)), "--workers"]
        argv += [*(str(connections), "--raw-bytes"), str(up_bytes), str(down_bytes), str(rounds)]
        peer = subprocess.Popen(argv)
        try:
            accepted = [listener.accept()[0] for _ in range(connections)]
            ends_s = [time.perf_counter()]
            barrier = threading.Barrier(
                connections, action=lambda: ends_s.append(time.perf_counter())
            )

            def serve(connection: socket.socket) -> None:
                taken, answer = bytearray(up_bytes), bytes(down_bytes)
                for _ in range(rounds):
                    receive(connection, taken)
                    barrier.wait()
                    connection.sendall(answer)

            threads = [threading.Thread(target=serve, args=(one,)) for one in accepted]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            peer.wait(START_LIMIT_S)
        finally:
            peer.kill()
            peer.wait()
            for connection in accepted:
                connection.close()
    return statistics.median(b - a for a, b in itertools.pairwise(ends_s))


def raw_peer(port: int, connections: int, up_bytes: int, down_bytes: int, rounds: int) -> None:
    """Send and receive as the workers do, over plain sockets."""

    def work() -> None:
        with socket.create_connection((HOST, port)) as connection:
            pushed, taken = bytes(up_bytes), bytearray(down_bytes)
            for _ in range(rounds):
                connection.sendall(pushed)
                receive(connection, taken)

    threads = [threading.Thread(target=work) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def receive(connection: socket.socket, into: bytearray) -> None:
    """Fill `into` from the connection."""
    left = memoryview(into)
    while left.nbytes:
        count = connection.recv_into(left)
        if count == 0:
            raise ConnectionError("the peer has closed the connection")
        left = left[count:]


@contextmanager
def server(load: Load, workers: int) -> Iterator[tuple[str, int]]:
    """Run a parameter server on loopback: yield its address and process id, and end it."""
    with closing(socket.create_server((HOST, 0))) as probe:
        address = f"{HOST}:{probe.getsockname()[1]}"
    with tempfile.TemporaryDirectory(prefix="topq-bench-") as folder:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "topq_dist.cli", "serve", "--address", address),
                *("--state-dir", folder, "--inner-opt", "sgd", "--lr", "0.001"),
                *("--workers", str(workers), "--mode", "sync", "--downlink", load.downlink),
                *("--snapshot-every", "1000000"),
            ]
        )
        try:
            channel = grpc.insecure_channel(address)
            grpc.channel_ready_future(channel).result(START_LIMIT_S)
            channel.close()
            yield address, process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(START_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def resident_bytes(pid: int) -> int:
    """Return the memory that a process has resident."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES


def table(rows: Sequence[Row]) -> str:
    """Return what is printed."""
    cells = {}
    for row in rows:
        share = "-"
        if row.raw_tcp_gb_per_s is not None:
            share = f"{row.gb_per_s / row.raw_tcp_gb_per_s:.0%} of {row.raw_tcp_gb_per_s:.2f} GB/s"
        first, last = row.rss_bytes[0] / 1e6, row.rss_bytes[-1] / 1e6
        cells[f"{row.load}, {row.up_bytes / 1e3:.1f} kB up"] = [
            f"{1 / row.round_s:.1f}",
            f"{row.gb_per_s:.3f}",
            share,
            f"{first:.0f} to {last:.0f} MB",
        ]
    heads = ["rounds a second", "GB/s", "of raw TCP", "server's memory"]
    return text_table(f"{rows[0].workers} workers", heads, cells)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS))
    parser.add_argument("--workers", type=integer_from(2), default=32)
    parser.add_argument("--rounds", type=integer_from(10), help="of each load, instead of its own")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the JSON")
    parser.add_argument("--raw-peer", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--raw-bytes", type=int, nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.raw_peer is not None:
        raw_peer(options.raw_peer, options.workers, *options.raw_bytes)
        return
    torch.set_num_threads(1)
    rows = [measure(name, options.workers, options.rounds) for name in options.loads]
    report = {
        "benchmark": "ps_load",
        "machine": {"cores": os.cpu_count(), "torch": torch.__version__, "grpc": grpc.__version__},
        "rows": [asdict(row) for row in rows],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "ps_load.json").write_text(json.dumps(report, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
