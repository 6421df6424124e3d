"""Two hosts under torchrun, of which the one with rank 0 is lost and comes back."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from harness.netns import HostsError, hosts, missing_requirement
from lost_host import POINTS_BELOW, ROUNDING, Job, dense, disturbed, script

STEPS = 400
# shorter than those of docs/many_machines.md, for a test to be quick
SHORT = "is_host=0,keep_alive_interval=1,last_call_timeout=2"


@pytest.mark.gloo
@pytest.mark.timeout(600)
def test_a_host_is_lost_and_comes_back_with_what_was_not_sent_and_dense_accuracy(
    tmp_path: Path,
) -> None:
    reason = missing_requirement()
    if reason is not None:
        pytest.skip(reason)
    words = script(tmp_path, 0, STEPS, timeout_s=5.0)
    try:
        with hosts(3, rate="1gbit") as made, ThreadPoolExecutor(1) as beside:
            other = beside.submit(dense, 0, STEPS, tmp_path / "dense", ranks=1)
            found = disturbed(Job(made, tmp_path, words, SHORT), STEPS)
            undisturbed = other.result()
    except HostsError as error:
        pytest.skip(f"no network namespaces here: {error}")
    assert [ranks for _, ranks in found.starts] == [2, 1, 2]
    lost_at, back_at = (step for step, _ in found.starts[1:])
    assert STEPS // 4 <= lost_at < back_at < STEPS
    assert max(found.moved) < ROUNDING
    assert found.accuracy >= undisturbed.accuracy - POINTS_BELOW
