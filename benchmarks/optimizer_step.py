"""A step of TopQGradientOptimizer beside rai_toolbox's, on a 10.5 M-parameter MLP.

    python benchmarks/optimizer_step.py

Ten times Linear(1024, 1024), SGD, q = 0.99, at param_ndim None, 1 and -1. Both optimizers step in
turn on equal parameters and equal fresh gradients, in one process. Prints the medians and their
ratio, and writes every time measured to runs/optimizer_step.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import rai_toolbox.optim
import torch
from harness.console import integer_from, say, text_table
from torch import Tensor, nn
from torch.optim import Optimizer

from topq_dist.optim import TopQGradientOptimizer

OUT = Path(__file__).resolve().parents[1] / "runs" / "optimizer_step.json"
PARAM_NDIMS = (None, 1, -1)
WARM_UP = 2  # steps not counted: the first ones fault pages in


@dataclass(frozen=True, kw_only=True)
class Row:
    """Seconds of each step at one param_ndim, and the ratio of the two medians."""

    param_ndim: int | None
    ours_s: list[float]
    rai_toolbox_s: list[float]
    ratio: float


def mlp() -> list[Tensor]:
    """Return the weights and biases of ten Linear(1024, 1024): 10,496,000 parameters."""
    layers = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(10)))
    return list(layers.parameters())


def timed_step(optimizer: Optimizer, gradients: Sequence[Tensor]) -> float:
    """Return the seconds of one step on these gradients; laying them ready is not counted."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for param, gradient in zip(params, gradients, strict=True):
        if param.grad is None:
            param.grad = torch.empty_like(param)
        param.grad.copy_(gradient)
    start_s = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - start_s


def survivors(optimizer: Optimizer) -> list[int]:
    """Return how many elements of each gradient are not zero."""
    return [
        int(param.grad.count_nonzero())
        for group in optimizer.param_groups
        for param in group["params"]
    ]


def measure(q: float, repeats: int) -> list[Row]:
    """Return a row for each param_ndim; raise RuntimeError unless both did the same work."""
    params = mlp()
    generator = torch.Generator().manual_seed(0)
    pairs = {}
    for param_ndim in PARAM_NDIMS:
        pairs[param_ndim] = [
            make([p.detach().clone() for p in params], q=q, param_ndim=param_ndim, lr=1e-3)
            for make in (TopQGradientOptimizer, rai_toolbox.optim.TopQGradientOptimizer)
        ]
    times: dict[int | None, tuple[list[float], list[float]]] = {
        param_ndim: ([], []) for param_ndim in PARAM_NDIMS
    }
    for repeat in range(-WARM_UP, repeats):
        gradients = [torch.randn(p.shape, generator=generator) for p in params]
        for param_ndim, (ours, theirs) in pairs.items():
            steps_s = [timed_step(optimizer, gradients) for optimizer in (ours, theirs)]
            if survivors(ours) != survivors(theirs):
                raise RuntimeError(f"param_ndim={param_ndim}: the two kept different numbers")
            if repeat >= 0:
                for kept, step_s in zip(times[param_ndim], steps_s, strict=True):
                    kept.append(step_s)
        say(f"step {repeat + 1 + WARM_UP} of {repeats + WARM_UP}")
    return [
        Row(
            param_ndim=param_ndim,
            ours_s=ours_s,
            rai_toolbox_s=theirs_s,
            ratio=statistics.median(ours_s) / statistics.median(theirs_s),
        )
        for param_ndim, (ours_s, theirs_s) in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Time a step of TopQGradientOptimizer beside rai_toolbox's."
    )
    parser.add_argument("--q", type=float, default=0.99, help="default: 0.99")
    parser.add_argument("--repeats", type=integer_from(1), default=15, help="default: 15")
    parser.add_argument("--threads", type=integer_from(1), default=1, help="torch's; default: 1")
    parser.add_argument("--json", type=Path, default=OUT, help="default: runs/optimizer_step.json")
    args = parser.parse_args()
    # rai_toolbox reads Tensor.storage(), which torch deprecates, once a parameter a step
    warnings.filterwarnings("ignore", message="TypedStorage is deprecated", category=UserWarning)
    torch.set_num_threads(args.threads)

    rows = measure(args.q, args.repeats)
    cells = {
        str(row.param_ndim): [
            f"{statistics.median(row.ours_s) * 1e3:.1f} ms",
            f"{statistics.median(row.rai_toolbox_s) * 1e3:.1f} ms",
            f"{row.ratio:.3f}",
        ]
        for row in rows
    }
    print(f"a step on 10.5 M parameters, SGD, q = {args.q}, {args.threads} thread(s), medians")
    print(text_table("param_ndim", ["topq_dist", "rai_toolbox", "ratio"], cells))
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(
        json.dumps(
            {
                "parameters": 10_496_000,
                "q": args.q,
                "threads": args.threads,
                "torch": torch.__version__,
                "numpy": np.__version__,
                "rows": [asdict(row) for row in rows],
            },
            indent=2,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
