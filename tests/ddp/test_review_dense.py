"""Steps of whole gradients: alike on every rank, whichever has a residual, and paid in shares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hook_cases import loss_of, small_model
from ranks import run_ranks
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from topq_dist import QSchedule, register_topq_hook
from topq_dist.compress.compressor import TopKCompressor
from topq_dist.compress.layout import Layout
from topq_dist.compress.sparsify.segments import Segment
from topq_dist.exchange.allgather import AllGather
from topq_dist.exchange.base import Outgoing
from topq_dist.exchange.collectives import CommContext
from topq_dist.exchange.dense import Dense
from topq_dist.exchange.whole import AllReduceWhole
from topq_dist.telemetry import Meter

pytestmark = pytest.mark.gloo
OVERFLOWS_AT, STEPS = 2, 5


def overflowing(rank: int, loaded: str) -> dict[str, Any]:
    """Train with what a state has left, of which one rank has none, and overflow on the other."""
    model = DistributedDataParallel(small_model(), bucket_cap_mb=0.001)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    q = QSchedule(start=0.5, end=0.9, steps=100)
    state = register_topq_hook(model, optimizer, q=q, exchange="dense")
    saved = {**state.state_dict(), "residuals": {}}
    if loaded != "none":
        generator = torch.Generator().manual_seed(rank)
        saved["residuals"] = {
            name: 1e-3 * torch.randn(one.shape, generator=generator)
            for name, one in model.module.named_parameters()
        }
    if loaded == "by more ranks":
        state.load_state_dict([{**saved, "world_size": 1, "rank": 0}])
    elif loaded == "own":
        if rank == 1:
            saved["residuals"] = {}
        state.load_state_dict(saved)
    marks: list[Tensor] = []
    first = next(model.module.parameters())
    for step in range(STEPS):
        optimizer.zero_grad()
        overflow = step == OVERFLOWS_AT and rank == 0
        handle = first.register_hook(lambda g, by=torch.inf if overflow else 1.0: g * by)
        loss_of(model, step, rank).backward()  # type: ignore[no-untyped-call]
        handle.remove()
        grads = [one.grad for one in model.parameters() if one.grad is not None]
        marks.append(torch.cat([g.isfinite().flatten() for g in grads]))
        if step != OVERFLOWS_AT:
            optimizer.step()
    return {
        "finite": torch.stack(marks),
        "step": state.state_dict()["density"]["step"],
        "weights": torch.cat([one.detach().flatten() for one in model.parameters()]),
    }


def every_overflow(rank: int) -> dict[str, dict[str, Any]]:
    return {loaded: overflowing(rank, loaded) for loaded in ("none", "by more ranks", "own")}


def test_a_step_counts_alike_on_ranks_of_which_one_has_no_residual(tmp_path: Path) -> None:
    ranks = run_ranks(2, every_overflow, tmp_path)
    for loaded, mine in ranks[0].items():
        theirs = ranks[1][loaded]
        assert mine["step"] == theirs["step"], loaded
        assert torch.equal(mine["finite"], theirs["finite"]), loaded
        assert torch.equal(mine["weights"], theirs["weights"]), loaded
        overflowed = mine["finite"][OVERFLOWS_AT]
        # where nothing was loaded nothing waits anywhere, and overflow shows as without a hook
        assert bool(overflowed.any()) == (loaded == "none")
        assert mine["step"] == (STEPS if loaded == "none" else STEPS - 1)


def flushed_again(rank: int) -> dict[str, list[float]]:
    """Return what waits after each dense step, sparse ones in between having left something."""
    group = dist.group.WORLD
    assert group is not None
    context = CommContext(group=group, device=torch.device("cpu"), meter=Meter())
    layout = Layout(names=("w",), shapes=((100,),))
    segments = [Segment(start=0, rows=1, row_numel=100, k=1)]
    sends_all = True

    def made(compressor: TopKCompressor) -> AllReduceWhole:
        sparse, dense = AllGather(context, compressor), Dense(context, compressor)
        return AllReduceWhole(sparse, dense, lambda: sends_all)

    def take(exchange: AllReduceWhole, compressor: TopKCompressor, steps: int) -> list[float]:
        waits = []
        for _ in range(steps):
            exchange.begin_step()
            gradient = torch.ones(100)
            compressed = None
            if exchange.frames_per_bucket:
                compressed = compressor.compress(gradient, layout, segments)
            work = exchange.launch(Outgoing(gradient, layout, compressed, 0))
            work.advance()
            assert work.receive()
            work.deliver()
            kept = compressor.residuals.state_dict().values()
            waits.append(sum(float(one.sum()) for one in kept))
        return waits

    compressor = TopKCompressor(value_format="fp32", error_feedback=True)
    exchange = made(compressor)
    take(exchange, compressor, 40)
    sends_all = False
    before = take(exchange, compressor, 21)[-1]
    again = TopKCompressor(value_format="fp32", error_feedback=True)
    again.residuals.load_state_dict(compressor.residuals.state_dict())
    resumed = made(again)
    resumed.resume(exchange.chosen, exchange.dense_steps)
    sends_all = True
    # a step goes by what was so in the one before it
    through, after_resume = take(exchange, compressor, 34), take(resumed, again, 34)
    return {"before": [before], "through": through, "resumed": after_resume}


def test_what_sparse_steps_in_between_leave_is_paid_in_shares(tmp_path: Path) -> None:
    (ends,) = run_ranks(1, flushed_again, tmp_path)
    sparse, *dense = ends["through"]
    assert sparse > ends["before"][0]
    assert dense[0] == pytest.approx(sparse * 31 / 32, rel=1e-5)
    assert dense[15] == pytest.approx(sparse / 2, rel=1e-5)
    assert dense[30] > 0
    assert dense[31:] == [0, 0]
    assert ends["resumed"] == ends["through"]
