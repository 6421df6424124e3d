"""The example of a server with local steps must run, learn, and send little."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "server_local_steps.py"


def test_a_server_and_two_workers() -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for worker in ("w0", "w1"):
        found = re.findall(rf"{worker}, step \d+: loss ([\d.]+)", done.stdout)
        losses = [float(loss) for loss in found]
        assert losses[-1] < losses[0] / 3
    ratios = [int(ratio) for ratio in re.findall(r"(\d+) times fewer", done.stdout)]
    assert len(ratios) == 2
    assert min(ratios) > 200
