"""One worker process a host, each given jobs and answering measurements a line at a time."""

from __future__ import annotations

import json
import os
import re
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO

from harness.ddp_worker import Job, Measurement
from harness.netns import uninterrupted

BENCHMARKS = Path(__file__).resolve().parents[1]
DDP_WORKER = "harness.ddp_worker"
START_AND_MEASURE_LIMIT_S = 240.0
ERROR_TAIL_LINES = 12


class WorkerError(RuntimeError):
    """A worker ended or did not answer in time; the message carries the end of its stderr."""


class WorkerPool:
    """Workers that run the same job at once, one a rank."""

    def __init__(
        self,
        workers: Sequence[subprocess.Popen[str]],
        errors: Sequence[IO[str]],
        interface: str,
    ) -> None:
        self._workers = workers
        self._errors = errors
        self._interface = interface

    def measure(self, hook: str, *, max_pairs: int, budget_s: float) -> list[Measurement]:
        """Return every rank's measurement of `hook`, in rank order.

        Raises WorkerError when a worker ends or the answers take too long; the pool is then spent.
        """
        with tempfile.TemporaryDirectory(prefix="topq-bench-") as folder:
            for rank in range(len(self._workers)):
                job = Job(
                    rank=rank,
                    world_size=len(self._workers),
                    store=f"{folder}/store",
                    hook=hook,
                    max_pairs=max_pairs,
                    budget_s=budget_s,
                    interface=self._interface,
                )
                self._give(rank, job)
            answers = self._answers()
        return [Measurement(**json.loads(answers[rank])) for rank in sorted(answers)]

    def _give(self, rank: int, job: Job) -> None:
        stdin = self._workers[rank].stdin
        assert stdin is not None  # noqa: S101 - opened as a pipe below
        try:
            print(json.dumps(asdict(job)), file=stdin, flush=True)
        except BrokenPipeError:
            raise WorkerError(self._end_of(rank)) from None

    def _answers(self) -> dict[int, str]:
        answers: dict[int, str] = {}
        deadline = time.monotonic() + START_AND_MEASURE_LIMIT_S
        with selectors.DefaultSelector() as waiting:
            for rank, worker in enumerate(self._workers):
                assert worker.stdout is not None  # noqa: S101 - opened as a pipe below
                waiting.register(worker.stdout, selectors.EVENT_READ, rank)
            while len(answers) < len(self._workers):
                ready = waiting.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise WorkerError(f"no answer within {START_AND_MEASURE_LIMIT_S:.0f} s")
                for key, _ in ready:
                    line = self._workers[key.data].stdout.readline()
                    if not line:
                        raise WorkerError(self._end_of(key.data))
                    answers[key.data] = line
                    waiting.unregister(key.fileobj)
        return answers

    def _end_of(self, rank: int) -> str:
        status = self._workers[rank].wait()
        self._errors[rank].seek(0)
        # torch puts "[rank1]: " before each line once for every process group there has been
        text = re.sub(r"^(\[rank\d+\]: )+", "", self._errors[rank].read(), flags=re.MULTILINE)
        tail = text.splitlines()[-ERROR_TAIL_LINES:]
        return "\n".join((f"rank {rank} ended with status {status}:", *tail))


def worker_environment(interface: str) -> dict[str, str]:
    """Return the environment of a worker: one thread, what it talks through, and this package."""
    path = os.pathsep.join(filter(None, (str(BENCHMARKS), os.environ.get("PYTHONPATH"))))
    return os.environ | {
        "GLOO_SOCKET_IFNAME": interface,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": path,
    }


@contextmanager
def start_workers(
    size: int,
    *,
    interface: str,
    command: Callable[[int, Sequence[str]], Sequence[str]],
    module: str = DDP_WORKER,
    extra_environment: Mapping[str, str] | None = None,
) -> Iterator[WorkerPool]:
    """Start `size` workers that talk through `interface`, and end them with the block.

    `command(rank, argv)` returns how `argv` is run for that rank, on its own host for instance;
    `module` reads Jobs and answers Measurements as ddp_worker does.
    """
    environment = worker_environment(interface) | dict(extra_environment or {})
    with ExitStack() as stack:
        errors = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(size)]
        workers = stack.enter_context(killed_at_the_end())
        for rank in range(size):
            worker = subprocess.Popen(
                command(rank, [sys.executable, "-m", module]),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors[rank],
                text=True,
                env=environment,
                process_group=0,  # Ctrl-C is for the one who cleans up
            )
            workers.append(worker)
        yield WorkerPool(workers, errors, interface)


@contextmanager
def killed_at_the_end() -> Iterator[list[subprocess.Popen[str]]]:
    """Give a list for the block's processes, none of which outlives it."""
    processes: list[subprocess.Popen[str]] = []
    try:
        yield processes
    finally:
        with uninterrupted():
            for process in processes:
                process.kill()
            for process in processes:
                process.wait()
                for pipe in (process.stdin, process.stdout):
                    if pipe is not None:
                        pipe.close()
