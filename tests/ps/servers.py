"""Parameter servers for tests: one inside the test's process, or one to be killed."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess as SpawnedProcess
from pathlib import Path
from typing import Any, Self

import torch

from topq_dist.ps.config import ServingConfig, TrainingConfig
from topq_dist.ps.security import Address, ServerSecurity
from topq_dist.ps.server import ParameterServer

Options = dict[str, Any]
_LONGEST_END_S = 20
# forks from a process that has torch and no gRPC, so that a start takes a part of a second
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["topq_dist.ps.run_state", "topq_dist.ps.saver", "torch._dynamo"])


@contextmanager
def serving(
    state_dir: Path, training: Options, *, security: ServerSecurity | None = None, **options: Any
) -> Iterator[ParameterServer]:
    """Run a server in this process: keyword arguments of TrainingConfig, then of ServingConfig."""
    server = ParameterServer(
        TrainingConfig(**training),
        ServingConfig(**options),
        state_dir=state_dir,
        address="127.0.0.1:0",
        security=security,
    )
    try:
        yield server
    finally:
        server.stop()


class ServerProcess:
    """A server in a process of its own, which keeps its port and its state across restarts."""

    def __init__(self, state_dir: Path, training: Options, **options: Any) -> None:
        self._arguments = (TrainingConfig(**training), ServingConfig(**options), state_dir)
        self.address = "127.0.0.1:0"
        self._process = self._start()

    def _start(self) -> SpawnedProcess:
        ours, theirs = FORKED.Pipe()
        process = FORKED.Process(
            target=_serve, args=(theirs, *self._arguments, self.address), daemon=True
        )
        process.start()
        theirs.close()
        try:
            self.address = ours.recv()
        except EOFError:
            process.join(_LONGEST_END_S)
            raise RuntimeError(f"the server ended with {process.exitcode}") from None
        finally:
            ours.close()
        return process

    @property
    def pid(self) -> int | None:
        """The process's id."""
        return self._process.pid

    def kill(self) -> None:
        """End the process as kill -9 does."""
        self._process.kill()
        self._process.join(_LONGEST_END_S)

    def restart(self) -> None:
        """Start it again, on the same port and state directory."""
        self._process = self._start()

    def terminate(self) -> int | None:
        """Ask the process to end (SIGTERM), and return its exit status."""
        self._process.terminate()
        self._process.join(_LONGEST_END_S)
        return self._process.exitcode

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.is_alive():
            self.kill()


def _serve(
    told: Connection,
    training: TrainingConfig,
    serving_config: ServingConfig,
    state_dir: Path,
    address: str,
) -> None:
    from topq_dist.ps.server import serve

    torch.set_num_threads(1)

    def tell(where: Address) -> None:
        told.send(str(where))
        told.close()

    serve(training, serving_config, state_dir=state_dir, address=address, on_listening=tell)
