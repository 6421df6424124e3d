"""`topq serve` as a real process that is killed and started again, and what it leaves on disk."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Self

import torch
from ps.servers import FORKED
from ps_raw import arm

from topq_dist.ps.config import ServingConfig, TrainingConfig
from topq_dist.ps.run_state import RunState
from topq_dist.ps.snapshot import SNAPSHOT_NAME, StateDir
from topq_dist.ps.snapshot_file import read_snapshot_file

_START_S = 60.0
_END_S = 30.0


class TopqServe:
    """One server on one state directory and port, process after process.

    anew: start each from an interpreter of its own, as a shell does (seconds: torch is imported).
    Else it is forked from a process that has torch, and runs the same command in a part of one.
    """

    def __init__(
        self,
        state_dir: Path,
        training: TrainingConfig,
        serving: ServingConfig,
        *,
        anew: bool = False,
    ) -> None:
        self.state_dir = state_dir
        self.training = training
        self.address = f"127.0.0.1:{_quiet_port()}"
        self._arguments = _arguments(self.address, state_dir, training, serving)
        self._anew = anew
        self._log = state_dir.parent / f"{state_dir.name}.log"
        self._process: ForkServerProcess | None = None

    @property
    def process(self) -> ForkServerProcess:
        """The process that was launched last."""
        assert self._process is not None
        return self._process

    def launch(self, crash_at: str = "") -> None:
        """Start a process; with `crash_at` ("POINT CALL") it kills itself there, see `arm`."""
        self._process = FORKED.Process(
            target=_serve, args=(self._arguments, crash_at, self._anew, self._log), daemon=True
        )
        self._process.start()

    def listens(self) -> bool:
        """Return whether the server takes connections."""
        host, port = self.address.split(":")
        with socket.socket() as end:
            end.settimeout(1.0)
            return end.connect_ex((host, int(port))) == 0

    def await_listening(self) -> float:
        """Wait until the server takes connections; returns the seconds that took."""
        start_s = time.monotonic()
        while not self.listens():
            waited_s = time.monotonic() - start_s
            if not self.process.is_alive() or waited_s > _START_S:
                raise AssertionError(f"the server does not listen: {self.said()}")
            time.sleep(0.005)
        return time.monotonic() - start_s

    def kill(self) -> None:
        """End the process as kill -9 does, and see that it was not dead before."""
        self.process.kill()
        self.process.join(_END_S)
        assert self.process.exitcode == -signal.SIGKILL, self.said()

    def terminate(self) -> None:
        """End the process in good order."""
        self.process.terminate()
        self.process.join(_END_S)
        assert self.process.exitcode == 0, self.said()

    def said(self) -> str:
        """Return the exit code and what all processes wrote."""
        log = self._log.read_text() if self._log.exists() else ""
        return f"exit code {self.process.exitcode}: {log}"

    def durable_version(self) -> int:
        """Return the version of the snapshot on disk; -1: there is none."""
        try:
            contents = read_snapshot_file(self.state_dir / SNAPSHOT_NAME)
        except FileNotFoundError:
            return -1
        metadata = json.loads(contents["metadata"].numpy().tobytes())
        return int(metadata["point"]["version"])

    def __enter__(self) -> Self:
        self.launch()
        self.await_listening()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.is_alive():
            self._process.kill()
            self._process.join(_END_S)


@dataclass(frozen=True, kw_only=True)
class Ending:
    """What a server that has ended left: equal endings are the same run, bit for bit.

    applied: pushes applied of each worker. parameters_sha256: of the central parameters.
    state_sha256: of these, the optimizer's state, what workers are owed, and the chain, in which
    are number and bytes of each push that was ever applied.
    """

    version: int
    applied: dict[str, int]
    parameters_sha256: str
    state_sha256: str


def ending(state_dir: Path, training: TrainingConfig) -> Ending:
    """Read what the server left in its state directory."""
    with StateDir(state_dir) as directory:
        loaded = RunState.load(directory, training, history_bytes=1 << 30)
        assert loaded is not None
        state, _ = loaded
        digest = hashlib.sha256()
        for vector in state.central.central_raw():
            digest.update(vector)
        return Ending(
            version=state.point.version,
            applied={
                worker: state.ledger.next_sequence(worker) - 1 for worker in state.ledger.workers
            },
            parameters_sha256=digest.hexdigest(),
            state_sha256=state.sha256(),
        )


def _quiet_port() -> int:
    """Return a free port below those that the kernel gives to clients.

    A client that knocks at a dead server's port could be given that very port, and keep the server
    from coming back.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 30_000)
        with socket.socket() as end:
            if end.connect_ex(("127.0.0.1", port)) != 0:
                return port


def _arguments(
    address: str, state_dir: Path, training: TrainingConfig, serving: ServingConfig
) -> list[str]:
    named: dict[str, object] = {
        "address": address,
        "state-dir": state_dir,
        "inner-opt": training.inner_opt,
        "mode": training.mode,
        "downlink": training.downlink,
        "workers": serving.start_workers,
        "lease-s": serving.lease_s,
        "snapshot-every": serving.snapshot_every,
    }
    if training.downlink == "topq":
        named["downlink-q"] = training.q
    options = [f"--inner-option={name}={value}" for name, value in training.options.items()]
    return ["serve", *(f"--{name}={value}" for name, value in named.items()), *options]


def _serve(arguments: Sequence[str], crash_at: str, anew: bool, log: Path) -> None:
    written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(written, 1)
    os.dup2(written, 2)
    if anew:
        os.environ["OMP_NUM_THREADS"] = "1"
        os.execv(sys.executable, [sys.executable, "-m", "topq_dist.cli", *arguments])  # noqa: S606
    from topq_dist.cli import main

    torch.set_num_threads(1)
    if crash_at:
        arm(crash_at)
    sys.exit(main(arguments))
