"""Ranks that are killed at any moment: the others go on, and they come back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from forked import FORKED
from harness.elastic_run import ElasticRun, random_kills

pytestmark = pytest.mark.gloo
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "streamed": {"every": 4, "fragments": 2, "overlap": 2, "outer_momentum": 0.5},
    "nodes": {"ranks": 4, "exchange": "hierarchical", "ranks_per_node": 2},
    "hook, nodes": {
        "kind": "hook",
        "ranks": 4,
        "exchange": "hierarchical",
        "ranks_per_node": 2,
    },
}


@pytest.mark.parametrize("case", CASES)
def test_the_others_go_on_and_the_one_that_comes_back_is_equal(case: str, tmp_path: Path) -> None:
    run = ElasticRun(tmp_path, lease_s=3.0, context=FORKED, **CASES[case])
    try:
        for kill in random_kills(run, 1, seed=len(case)):
            assert kill.recovered_s < 30.0
        ends = run.end()
    finally:
        run.stop()
    # no round has been applied on one rank and not on another
    assert run.disagreements() == []
    first = ends["0"]["model"]
    for end in ends.values():
        assert end["lost"] == ends["0"]["lost"]
        assert len(end["lost"]) >= 1
        for name, tensor in end["model"].items():
            assert torch.equal(tensor, first[name]), name
