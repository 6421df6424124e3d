"""Every kernel as it is launched compiles for three targets, without a spilled register."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_cases import Rank, check_step
from interpreted import LAUNCHES, Launch

from topq_dist.compress.gpu.memory import Arena
from topq_dist.compress.sparsify.segments import Segment, Segments
from topq_dist.dtypes import accumulate_dtype

# a minute where there is one core for it
pytestmark = pytest.mark.timeout(600)
COMPILER = Path(__file__).parents[3] / "gpu_compiled.py"


# value format, dtype and bound
STEPS = [("int2", torch.float32, 1.0), ("fp16", torch.bfloat16, 1.0)]
ALL = ["sm_80", "sm_90", "gfx942"]
# those whose threads are as many as elements of the vector
LARGE = {"find_candidates", "take_up", "round_total"}


def launches() -> list[Launch]:
    """Return each kernel once for each set of constants that steps have launched it with."""
    segments = Segments(Segment(start=start, rows=1, row_numel=1000, k=200) for start in (0, 1000))
    generator = torch.Generator().manual_seed(0)
    LAUNCHES.clear()
    for fmt, dtype, bound in STEPS:
        arena = Arena()
        gradient = torch.randn(2000, generator=generator).to(dtype)
        kept = torch.randn(2000, generator=generator).to(accumulate_dtype(dtype))
        rank = Rank(arena, kept)
        assert check_step([rank], [gradient], segments, fmt, bound, None, arena)
    distinct = {(one.name, str(one.constants)): one for one in LAUNCHES}
    return list(distinct.values())


@pytest.fixture(scope="module")
def reports() -> list[dict[str, Any]]:
    asked = [
        one._asdict() | {"targets": ALL if one.constants.get("KIND", 2) == 2 else ALL[1:2]}
        for one in launches()
    ]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, COMPILER],
        input=json.dumps(asked),
        env=environment | {"PYTHONPATH": str(COMPILER.parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    assert len(found) == sum(len(one["targets"]) for one in asked)
    return found


def test_no_register_is_spilled(reports: list[dict[str, Any]]) -> None:
    assert {report["target"] for report in reports} == set(ALL)
    assert [report for report in reports if any(report["spilled"]) or not report["spilled"]] == []


def test_registers_and_shared_memory_leave_room_for_many_programs(
    reports: list[dict[str, Any]],
) -> None:
    assert {report["kernel"] for report in reports} >= LARGE
    for report in reports:
        # a multiprocessor has 65,536: of threads with eight elements each, so many are at work
        threads = 65_536 // report["registers"]
        assert threads >= (768 if report["kernel"] in LARGE else 256), report
    assert max(report["shared_bytes"] for report in reports) <= 8192
