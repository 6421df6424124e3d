"""The example of a worker with local steps must run, learn, and send little."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from server_process import ServerProcess

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "server_local_steps.py"


def test_two_workers(tmp_path: Path) -> None:
    training = {"inner_opt": "sgd", "options": {"lr": 1.0}}
    serving = {"start_workers": 2}
    with ServerProcess(tmp_path / "state", training, serving) as server:
        workers = [
            subprocess.Popen(
                [sys.executable, str(EXAMPLE), server.address, name],
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for name in ("a", "b")
        ]
        said = [worker.communicate(timeout=150) for worker in workers]
    for worker, (output, errors) in zip(workers, said, strict=True):
        assert worker.returncode == 0, errors
        losses = [float(loss) for loss in re.findall(r"step \d+: loss ([\d.]+)", output)]
        assert losses[-1] < losses[0] / 3
        found = re.search(r"(\d+) times fewer", output)
        assert found is not None
        assert int(found[1]) > 200
