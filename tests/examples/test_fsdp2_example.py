"""The example of fully_shard must run on 2 x 2 ranks, learn, and send little."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from forked_scripts import ranks_of, run_scripts

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "fsdp2.py"


@pytest.mark.gloo
def test_two_replicas_of_two_shards() -> None:
    said, *others = run_scripts(ranks_of(EXAMPLE, 4))
    assert others == [""] * 3
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", said)]
    assert losses[-1] < losses[0] / 20
    found = re.search(r"(\d+) times fewer", said)
    assert found is not None
    assert int(found[1]) > 30
