"""A parameter server as a process: started, killed at a moment or a point, started again."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Self

import torch
from crash_points import arm
from forked import FORKED
from leak_report import without_leak_report

from topq_dist.ps.protocol.config import ServingConfig, TrainingConfig

_START_S = 60.0
_END_S = 30.0


class ServerProcess:
    """One server on one state directory and port, process after process.

    training, serving: the configurations, or their keyword arguments. anew: start each process from
    an interpreter of its own, as a shell does (seconds: torch is imported); else it is forked from
    one that has torch. The block of a `with` begins once it listens, and ends it.
    """

    def __init__(
        self,
        state_dir: Path,
        training: TrainingConfig | Mapping[str, Any],
        serving: ServingConfig | Mapping[str, Any] | None = None,
        *,
        port: int | None = None,
        anew: bool = False,
    ) -> None:
        if not isinstance(training, TrainingConfig):
            training = TrainingConfig(**training)
        if not isinstance(serving, ServingConfig):
            serving = ServingConfig(**(serving or {}))
        self.state_dir = state_dir
        self.training, self._serving = training, serving
        self.port = port or quiet_port()
        self._anew = anew
        self._out, self._errors = (
            state_dir.parent / f"{state_dir.name}.{stream}" for stream in ("stdout", "stderr")
        )
        self._process: ForkServerProcess | None = None

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return f"127.0.0.1:{self.port}"

    @property
    def process(self) -> ForkServerProcess:
        """The process that was launched last."""
        assert self._process is not None
        return self._process

    @property
    def pid(self) -> int:
        """The process's id."""
        assert self.process.pid is not None
        return self.process.pid

    def launch(self, crash_at: str = "") -> None:
        """Start a process; with `crash_at` ("POINT CALL") it kills itself there, see `arm`."""
        run = _run_command if self._anew else _serve
        if self._anew and crash_at:
            raise ValueError(f"crash_at={crash_at!r}: a new interpreter cannot be armed")
        self._out.write_text("")
        self._process = FORKED.Process(
            target=run,
            args=(
                (self._out, self._errors),
                *(self.state_dir, self.address, self.training, self._serving, crash_at),
            ),
            daemon=True,
        )
        self._process.start()

    def start(self, crash_at: str = "") -> None:
        """Start a process and wait until it listens."""
        self.launch(crash_at)
        self.await_listening()

    def listens(self) -> bool:
        """Return whether the server has said that it listens."""
        return self._out.read_text().startswith("listening on ")

    def await_listening(self) -> float:
        """Wait until the server listens; returns the seconds that took."""
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

    def finish(self) -> tuple[int, str]:
        """Wait for the process to end; return its exit code and what all wrote to stderr."""
        self.process.join(_END_S)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"the server did not end by itself: {self.said()}")
        return self.process.exitcode, without_leak_report(self._errors.read_text())

    def terminate(self) -> tuple[int, str]:
        """Ask the process to end (SIGTERM), and `finish`."""
        self.process.terminate()
        return self.finish()

    def said(self) -> str:
        """Return the exit code and what all processes wrote to stderr."""
        errors = self._errors.read_text() if self._errors.exists() else ""
        return f"exit code {self.process.exitcode}: {errors}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.is_alive():
            self._process.kill()
            self._process.join(_END_S)


def quiet_port() -> int:
    """Return a free port below those that the kernel gives to clients.

    A client that knocks at a dead server's port could be given that very port, and keep the server
    from coming back.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 30_000)
        with socket.socket() as end:
            if end.connect_ex(("127.0.0.1", port)) != 0:
                return port


def _write_to(streams: tuple[Path, Path]) -> None:
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)


def _serve(
    streams: tuple[Path, Path],
    state_dir: Path,
    address: str,
    training: TrainingConfig,
    serving: ServingConfig,
    crash_at: str,
) -> None:
    from topq_dist.ps.server.process import serve

    _write_to(streams)
    torch.set_num_threads(1)
    if crash_at:
        arm(crash_at)
    serve(
        training,
        serving,
        state_dir=state_dir,
        address=address,
        on_listening=lambda where: print("listening on", where, flush=True),
    )


def _run_command(
    streams: tuple[Path, Path],
    state_dir: Path,
    address: str,
    training: TrainingConfig,
    serving: ServingConfig,
    _: str,
) -> None:
    _write_to(streams)
    words = _words(training, serving)
    words += [f"--address={address}", f"--state-dir={state_dir}"]
    os.environ["OMP_NUM_THREADS"] = "1"
    os.execv(sys.executable, [sys.executable, "-m", "topq_dist.cli", "serve", *words])  # noqa: S606


def _words(training: TrainingConfig, serving: ServingConfig) -> list[str]:
    """Return the options of `topq serve` that these configurations are."""
    given: dict[str, Any] = {
        field.name: value
        for config in (training, serving)
        for field in dataclasses.fields(config)
        if (value := getattr(config, field.name)) != field.default
    }
    words = [f"--inner-option={name}={value!r}" for name, value in given.pop("options", {}).items()]
    if serving != dataclasses.replace(serving, max_workers=serving.start_workers, min_workers=1):
        raise ValueError(f"serving={serving}: expected start_workers and max_workers alike")
    words.append(f"--workers={serving.start_workers}")
    for name in ("start_workers", "max_workers"):
        given.pop(name, None)
    if given.pop("groups", ()):
        raise ValueError("groups: expected none for a new interpreter")
    known = {"q": "downlink-q", "value_format": "downlink-value-format"}
    return words + [
        f"--{known.get(name, name.replace('_', '-'))}={value}" for name, value in given.items()
    ]
