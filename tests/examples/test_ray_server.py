"""The example of Ray must start its shards and workers, learn, send little, and end its servers."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="wants ray: pip install ray")
def test_two_shards_and_two_workers_on_a_local_ray() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "ray_server.py")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"[\d.]+:\d+", done.stdout)) >= 2
    losses = re.findall(r"loss ([\d.]+), then ([\d.]+), (\d+) times fewer", done.stdout)
    assert len(losses) == 2
    for first, last, ratio in losses:
        assert float(last) < float(first) / 10
        assert int(ratio) > 30
