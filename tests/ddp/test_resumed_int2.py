"""A run in the default format, killed and resumed in new processes, ends as one that was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hook_cases import batch
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW

from topq_dist import register_topq_hook

pytestmark = pytest.mark.gloo
RANKS = 2
SAVED_AT, STEPS = 5, 10
CASES: dict[str, dict[str, Any]] = {
    "feedback": {},
    "bounded": {"bound": 1.5},
    "corrected": {"momentum": "corrected"},
    "int8": {"value_format": "int8", "q": 0.9},
    "bucket": {"bucket_cap_mb": 0.004},
    # what three sparse steps have left is flushed with the next steps, of which some are behind
    "flushing": {"dense_from": 3},
}


class OutOfOrder(nn.Module):
    """Uses its layers in another order than it names them, and their gradients differ in size.

    DDP fills its first buckets by names, and after the first step by use.
    """

    def __init__(self) -> None:
        super().__init__()
        self.last, self.middle = nn.Linear(40, 5), nn.Linear(40, 40)
        self.first, self.scale = nn.Linear(13, 40), nn.Parameter(torch.full((40,), 1e-3))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(inputs))
        hidden = torch.tanh(self.middle(hidden * self.scale * 1e3) * 10)
        out: Tensor = self.last(hidden) * 0.01
        return out


def run(rank: int, folder: Path, case: str, start: int, stop: int) -> dict[str, Tensor]:
    """Train steps `start` to `stop`, from what was saved before if there is such a thing."""
    torch.manual_seed(0)
    options = {"bucket_cap_mb": 25, **CASES[case]}
    dense_from = options.pop("dense_from", STEPS)
    model = DistributedDataParallel(OutOfOrder(), bucket_cap_mb=options.pop("bucket_cap_mb"))
    kind: Any = AdamW if case == "bounded" else SGD
    optimizer = kind(model.parameters(), **({} if kind is AdamW else {"lr": 0.1, "momentum": 0.9}))
    exchange: Any = "dense" if start >= dense_from else "allgather"
    state = register_topq_hook(model, optimizer, exchange=exchange, **options)
    if start:
        saved = torch.load(folder / f"saved{rank}.pt", weights_only=True)
        model.module.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        state.load_state_dict(saved["hook"])
    for step in range(start, stop):
        optimizer.zero_grad()
        inputs, targets = batch(step, rank)
        nn.functional.cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    ended: dict[str, Any] = {
        "model": model.module.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    torch.save({**ended, "hook": state.state_dict()}, folder / f"saved{rank}.pt")
    residuals = state.state_dict()["residuals"]
    parameters: dict[str, Tensor] = ended["model"]
    return parameters | {f"residual of {name}": held for name, held in residuals.items()}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_equals_the_uninterrupted_one(case: str, tmp_path: Path) -> None:
    begin = CASES[case].get("dense_from", 0)
    if begin:
        run_ranks(RANKS, run, tmp_path / "sparse", tmp_path, case, 0, begin)
        begun = {path: path.read_bytes() for path in tmp_path.glob("saved*.pt")}
    whole = run_ranks(RANKS, run, tmp_path / "whole", tmp_path, case, begin, STEPS)
    if begin:
        for path, content in begun.items():
            path.write_bytes(content)
    run_ranks(RANKS, run, tmp_path / "first", tmp_path, case, begin, SAVED_AT)
    resumed = run_ranks(RANKS, run, tmp_path / "second", tmp_path, case, SAVED_AT, STEPS)
    for uninterrupted, other in zip(whole, resumed, strict=True):
        assert uninterrupted.keys() == other.keys()
        for name, expected in uninterrupted.items():
            assert torch.equal(expected, other[name]), name
