"""The same metrics in the trackers of training runs: one function each, for the training loop.

None imports its tracker: each is given the object that the user's own script has made.
"""

from __future__ import annotations

from typing import Any, Protocol

from topq_dist.telemetry.readings import Observed


class _Writer(Protocol):
    def add_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> None: ...


class _Run(Protocol):
    def log(self, data: dict[str, Any], step: int | None = None) -> Any: ...


class _Logger(Protocol):
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> Any: ...


def numbers_of(source: Observed) -> dict[str, float]:
    """Return a source's metrics by name: labels in their order behind it, parted by "/".

    Of a histogram the sum and the count. Metrics that only name something are left out.
    """
    source.observe()
    numbers: dict[str, float] = {}
    for reading in source.readings():
        name = "/".join((reading.metric.name, *reading.labels))
        if reading.metric.kind == "histogram":
            numbers[f"{name}/sum"] = reading.value
            numbers[f"{name}/count"] = float(reading.buckets[-1][1])
        elif reading.metric.kind != "info":
            numbers[name] = reading.value
    return numbers


def to_tensorboard(source: Observed, writer: _Writer, *, step: int) -> None:
    """Write a source's metrics to a torch.utils.tensorboard.SummaryWriter.

    source: as for serve_metrics. step: of the training loop.
    """
    for name, value in numbers_of(source).items():
        writer.add_scalar(name, value, step)


def to_wandb(source: Observed, run: _Run, *, step: int) -> None:
    """Log a source's metrics to what wandb.init has returned; source, step: see to_tensorboard."""
    run.log(dict(numbers_of(source)), step=step)


def to_mlflow(source: Observed, mlflow: _Logger, *, step: int) -> None:
    """Log a source's metrics to MLflow's active run.

    mlflow: the module, or whatever has its log_metrics. source, step: see to_tensorboard.
    """
    mlflow.log_metrics(numbers_of(source), step=step)
