"""q's policies in the hook: saved, resumed to the bit, and the same on every rank or one error."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from hook_cases import batch, loss_of, small_model
from ranks import error_of, run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from topq_dist import QByLoss, QByTensor, QSchedule, TopQState, register_topq_hook

pytestmark = pytest.mark.gloo
SAVED_AT, STEPS = 3, 6
WARM_UP = QSchedule(start=0.6, end=0.97, steps=5)
POLICIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "schedule": (WARM_UP, {}),
    "schedule, buckets": (WARM_UP, {"scope": "bucket", "value_format": "ec2"}),
    "by tensor": (
        QByTensor(q=WARM_UP, patterns={"4.*": 0.5}, whole_vectors=True),
        {"value_format": "ec1"},
    ),
    "by loss": (QByLoss(energy=0.6, budget_bytes=1_500), {}),
    "by residual": (QByLoss(residual=1.0, budget_bytes=3_000), {"momentum": "corrected"}),
}


def trainer(case: str) -> tuple[DistributedDataParallel, torch.optim.Optimizer, TopQState]:
    policy, options = POLICIES[case]
    model = DistributedDataParallel(small_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    knobs = {"exchange": "allgather", **options}
    return model, optimizer, register_topq_hook(model, optimizer, q=policy, **knobs)


def steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, start: int, stop: int, rank: int
) -> None:
    for step in range(start, stop):
        optimizer.zero_grad()
        loss_of(model, step, rank).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def resumed(rank: int, case: str) -> dict[str, Any]:
    model, optimizer, state = trainer(case)
    steps(model, optimizer, 0, SAVED_AT, rank)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), state.state_dict()], file)
    sent_before = state.stats().sent_bytes
    steps(model, optimizer, SAVED_AT, STEPS, rank)
    through = state.stats().sent_bytes
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, its_optimizer, its_state = trainer(case)
    again.load_state_dict(saved[0])
    its_optimizer.load_state_dict(saved[1])
    its_state.load_state_dict(saved[2])
    steps(again, its_optimizer, SAVED_AT, STEPS, rank)
    ended = [
        {**one.state_dict(), **hook.state_dict()["residuals"]}
        for one, hook in ((model, state), (again, its_state))
    ]
    return {
        "same": all(torch.equal(ended[0][name], ended[1][name]) for name in ended[0]),
        "density": its_state.state_dict()["density"],
        "bytes": (sent_before, through),
    }


def disagreeing(rank: int) -> dict[str, str]:
    def hook(q: Any) -> Any:
        model = DistributedDataParallel(small_model())
        return model, register_topq_hook(model, q=q, exchange="allgather")

    def one_is_ahead() -> None:
        model, state = hook(WARM_UP)
        loss_of(model, 0, rank).backward()  # type: ignore[no-untyped-call]
        if rank == 0:
            state.load_state_dict(
                {**state.state_dict(), "density": {"policy": repr(WARM_UP), "step": 4}}
            )
        loss_of(model, 1, rank).backward()  # type: ignore[no-untyped-call]

    def one_is_set_anew() -> None:
        model, state = hook(0.9)
        if rank == 1:
            state.q = QByTensor(q=0.9, whole_vectors=True)
        loss_of(model, 0, rank).backward()  # type: ignore[no-untyped-call]

    ends = (0.97, 0.98)
    return {
        "another schedule": error_of(lambda: hook(QSchedule(start=0.6, end=ends[rank], steps=5))),
        "a policy on one": error_of(lambda: hook((0.9, QByTensor(q=0.9))[rank])),
        "another budget": error_of(lambda: hook(QByLoss(energy=0.5, budget_bytes=2_000 + rank))),
        "no such name on one": error_of(
            lambda: hook(QByTensor(q=0.9, patterns={"9*" if rank else "0*": 0.5}))
        ),
        "one is ahead": error_of(one_is_ahead),
        "one is set anew": error_of(one_is_set_anew),
    }


def everything(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {case: resumed(rank, case) for case in POLICIES}
    return {**found, "errors": disagreeing(rank)}


def test_policies_resume_to_the_bit_and_ranks_that_disagree_all_say_so(tmp_path: Path) -> None:
    ranks = run_ranks(2, everything, tmp_path)
    for found in ranks:
        for case, (policy, _) in POLICIES.items():
            assert found[case]["same"], case
            assert found[case]["density"] == {"policy": repr(policy), "step": STEPS}
        # the first half of a warm-up, which sends more, counts
        before, through = found["schedule"]["bytes"]
        assert before > 1.1 * (through - before)
        errors = found["errors"]
        assert "end=0.97" in errors["another schedule"]
        assert "end=0.98" in errors["another schedule"]
        assert "QByTensor(q=0.9" in errors["a policy on one"]
        assert "budget_bytes=2001" in errors["another budget"]
        assert "step=4" in errors["one is ahead"]
        assert "whole_vectors=True" in errors["one is set anew"]
        for case, error in errors.items():
            own = case == "no such name on one" and found is ranks[1]
            assert error.startswith("ValueError" if own else "ExchangeError"), (case, error)
    assert "'9*', which fits no parameter" in ranks[1]["errors"]["no such name on one"]


def by_hand(rank: int) -> list[Tensor]:
    """Return a step's gradients with whole vectors, and those of plain averages."""
    model = DistributedDataParallel(small_model())
    register_topq_hook(
        model, q=QByTensor(q=0.9, whole_vectors=True), exchange="allgather", value_format="fp32"
    )
    inputs, targets = batch(0, rank)
    nn.functional.cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
    plain = small_model()
    for one in range(2):
        (loss_of(plain, 0, one) / 2).backward()  # type: ignore[no-untyped-call]
    return [parameter.grad for one in (model, plain) for parameter in one.parameters()]  # type: ignore[misc]


def test_whole_tensors_arrive_whole(tmp_path: Path) -> None:
    for gradients in run_ranks(2, by_hand, tmp_path):
        half = len(gradients) // 2
        for sparse, dense in zip(gradients[:half], gradients[half:], strict=True):
            if sparse.dim() == 1:
                torch.testing.assert_close(sparse, dense)
            else:
                assert 0 < sparse.count_nonzero() < dense.numel() // 3
