"""The example of local steps must run, learn, and send little: on one machine, and on two hosts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from harness.netns import HostsError, hosts, missing_requirement

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "local_two_sites.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.gloo
def test_two_sites_of_two_processes() -> None:
    done = subprocess.run(
        [*TORCHRUN, "--standalone", "--nproc-per-node", "4", str(EXAMPLE)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    _assert_learned(done.stdout)


@pytest.mark.gloo
def test_two_hosts_on_100_mbit() -> None:
    if (reason := missing_requirement()) is not None:
        pytest.skip(reason)
    try:
        with hosts(2, rate="100mbit") as made:
            running = [
                subprocess.Popen(
                    made.command(node, [*TORCHRUN, *_node(node), str(EXAMPLE)]),
                    env={**ENVIRONMENT, "GLOO_SOCKET_IFNAME": "eth0"},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
                for node in range(len(made))
            ]
            said = [process.communicate(timeout=150) for process in running]
    except HostsError as error:
        pytest.skip(str(error))
    assert [process.returncode for process in running] == [0, 0], said
    _assert_learned(said[0][0])


def _node(rank: int) -> list[str]:
    address = ["--master-addr", "10.77.0.1", "--master-port", "29500"]
    return ["--nnodes", "2", "--nproc-per-node", "2", "--node-rank", str(rank), *address]


def _assert_learned(output: str) -> None:
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", output)]
    assert losses[-1] < losses[0] / 3
    found = re.search(r"(\d+) times fewer", output)
    assert found is not None
    assert int(found[1]) > 200
