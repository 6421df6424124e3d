"""Runs examples/many_machines.py, and keeps the residuals that each start saw.

    watched_job.py FOLDER SEED STEPS TIMEOUT_S [dense]

In the folder, beside the checkpoint: `saved-STEP-RANK.pt`, residuals as they were in it,
`resumed-STEP-RANKS-RANK.pt` as they are on the ranks that went on, and in `master` the address of
rank 0. While there is a file `slow`, steps are so from a quarter of them on.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from examples import many_machines
from topq_dist import TopQState

SLOW, MASTER = "slow", "master"
SLOW_STEP_S = 0.2
_resume, _samples = many_machines.resume, many_machines.samples


def resume(path: Path, model: nn.Module, optimizer: Any, state: TopQState | None) -> int:
    """Resume as the example does, and write down the residuals of before and after."""
    path.with_name(MASTER).write_text(os.environ["MASTER_ADDR"])
    step = _resume(path, model, optimizer, state)
    if step > 0 and state is not None:
        own = state.state_dict()["residuals"]
        torch.save(
            own, path.with_name(f"resumed-{step}-{dist.get_world_size()}-{dist.get_rank()}.pt")
        )
        saved = torch.load(path, weights_only=True)["topq"]["ranks"]
        for rank, one in enumerate(saved if dist.get_rank() == 0 else ()):
            torch.save(one["residuals"], path.with_name(f"saved-{step}-{rank}.pt"))
    return step


def samples(step: int, count: int) -> Tensor:
    """Return what the example does, after a while where steps are to be slow."""
    if step >= many_machines.STEPS // 4 and Path(sys.argv[1], SLOW).exists():
        time.sleep(SLOW_STEP_S)
    return _samples(step, count)


if __name__ == "__main__":
    folder, seed, steps, timeout_s = sys.argv[1:5]
    many_machines.SEED, many_machines.STEPS = int(seed), int(steps)
    many_machines.TIMEOUT_S = float(timeout_s)
    many_machines.resume, many_machines.samples = resume, samples
    torch.set_num_threads(1)
    many_machines.main(Path(folder) / "checkpoint.pt", dense="dense" in sys.argv[5:])
