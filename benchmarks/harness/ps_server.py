"""A parameter server in a process of its own, with a state folder that goes with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from harness.netns import Hosts
from harness.worker_pool import WorkerError

WORKERS = 2
# of the first host that netns makes
ADDRESS = "10.77.0.1:7077"
START_LIMIT_S = 60.0
STOP_LIMIT_S = 60.0


@contextmanager
def parameter_server(
    address: str,
    options: Sequence[str],
    *,
    command: Callable[[Sequence[str]], Sequence[str]] = lambda argv: argv,
    extra_environment: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Start `topq serve` at `address`, and end it with the block; it may not listen yet.

    options: of topq serve, beside where it listens and keeps its state. `command(argv)` returns how
    `argv` is run, on a host of its own for instance.
    """
    with tempfile.TemporaryDirectory(prefix="topq-bench-") as folder:
        argv = [sys.executable, "-m", "topq_dist.cli", "serve", "--address", address]
        process = subprocess.Popen(
            command([*argv, "--state-dir", folder, "--inner-opt", "sgd", *options]),
            process_group=0,  # Ctrl-C is for the one who cleans up
            env=os.environ | dict(extra_environment or {}),
        )
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def server_on_first_host(made: Hosts, options: Sequence[str]) -> Iterator[None]:
    """Run a parameter server for WORKERS workers on the first host, and end it with the block.

    Raises WorkerError where it takes no connections.
    """
    options = ["--insecure", "--workers", str(WORKERS), *options]
    with parameter_server(
        ADDRESS,
        options,
        command=lambda argv: made.command(0, argv),
        extra_environment={"OMP_NUM_THREADS": "1"},
    ) as process:
        _wait_for(made, process)
        yield


def _wait_for(made: Hosts, process: subprocess.Popen[bytes]) -> None:
    """Return once the server takes connections; raises WorkerError where it does not."""
    host, port = ADDRESS.split(":")
    probe = f"import socket; socket.create_connection(({host!r}, {port}), 1).close()"
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline and process.poll() is None:
        argv = made.command(1, [sys.executable, "-c", probe])
        if subprocess.run(argv, capture_output=True, check=False).returncode == 0:
            return
        time.sleep(0.2)
    raise WorkerError(f"the server takes no connections on {ADDRESS}")
