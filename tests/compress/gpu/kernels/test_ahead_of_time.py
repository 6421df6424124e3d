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
from interpreted import LAUNCHES, Launch

from topq_dist.compress.gpu.memory import Arena
from topq_dist.compress.gpu.select import DeviceSelector
from topq_dist.compress.sparsify.segments import Segment, Segments

COMPILER = Path(__file__).parents[3] / "gpu_compiled.py"


def launches() -> list[Launch]:
    """Return each kernel once for each set of constants that a step has launched it with."""
    segments = Segments([Segment(start=0, rows=1, row_numel=2000, k=20)])
    LAUNCHES.clear()
    DeviceSelector(Arena()).select(torch.randn(2000), torch.randn(2000), segments)
    distinct = {(one.name, str(one.constants)): one for one in LAUNCHES}
    return list(distinct.values())


@pytest.fixture(scope="module")
def reports() -> list[dict[str, Any]]:
    asked = [one._asdict() for one in launches()]
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
    assert len(found) == 3 * len(asked)
    return found


def test_no_register_is_spilled(reports: list[dict[str, Any]]) -> None:
    assert {report["target"] for report in reports} == {"sm_80", "sm_90", "gfx942"}
    assert [report for report in reports if any(report["spilled"]) or not report["spilled"]] == []


def test_registers_and_shared_memory_leave_room_for_many_programs(
    reports: list[dict[str, Any]],
) -> None:
    # half of the 2,048 threads of a multiprocessor have 64 registers each, and 1,024 of a compute
    # unit of the hip target 128
    most = {"sm_80": 64, "sm_90": 64, "gfx942": 128}
    many = [report for report in reports if report["registers"] > most[report["target"]]]
    assert many == []
    assert max(report["shared_bytes"] for report in reports) <= 8192
