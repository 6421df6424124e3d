"""One rank of the DDP-step benchmark: reads jobs from stdin, answers measurements on stdout.

Both are one JSON object a line. Started by worker_pool on each host; ends when its stdin does.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from harness.baselines import HOOKS, Hook
from harness.counters import interface_sent_bytes, tcp_sent_bytes

WIDTH = 1024
LAYERS = 10
BATCH = 16
PARAMETERS = LAYERS * (WIDTH * WIDTH + WIDTH)
LEARNING_RATE = 0.01
COLLECTIVE_TIMEOUT_S = 60
MIN_PAIRS = 3


@dataclass(frozen=True, kw_only=True)
class Job:
    """A measurement to make on one rank: `hook` over up to `max_pairs` pairs of steps.

    A pair is a step that exchanges and the same step under no_sync. Pairs stop being added once
    they would take longer than `budget_s`, but there are never fewer than `MIN_PAIRS`.
    """

    rank: int
    world_size: int
    store: str
    hook: str
    max_pairs: int
    budget_s: float
    interface: str


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Seconds of each measured step on this rank, and what a step that exchanges costs it.

    `sent_bytes` is what left the interface a step, barriers and TCP acknowledgements included;
    `tcp_bytes` the payload that left this rank's own sockets. The rest is topq_dist's own account
    of a step, None for the other hooks: `handed_bytes` to collectives, `wire_bytes` forwarded by
    them, and the exchange that "auto" chose. `received_bytes` came in by the interface.
    `timeline`: of a benchmark that draws one.
    """

    step_s: list[float]
    compute_s: list[float]
    sent_bytes: float
    tcp_bytes: float
    select_s: float | None = None
    wait_s: float | None = None
    handed_bytes: float | None = None
    wire_bytes: float | None = None
    chosen_exchange: str | None = None
    received_bytes: float | None = None
    timeline: dict[str, Any] | None = None


def build_model() -> nn.Sequential:
    """Return the MLP, the same on every rank."""
    torch.manual_seed(0)
    layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class Training:
    """A model, an optimizer and fresh random batches; one call is one timed step."""

    def __init__(self, rank: int, bucket_cap_mb: int | None) -> None:
        self.model = DistributedDataParallel(
            build_model(),
            bucket_cap_mb=bucket_cap_mb,
            # all ranks have seed 0, and sending 42 MB at 100 Mbit takes seconds a hook
            init_sync=False,
        )
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LEARNING_RATE)
        self.batches = torch.Generator().manual_seed(rank + 1)

    def step_s(self, *, exchange: bool) -> float:
        """Return the seconds of one step, from a barrier to the optimizer's end."""
        inputs, targets = torch.randn(2, BATCH, WIDTH, generator=self.batches)
        dist.barrier()
        start = time.perf_counter()
        self.optimizer.zero_grad()
        with contextlib.nullcontext() if exchange else self.model.no_sync():
            torch.autograd.backward(nn.functional.mse_loss(self.model(inputs), targets))
        self.optimizer.step()
        return time.perf_counter() - start


def measure(job: Job) -> Measurement:
    """Measure one hook in a process group of its own; every rank must be given the same job."""
    # before the group: of ranks that fail in it one may be told of another's end alone
    hook = HOOKS[job.hook]
    with in_group(job):
        return measure_hook(job, hook)


@contextlib.contextmanager
def in_group(job: Job) -> Iterator[None]:
    """Have the process group of a job for the block."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{job.store}",
        rank=job.rank,
        world_size=job.world_size,
        timeout=dt.timedelta(seconds=COLLECTIVE_TIMEOUT_S),
    )
    try:
        yield
    finally:
        dist.destroy_process_group()
        gc.collect()


def measure_hook(job: Job, hook: Hook) -> Measurement:
    """Measure a hook in the process group that there is."""
    training = Training(job.rank, hook.bucket_cap_mb)
    state = hook.register(training.model)
    while hook.chooses and state is not None and state.chosen_exchange is None:
        training.step_s(exchange=True)
    for _ in range(hook.warmup_steps):
        pair_s = training.step_s(exchange=True)
    pair_s += training.step_s(exchange=False)

    pairs = agreed_pairs(job, pair_s)
    before = state.stats() if state else None
    sent_before, tcp_before = interface_sent_bytes(job.interface), tcp_sent_bytes()
    step_s, compute_s = [], []
    for _ in range(pairs):
        # one of each in turn, so that another load on the machine falls on both alike
        step_s.append(training.step_s(exchange=True))
        compute_s.append(training.step_s(exchange=False))
    dist.barrier()
    sent = (interface_sent_bytes(job.interface) - sent_before) / pairs
    tcp = (tcp_sent_bytes() - tcp_before) / pairs
    times = Measurement(step_s=step_s, compute_s=compute_s, sent_bytes=sent, tcp_bytes=tcp)
    if state is None or before is None:
        return times
    after = state.stats()
    return replace(
        times,
        select_s=(after.select_s - before.select_s) / pairs,
        wait_s=(after.wait_s - before.wait_s) / pairs,
        handed_bytes=(after.sent_bytes - before.sent_bytes) / pairs,
        wire_bytes=(after.wire_bytes - before.wire_bytes) / pairs,
        chosen_exchange=state.chosen_exchange,
    )


def agreed_pairs(job: Job, pair_s: float) -> int:
    """Return how many pairs fit the budget where the slowest rank takes `pair_s` for one."""
    slowest_s = torch.tensor(pair_s)
    dist.all_reduce(slowest_s, op=dist.ReduceOp.MAX)
    return max(MIN_PAIRS, min(job.max_pairs, int(job.budget_s / slowest_s.item())))


def answer_jobs(measure: Callable[[Job], Measurement]) -> None:
    """Answer every job on stdin until it ends."""
    # whatever a library prints must not land between the answers
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    torch.set_num_threads(1)
    for line in sys.stdin:
        measurement = measure(Job(**json.loads(line)))
        print(json.dumps(asdict(measurement)), file=answers, flush=True)


if __name__ == "__main__":
    answer_jobs(measure)
