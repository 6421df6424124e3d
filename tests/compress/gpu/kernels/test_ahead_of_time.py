"""Every kernel as it is launched compiles for three targets, without a spilled register."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_cases import Rank, check_step
from interpreted import LAUNCHES, Launch

from topq_dist.compress import gpu
from topq_dist.compress.gpu.memory import Arena
from topq_dist.compress.sparsify.segments import Segment, Segments
from topq_dist.dtypes import accumulate_dtype

# a minute where there is one core for it
pytestmark = pytest.mark.timeout(600)
KERNEL = r"\b(?:kernels|bounds|checksum|frames|indices|values)\.((?!shape)[a-z_]+)\["
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
    every = launches()
    of_fp32 = {one.name for one in every if one.constants.get("KIND", 2) == 2}
    asked = [
        # half precision's kernels are those of fp32 once more, but for one
        one._asdict()
        | {
            "targets": ALL[1:2]
            if one.constants.get("KIND", 2) != 2 and one.name in of_fp32
            else ALL
        }
        for one in every
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


def test_every_kernel_is_compiled_for_every_target(reports: list[dict[str, Any]]) -> None:
    launched: set[str] = set()
    for path in Path(gpu.__file__).parent.glob("*.py"):
        launched |= set(re.findall(KERNEL, path.read_text()))
    assert len(launched) > 20
    wanted = {(kernel, target) for kernel in launched for target in ALL}
    assert wanted <= {(report["kernel"], report["target"]) for report in reports}


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
