"""The example of a worker with local steps must run, learn, and send little."""

from __future__ import annotations

import re
from pathlib import Path

from forked_scripts import Script, run_scripts
from server_process import ServerProcess

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "server_local_steps.py"


def test_two_workers(tmp_path: Path) -> None:
    training = {"inner_opt": "sgd", "options": {"lr": 1.0}}
    serving = {"start_workers": 2}
    with ServerProcess(tmp_path / "state", training, serving) as server:
        workers = [Script(path=EXAMPLE, words=(server.address, name)) for name in ("a", "b")]
        said = run_scripts(workers)
    for output in said:
        losses = [float(loss) for loss in re.findall(r"step \d+: loss ([\d.]+)", output)]
        assert losses[-1] < losses[0] / 3
        found = re.search(r"(\d+) times fewer", output)
        assert found is not None
        assert int(found[1]) > 200
