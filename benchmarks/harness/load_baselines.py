"""The baselines of ps_load.py: the bytes of a parameter server over sockets and bare gRPC.

Each is a server process with as many clients, as threads of this one, as the parameter server has
workers. All send their bytes up, the server waits for the last of them, and all get bytes down.
"""

from __future__ import annotations

import itertools
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from contextlib import closing, contextmanager, suppress
from typing import IO, cast

import grpc

from topq_dist.ps.client.connection import channel_options
from topq_dist.ps.protocol.types import CHUNK_BYTES, SHORT_BYTES
from topq_dist.ps.server.process import server_options

HOST = "127.0.0.1"
METHOD = "/bench.Echo/Step"
ROUNDS = 12
END_LIMIT_S = 20.0


def raw_tcp_round_s(clients: int, up_bytes: int, down_bytes: int) -> float:
    """Return the median seconds of a round over plain sockets."""
    with baseline("sockets", clients, up_bytes, down_bytes) as address:
        return rounds_of(clients, lambda: socket_client(address, up_bytes, down_bytes))


def bare_grpc_round_s(clients: int, up_bytes: int, down_bytes: int) -> float:
    """Return the median seconds of a round over gRPC, with no server behind it.

    Channels, options, and when a message is enough instead of a stream, are the library's.
    """
    with baseline("grpc", clients, up_bytes, down_bytes) as address:
        return rounds_of(clients, lambda: grpc_client(address, up_bytes, down_bytes))


def rounds_of(clients: int, make: Callable[[], Callable[[], None]], rounds: int = ROUNDS) -> float:
    """Let clients that `make` returns act at once, and return the median seconds of a round."""
    ends_s: list[float] = []
    acts = [make() for _ in range(clients)]
    run_threads(acts, rounds, lambda: ends_s.append(time.perf_counter()))
    return statistics.median(b - a for a, b in itertools.pairwise(ends_s))


def run_threads(
    acts: Sequence[Callable[[], None]], rounds: int, round_done: Callable[[], None]
) -> None:
    """Let all act in threads, once a round; raises what one of them raised.

    round_done: called before the first round and after each.
    """
    barrier = threading.Barrier(len(acts), action=round_done)
    failures: list[BaseException] = []

    def work(act: Callable[[], None]) -> None:
        try:
            barrier.wait()
            for _ in range(rounds):
                act()
                barrier.wait()
        except threading.BrokenBarrierError:
            pass
        except BaseException as error:  # noqa: BLE001 - raised below
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(act,)) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def socket_client(address: str, up_bytes: int, down_bytes: int) -> Callable[[], None]:
    """Return what a client does in a round."""
    connection = socket.create_connection(address_of(address))
    pushed, taken = bytes(up_bytes), bytearray(down_bytes)

    def act() -> None:
        connection.sendall(pushed)
        receive(connection, taken)

    return act


def grpc_client(address: str, up_bytes: int, down_bytes: int) -> Callable[[], None]:
    """Return what a client does in a round."""
    channel = grpc.insecure_channel(address, options=channel_options())
    pushed = bytes(up_bytes)
    if is_short(up_bytes, down_bytes):
        call: Callable[..., bytes] = channel.unary_unary(METHOD)
        return lambda: check_length(len(call(pushed, wait_for_ready=True)), down_bytes)
    stream: Callable[..., Iterator[bytes]] = channel.stream_stream(METHOD)

    def act() -> None:
        taken = sum(map(len, stream(chunks(pushed), wait_for_ready=True)))
        check_length(taken, down_bytes)

    return act


def serve(kind: str, clients: int, up_bytes: int, down_bytes: int) -> None:
    """Serve clients of this kind until the standard input ends."""
    together = threading.Barrier(clients)
    answer = bytes(down_bytes)
    if kind == "sockets":
        listener = socket.create_server((HOST, 0), backlog=clients)
        print(f"{HOST}:{listener.getsockname()[1]}", flush=True)

        def answer_rounds(connection: socket.socket) -> None:
            taken = bytearray(up_bytes)
            with suppress(ConnectionError, threading.BrokenBarrierError):
                while True:
                    receive(connection, taken)
                    together.wait()
                    connection.sendall(answer)

        for _ in range(clients):
            connection = listener.accept()[0]
            threading.Thread(target=answer_rounds, args=(connection,), daemon=True).start()
        sys.stdin.read()
        return

    def short(message: bytes, _: grpc.ServicerContext) -> bytes:
        check_length(len(message), up_bytes)
        together.wait()
        return answer

    def long(messages: Iterator[bytes], _: grpc.ServicerContext) -> Iterator[bytes]:
        check_length(sum(map(len, messages)), up_bytes)
        together.wait()
        yield from chunks(answer)

    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(long)
    if is_short(up_bytes, down_bytes):
        handler = grpc.unary_unary_rpc_method_handler(short)
    server = grpc.server(futures.ThreadPoolExecutor(clients), options=server_options())
    service, method = METHOD[1:].split("/")
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler(service, {method: handler})]
    )
    port = server.add_insecure_port(f"{HOST}:0")
    server.start()
    print(f"{HOST}:{port}", flush=True)
    sys.stdin.read()
    server.stop(None).wait()


@contextmanager
def baseline(kind: str, clients: int, up_bytes: int, down_bytes: int) -> Iterator[str]:
    """Run `serve` in a process of its own, and yield its address."""
    argv = [sys.executable, __file__, kind, str(clients), str(up_bytes), str(down_bytes)]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process, closing(cast("IO[str]", process.stdin)) as end:
        try:
            yield cast("IO[str]", process.stdout).readline().strip()
            end.close()
            process.wait(END_LIMIT_S)
        finally:
            process.kill()


def is_short(up_bytes: int, down_bytes: int) -> bool:
    """Return whether one message each way is enough."""
    return max(up_bytes, down_bytes) <= SHORT_BYTES


def chunks(message: bytes) -> Iterator[bytes]:
    """Yield the message in chunks, each a copy, as gRPC is given nothing but bytes."""
    for start in range(0, len(message), CHUNK_BYTES):
        yield message[start : start + CHUNK_BYTES]


def check_length(length: int, expected: int) -> None:
    """Raise RuntimeError where something went amiss."""
    if length != expected:
        raise RuntimeError(f"{length} bytes came: expected {expected}")


def receive(connection: socket.socket, into: bytearray) -> None:
    """Fill `into` from the connection."""
    left = memoryview(into)
    while left.nbytes:
        count = connection.recv_into(left)
        if count == 0:
            raise ConnectionError("the peer has closed the connection")
        left = left[count:]


def address_of(text: str) -> tuple[str, int]:
    """Return host and port."""
    host, _, port = text.rpartition(":")
    return host, int(port)


if __name__ == "__main__":
    serve(sys.argv[1], *map(int, sys.argv[2:]))
