"""One rank of the benchmark of local steps: reads jobs from stdin, answers measurements on stdout.

A job's `hook` is one of METHODS. Blocks of inner steps with rounds and blocks without any are taken
in turn, so that another load on the machine falls on both alike.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from harness.counters import interface_sent_bytes
from harness.ddp_worker import WIDTH, Job, Measurement, answer_jobs, build_model, in_group
from topq_dist import LocalTopQ

BATCH = 128
EVERY = 15
_SAMPLE_S = 0.004
_STREAMED: dict[str, Any] = {"fragments": 3, "overlap": 2}
# DiLoCo's 42 MB of a round take 3.4 s on 100 Mbit
_DENSE: dict[str, Any] = {
    "q": 0.0,
    "outer_lr": 0.7,
    "outer_momentum": 0.9,
    "nesterov": True,
}
METHODS: dict[str, dict[str, Any]] = {
    "top-Q rounds": {"q": 0.97},
    "top-Q, streamed": {"q": 0.97, **_STREAMED},
    "dense rounds (DiLoCo)": _DENSE,
    "dense, streamed": {**_DENSE, **_STREAMED},
}


class Training:
    """A model with local steps, and fresh random batches."""

    def __init__(self, rank: int, method: str) -> None:
        self.model = build_model()
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.local = LocalTopQ(self.model, optimizer, every=EVERY, **METHODS[method])
        self._batches = torch.Generator().manual_seed(rank + 1)

    def step(self, *, rounds: bool) -> tuple[float, float]:
        """Take an inner step; return when it and what is done for rounds ended."""
        inputs, targets = torch.randn(2, BATCH, WIDTH, generator=self._batches)
        self.local.optimizer.zero_grad()
        torch.autograd.backward(nn.functional.mse_loss(self.model(inputs), targets))
        self.local.optimizer.step()
        stepped_s = time.perf_counter()
        if rounds:
            self.local.end_step()
        return stepped_s, time.perf_counter()

    def block_s(self, *, rounds: bool) -> float:
        """Return the seconds a step takes, over a period."""
        dist.barrier()
        if rounds:
            # what the last block left under way has arrived without anybody waiting
            for _ in range(EVERY):
                self.step(rounds=True)
        began_s = time.perf_counter()
        for _ in range(EVERY):
            self.step(rounds=rounds)
        return (time.perf_counter() - began_s) / EVERY


def measure(job: Job) -> Measurement:
    """Measure one method in a process group of its own; every rank must be given the same job."""
    METHODS[job.hook]
    with in_group(job):
        training = Training(job.rank, job.hook)
        for _ in range(EVERY + 1):
            # the first frames find no room yet
            training.step(rounds=True)
        before = training.local.stats()
        step_s, compute_s = [], []
        for _ in range(job.max_pairs):
            step_s.append(training.block_s(rounds=True))
            compute_s.append(training.block_s(rounds=False))
        after = training.local.stats()
        steps = after.steps - before.steps
        dist.barrier()
        return Measurement(
            step_s=step_s,
            compute_s=compute_s,
            sent_bytes=(after.sent_bytes - before.sent_bytes) / steps,
            tcp_bytes=(after.wire_bytes - before.wire_bytes) / steps,
            select_s=(after.select_s - before.select_s) / steps,
            wait_s=(after.wait_s - before.wait_s) / steps,
            timeline=_timeline(training, job.interface),
        )


def _timeline(training: Training, interface: str) -> dict[str, Any]:
    """Return the steps of a period and a half, and the bytes that had left the host when.

    Seconds are those since the first of these steps began.
    """
    with _sampled(interface) as samples:
        began_s = start_s = time.perf_counter()
        steps = []
        for _ in range(EVERY + EVERY // 2):
            stepped_s, ended_s = training.step(rounds=True)
            steps.append([start_s - began_s, stepped_s - began_s, ended_s - began_s])
            start_s = ended_s
    return {"steps": steps, "sent": [[at_s - began_s, sent] for at_s, sent in samples]}


@contextmanager
def _sampled(interface: str) -> Iterator[list[tuple[float, int]]]:
    samples: list[tuple[float, int]] = []
    over = threading.Event()

    def sample() -> None:
        while not over.wait(_SAMPLE_S):
            samples.append((time.perf_counter(), interface_sent_bytes(interface)))

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield samples
    finally:
        over.set()
        sampler.join()


if __name__ == "__main__":
    answer_jobs(measure)
