"""The unit of systemd and the script of Slurm: read by systemd itself, and run on two processes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from topq_dist.ps.cli.commands import topq

ROOT = Path(__file__).resolve().parents[2]
UNIT = ROOT / "deploy" / "systemd" / "topq.service"
SBATCH = ROOT / "deploy" / "slurm" / "topq.sbatch"
SRUN = """#!/bin/bash
# two tasks, each on a node of its own
while [[ $1 == --* ]]; do shift; done
for task in 0 1; do SLURM_PROCID=$task "$@" & tasks+=($!); done
failed=0
for task in "${tasks[@]}"; do wait "$task" || failed=1; done
exit $failed
"""
SCONTROL = """#!/bin/bash
[ "$*" = "show hostnames node[1-2]" ] && echo 127.0.0.1 && sleep 0.3 && echo node2
"""
JOB = """
import sys
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
print(f"{sys.argv[1]} of rank {dist.get_rank()}: {int(total)} ranks", flush=True)
dist.destroy_process_group()
"""


def verified(unit: Path, text: str) -> str:
    """Return what systemd has against a unit."""
    tool = shutil.which("systemd-analyze")
    if tool is None:
        pytest.skip("wants systemd-analyze")
    # it looks for what is to be started
    unit.write_text(text.replace("/opt/topq/bin/topq", sys.executable))
    done = subprocess.run([tool, "verify", str(unit)], capture_output=True, text=True, check=False)
    return "\n".join(line for line in done.stderr.splitlines() if unit.name in line)


def test_systemd_knows_every_word_of_the_unit(tmp_path: Path) -> None:
    text = UNIT.read_text()
    assert verified(tmp_path / "topq.service", text) == ""
    wrong = text.replace("LimitNOFILE=", "LimitNOFIEL=")
    assert "LimitNOFIEL" in verified(tmp_path / "topq.service", wrong)


def test_the_units_variables_are_options_of_topq_serve() -> None:
    named = set(re.findall(r"\bTOPQ_\w+(?==)", UNIT.read_text()))
    known = {str(one.envvar) for one in topq.commands["serve"].params}
    assert len(named) > 3
    assert named <= known


def test_slurm_runs_a_job_on_all_nodes(tmp_path: Path) -> None:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        path = tmp_path / name
        path.write_text(text)
        path.chmod(0o755)
    job = tmp_path / "job.py"
    job.write_text(JOB)
    slurm = {"JOB_ID": str(os.getpid()), "JOB_NODELIST": "node[1-2]", "JOB_NUM_NODES": "2"}
    done = subprocess.run(
        ["/bin/bash", str(SBATCH), str(job), "the word"],
        env={
            **os.environ,
            **{f"SLURM_{name}": value for name, value in slurm.items()},
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = sorted(re.findall(r"the word of rank \d: \d ranks", done.stdout))
    assert said == ["the word of rank 0: 2 ranks", "the word of rank 1: 2 ranks"]


def test_slurm_without_a_script_says_what_it_wants() -> None:
    done = subprocess.run(["/bin/bash", str(SBATCH)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "topq.sbatch: expected a training script and its arguments\n"
