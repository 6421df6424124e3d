"""Parameter servers for tests: one inside the test's process, or one to be killed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from topq_dist.ps.config import ServingConfig, TrainingConfig
from topq_dist.ps.security import Address
from topq_dist.ps.server import ParameterServer, serve

Options = dict[str, Any]
_LONGEST_END_S = 20


@contextmanager
def serving(state_dir: Path, training: Options, **options: Any) -> Iterator[ParameterServer]:
    """Run a server in this process: keyword arguments of TrainingConfig, then of ServingConfig."""
    server = ParameterServer(
        TrainingConfig(**training),
        ServingConfig(**options),
        state_dir=state_dir,
        address="127.0.0.1:0",
    )
    try:
        yield server
    finally:
        server.stop()


class ServerProcess:
    """A server in a process of its own, which keeps its port and its state across restarts."""

    def __init__(self, state_dir: Path, training: Options, **options: Any) -> None:
        self._state_dir = state_dir
        self._training = training
        self._options = options
        self.address = "127.0.0.1:0"
        self._process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        arguments = json.dumps(
            {
                "state_dir": str(self._state_dir),
                "training": self._training,
                "serving": self._options,
                "address": self.address,
            }
        )
        process = subprocess.Popen(
            [sys.executable, __file__, arguments], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        self.address = process.stdout.readline().strip()
        if not self.address:
            raise RuntimeError(f"the server ended with {process.wait(_LONGEST_END_S)}")
        return process

    def kill(self) -> None:
        """End the process as kill -9 does."""
        self._process.kill()
        self._reap()

    def restart(self) -> None:
        """Start it again, on the same port and state directory."""
        self._process = self._start()

    def terminate(self) -> int:
        """Ask the process to end (SIGTERM), and return its exit status."""
        self._process.terminate()
        return self._reap()

    def _reap(self) -> int:
        status = self._process.wait(_LONGEST_END_S)
        if self._process.stdout is not None:
            self._process.stdout.close()
        return status

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self.kill()
        elif self._process.stdout is not None:
            self._process.stdout.close()


def _main(arguments: Options) -> None:
    def tell(address: Address) -> None:
        print(address, flush=True)

    serve(
        TrainingConfig(**arguments["training"]),
        ServingConfig(**arguments["serving"]),
        state_dir=arguments["state_dir"],
        address=arguments["address"],
        on_listening=tell,
    )


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
