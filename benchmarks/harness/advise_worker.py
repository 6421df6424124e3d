"""One rank of the advice benchmark: reads jobs from stdin, answers measurements on stdout.

Of the job "advise" the measurement's `timeline` is the advice; any other job is a hook of HOOKS, or
what `topq_job` returns, whose steps are timed as the DDP-step benchmark times them.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from harness.baselines import HOOKS, Hook
from harness.ddp_worker import (
    BATCH,
    LEARNING_RATE,
    WIDTH,
    Job,
    Measurement,
    answer_jobs,
    build_model,
    in_group,
    measure_hook,
)
from topq_dist import TopQState, advise, register_topq_hook

if TYPE_CHECKING:
    from topq_dist.exchange.registry import ExchangeName

ADVISE = "advise"
QS = (0.97, 0.99)
VALUE_FORMATS = ("int2", "fp16")
BUDGET_S = 20.0


def topq_job(q: float, value_format: str, exchange: str) -> str:
    """Return the job that measures the hook with these knobs."""
    return f"{q} {value_format} {exchange}"


def measure(job: Job) -> Measurement:
    """Answer one job; every rank must be given the same."""
    with in_group(job):
        if job.hook == ADVISE:
            return _advice(job)
        return measure_hook(job, HOOKS[job.hook] if job.hook in HOOKS else _topq(job.hook))


def _advice(job: Job) -> Measurement:
    model = build_model()
    batches = torch.Generator().manual_seed(job.rank + 1)

    def loss(wrapped: nn.Module) -> Tensor:
        inputs, targets = torch.randn(2, BATCH, WIDTH, generator=batches)
        return nn.functional.mse_loss(wrapped(inputs), targets)

    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    advice = advise(model, loss, optimizer, qs=QS, value_formats=VALUE_FORMATS, budget_s=BUDGET_S)
    told = json.loads(advice.as_json())
    return Measurement(step_s=[], compute_s=[], sent_bytes=0.0, tcp_bytes=0.0, timeline=told)


def _topq(job: str) -> Hook:
    q, value_format, exchange = job.split()

    def register(model: DistributedDataParallel) -> TopQState:
        return register_topq_hook(
            model,
            q=float(q),
            value_format=value_format,
            exchange=cast("ExchangeName", exchange),
        )

    return Hook(title=f"top-Q {job}", register=register, warmup_steps=6)


if __name__ == "__main__":
    answer_jobs(measure)
