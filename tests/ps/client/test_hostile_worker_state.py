"""A worker's state dict with something wrong in it: the promised error, and nothing changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mutants import mutants
from ps.servers import serving
from ps.workers import backward, batch, make_model

from topq_dist.ps import ParameterServerOptimizer
from topq_dist.ps.client.replay_log import ReplayLog
from topq_dist.ps.protocol.errors import WrongRunError
from topq_dist.ps.protocol.types import NewPush

# 10,000 take a minute
MUTANTS = 1_000


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("inner_opt", ["adamw", "sgd"])
def test_it_is_refused_whole_or_taken(tmp_path: Path, inner_opt: str) -> None:
    model = make_model()
    with (
        serving(tmp_path, {"inner_opt": inner_opt}, snapshot_every=1000) as server,
        ParameterServerOptimizer(
            model.named_parameters(), str(server.address), q=0.8, worker="a", timeout_s=30
        ) as optimizer,
    ):

        def step(number: int) -> None:
            optimizer.zero_grad()
            backward(model, [batch(0, number)])
            optimizer.step()

        for number in range(3):
            step(number)
        good = optimizer.state_dict()
        refused = 0
        for mutant in mutants(good, MUTANTS, seed=2):
            optimizer.load_state_dict(good)
            try:
                optimizer.load_state_dict(mutant)
            except (TypeError, ValueError, WrongRunError):
                refused += 1
                assert repr(optimizer.state_dict()) == repr(good)
        assert refused > MUTANTS / 2
        optimizer.load_state_dict(good)
        step(3)
        assert server.coordinator.status().point.version == 4


def test_a_far_number_takes_no_memory() -> None:
    empty: dict[str, Any] = {"next_sequence": 2**62, "pending": None, "applied": []}
    assert ReplayLog.from_state(empty).missing_at(1) is None
    with pytest.raises(ValueError, match="expected a whole number"):
        ReplayLog.from_state({**empty, "next_sequence": 2**64})


def test_a_push_under_way_is_finished_whatever_the_state_says_of_its_step(tmp_path: Path) -> None:
    model = make_model()
    with (
        serving(tmp_path, {"inner_opt": "sgd"}) as server,
        ParameterServerOptimizer(
            model.named_parameters(), str(server.address), worker="a", timeout_s=30
        ) as optimizer,
    ):
        (client,) = optimizer._clients
        client.begin(NewPush())
        state = optimizer.state_dict()
        assert not state["topq"]["open"]
        optimizer.load_state_dict(state)
        for version in (1, 2):
            optimizer.step()
            assert server.coordinator.status().point.version == version
