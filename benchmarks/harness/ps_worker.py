"""One worker of the parameter-server benchmark: reads jobs from stdin, answers measurements.

As ddp_worker.py, but the exchange is a step of ParameterServerOptimizer through the server that
TOPQ_BENCH_SERVER names. Job.hook is "topq" or "dense", how the gradient is pushed.
"""

from __future__ import annotations

import datetime as dt
import os
import time

import torch
import torch.distributed as dist
from torch import nn

from harness.counters import interface_received_bytes, interface_sent_bytes, tcp_sent_bytes
from harness.ddp_worker import (
    BATCH,
    COLLECTIVE_TIMEOUT_S,
    WIDTH,
    Job,
    Measurement,
    agreed_pairs,
    answer_jobs,
    build_model,
)
from topq_dist.ps import ParameterServerOptimizer

WARM_UP_STEPS = 6
LEARNING_RATE = 1e-3
Q = {"topq": 0.99, "dense": 0.0}
VALUE_FORMAT = {"topq": "fp16", "dense": "fp32"}


class Training:
    """A model, its optimizer behind the server, one that steps in place, and fresh batches."""

    def __init__(self, job: Job) -> None:
        self.model = build_model()
        self.optimizer = ParameterServerOptimizer(
            self.model.named_parameters(),
            os.environ["TOPQ_BENCH_SERVER"],
            q=Q[job.hook],
            value_format=VALUE_FORMAT[job.hook],
            error_feedback=job.hook == "topq",
            worker=f"worker-{job.rank}",
        )
        # what a step costs where nothing is exchanged: of a copy, so that the workers agree
        self.idle = [parameter.detach().clone() for parameter in self.model.parameters()]
        self.in_place = torch.optim.SGD(self.idle, lr=LEARNING_RATE)
        self.batches = torch.Generator().manual_seed(job.rank + 1)

    def step_s(self, *, exchange: bool) -> float:
        """Return the seconds of one step, from a barrier to the optimizer's end."""
        inputs, targets = torch.randn(2, BATCH, WIDTH, generator=self.batches)
        dist.barrier()
        start = time.perf_counter()
        self.optimizer.zero_grad()
        torch.autograd.backward(nn.functional.mse_loss(self.model(inputs), targets))
        if exchange:
            self.optimizer.step()
        else:
            for idle, parameter in zip(self.idle, self.model.parameters(), strict=True):
                idle.grad = parameter.grad
            self.in_place.step()
        return time.perf_counter() - start


def measure(job: Job) -> Measurement:
    """Measure pairs of steps; the process group is there for its barrier alone."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{job.store}",
        rank=job.rank,
        world_size=job.world_size,
        timeout=dt.timedelta(seconds=COLLECTIVE_TIMEOUT_S),
    )
    try:
        return _measure(job)
    finally:
        dist.destroy_process_group()


def _measure(job: Job) -> Measurement:
    training = Training(job)
    for _ in range(WARM_UP_STEPS):
        pair_s = training.step_s(exchange=True)
    pair_s += training.step_s(exchange=False)
    pairs = agreed_pairs(job, pair_s)
    sent_before, tcp_before = interface_sent_bytes(job.interface), tcp_sent_bytes()
    received_before = interface_received_bytes(job.interface)
    step_s, compute_s = [], []
    for _ in range(pairs):
        step_s.append(training.step_s(exchange=True))
        compute_s.append(training.step_s(exchange=False))
    dist.barrier()
    measured = Measurement(
        step_s=step_s,
        compute_s=compute_s,
        sent_bytes=(interface_sent_bytes(job.interface) - sent_before) / pairs,
        received_bytes=(interface_received_bytes(job.interface) - received_before) / pairs,
        tcp_bytes=(tcp_sent_bytes() - tcp_before) / pairs,
    )
    training.optimizer.close()
    return measured


if __name__ == "__main__":
    answer_jobs(measure)
