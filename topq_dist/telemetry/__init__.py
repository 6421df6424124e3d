"""Counters of ranks, workers and servers, and the ways in which they are offered.

Nothing here imports torch, and what serves counters or writes them elsewhere is imported when it is
first used. docs/metrics.md lists them.
"""

from topq_dist.telemetry.adapters import to_mlflow, to_tensorboard, to_wandb
from topq_dist.telemetry.catalog import METRICS, Metric
from topq_dist.telemetry.logs import JsonFormatter, TextFormatter
from topq_dist.telemetry.prometheus import MetricsServer, serve_metrics
from topq_dist.telemetry.readings import Histogram, Observed, Reading
from topq_dist.telemetry.stats import Meter, Stats

__all__ = [
    "METRICS",
    "Histogram",
    "JsonFormatter",
    "Meter",
    "Metric",
    "MetricsServer",
    "Observed",
    "Reading",
    "Stats",
    "TextFormatter",
    "serve_metrics",
    "to_mlflow",
    "to_tensorboard",
    "to_wandb",
]
