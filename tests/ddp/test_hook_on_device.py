"""The hook with its frames on the device, Triton interpreted: as with frames through the host."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreted import DEVICE
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from topq_dist import TopQState, register_topq_hook
from topq_dist.compress.gpu.update import DeviceSelected
from topq_dist.exchange.agreement import ExchangeError
from topq_dist.exchange.device_gather import DeviceAllGather

pytestmark = [pytest.mark.gloo, pytest.mark.timeout(600)]
ON_DEVICE = "interpret" if DEVICE == "cpu" else "1"
VOID_STEP, OTHER_Q_STEP = 3, 5


@contextmanager
def engine(setting: str) -> Iterator[None]:
    before = os.environ.get("TOPQ_GPU")
    os.environ["TOPQ_GPU"] = setting
    try:
        yield
    finally:
        os.environ.pop("TOPQ_GPU")
        if before is not None:
            os.environ["TOPQ_GPU"] = before


def wrapped(dtype: torch.dtype = torch.float32) -> DistributedDataParallel:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 25), nn.Tanh(), nn.Linear(25, 7)).to(DEVICE, dtype)
    # more than one bucket, from the second step on
    return DistributedDataParallel(model, bucket_cap_mb=0.001)


def step(model: DistributedDataParallel, rank: int, number: int, *, void: bool = False) -> None:
    generator = torch.Generator().manual_seed(100 * number + rank)
    dtype = next(model.parameters()).dtype
    batch = torch.randn(4, 30, generator=generator).to(DEVICE, dtype)
    loss = model(batch).square().sum()
    model.zero_grad()
    (loss * torch.inf if void and rank == 0 else loss).backward()


def trained(
    rank: int, setting: str, steps: int, dtype: torch.dtype, **knobs: Any
) -> tuple[list[Tensor], TopQState]:
    """Return the parameters after each step, and the hook's state."""
    with engine(setting):
        model = wrapped(dtype)
        optimizer: torch.optim.Optimizer
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        if knobs.pop("adam", False):
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        state = register_topq_hook(model, optimizer, **knobs)
        seen = []
        for number in range(steps):
            if number == OTHER_Q_STEP:
                state.q = 0.7
            step(model, rank, number, void=number == VOID_STEP)
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            void = any(bool(gradient.isnan().any()) for gradient in gradients)
            assert void == (number == VOID_STEP)
            if not void:
                optimizer.step()
            seen.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]).cpu())
        return seen, state


CASES: list[dict[str, Any]] = [
    {"exchange": "allgather", "q": 0.9},
    {"exchange": "split", "q": 0.9},
    {"exchange": "allgather", "q": 0.8, "value_format": "fp16", "scope": "bucket", "adam": True},
    {"exchange": "allgather", "q": 0.9, "error_feedback": False, "dtype": torch.bfloat16},
]


def same_steps(rank: int, cases: list[tuple[int, int]]) -> bool:
    for number, steps in cases:
        knobs = dict(CASES[number])
        dtype = knobs.pop("dtype", torch.float32)
        on_cpu, through_host = trained(rank, "0", steps, dtype, **knobs)
        on_device, state = trained(rank, ON_DEVICE, steps, dtype, **knobs)
        exchange = state._ranks.exchange if state._ranks is not None else None
        assert isinstance(exchange, DeviceAllGather) == (knobs["exchange"] == "allgather")
        for at, (mine, wanted) in enumerate(zip(on_device, on_cpu, strict=True)):
            assert torch.equal(mine, wanted), (knobs, at)
        wanted_state = through_host.state_dict()
        for name, residual in state.state_dict()["residuals"].items():
            assert torch.equal(residual.cpu(), wanted_state["residuals"][name].cpu()), name
    return True


@pytest.mark.parametrize(
    ("ranks", "cases"), [(2, [(0, 20), (2, 7), (3, 7)]), (3, [(0, 8), (1, 20)])]
)
def test_steps_to_the_bit(ranks: int, cases: list[tuple[int, int]], tmp_path: Path) -> None:
    assert run_ranks(ranks, same_steps, tmp_path, cases) == [True] * ranks


def troubles(rank: int) -> list[str]:
    """Return what each rank hears of ranks that disagree, and of one that fails."""
    said = []
    for late in (False, True):
        for trouble in ("q", "failure", "slot", "damage"):
            with engine(ON_DEVICE):
                model = wrapped()
                optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
                state = register_topq_hook(model, optimizer, q=0.9, exchange="allgather")
                assert state._ranks is not None
                exchange = state._ranks.exchange
                assert isinstance(exchange, DeviceAllGather)
                exchange.late = late
                for number in range(3):
                    step(model, rank, number)
                if rank == 1 and trouble == "q":
                    # fewer, for which there is room: the others' slots are as long as ever
                    state.q = 0.95
                if rank == 1 and trouble == "failure":
                    exchange.compressor.compress = fails  # type: ignore[method-assign]
                if rank == 1 and trouble == "slot":
                    exchange.compressor.write = fails  # type: ignore[method-assign]
                if trouble == "damage":
                    # of its payload; or its version, which the host reads where it waits for slots
                    damage(exchange, 32 + (40 if late else 4))
                said.append(heard(model, rank))
    return said


def damage(exchange: DeviceAllGather, byte: int) -> None:
    """Have a byte of rank 1's slot be another, on every rank, once the slots are there."""
    check = exchange.compressor.check

    def damaged(selected: DeviceSelected, slots: Tensor, report: Tensor) -> Tensor:
        slots[1, byte] ^= 2
        return check(selected, slots, report)

    exchange.compressor.check = damaged  # type: ignore[method-assign]


def fails(*args: Any, **kwargs: Any) -> Any:
    raise MemoryError("no memory left on the device")


def heard(model: DistributedDataParallel, rank: int) -> str:
    for number in range(2):
        try:
            step(model, rank, 10 + number)
        except (ExchangeError, MemoryError) as error:
            return f"{number} {error}"
    return "nothing"


def test_every_rank_hears_of_trouble_as_on_the_cpu(tmp_path: Path) -> None:
    first, second = run_ranks(2, troubles, tmp_path)
    for said in (first, second):
        assert "ranks disagree" in said[0]
        assert said[0].startswith("0")
        # one step later, and still on every rank
        assert "ranks disagree" in said[4]
        assert said[4].startswith("1")
        assert said[3].startswith("0 the frame of rank 1 was damaged on its way: frame version 3")
        assert said[7].startswith("1 the frame of rank 1 was damaged on its way, or")
    for at in (1, 2):
        assert first[at].startswith("0 rank 1 could not compress its gradient")
        assert first[at + 4].startswith("1 rank 1 could not compress its gradient")
        assert second[at] == second[at + 4] == "0 no memory left on the device"
