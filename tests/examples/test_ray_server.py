"""The example of Ray must start its shards and workers, learn, send little, and end its servers.

A local Ray starts a dozen processes: it is run alone on the machine, by `pytest -m ray`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from trainer_recipes import environment

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.gloo, pytest.mark.ray, pytest.mark.timeout(900)]


def test_two_shards_and_two_workers_on_a_local_ray() -> None:
    # Ray of its own environment, the server's dependencies of this one
    (packages,) = environment("ray").parents[1].glob("lib/python*/site-packages")
    path = os.pathsep.join([str(ROOT), str(packages)])
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "ray_server.py")],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"[\d.]+:\d+", done.stdout)) >= 2
    losses = re.findall(r"loss ([\d.]+), then ([\d.]+), (\d+) times fewer", done.stdout)
    assert len(losses) == 2
    for first, last, ratio in losses:
        assert float(last) < float(first) / 10
        assert int(ratio) > 30
