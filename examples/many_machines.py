"""Training on several machines, any of which may be lost: it goes on, on those that are left.

    torchrun --nnodes 1:2 --nproc-per-node 1 --max-restarts 9 --rdzv-backend c10d \\
        --rdzv-endpoint HEAD:29400 --rdzv-conf is_host=0 examples/many_machines.py FOLDER

on each machine, with FOLDER on a file system that all see; docs/many_machines.md says what to
start on HEAD. With a second word, "dense", it trains without top-Q.
"""

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from topq_dist import TopQState, register_topq_hook

SEED, STEPS, RATE = 0, 600, 0.05
BATCH = 64  # of all ranks together, however many there are
TIMEOUT_S = 15.0  # how long a rank waits for one whose machine is gone without a word


def save(path: Path, step: int, model: nn.Module, optimizer: Any, state: TopQState | None) -> None:
    topq = state.state_dict(all_ranks=True) if state else {}  # a collective; rank 0 has them all
    if dist.get_rank() == 0:
        content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({"step": step, "topq": topq, **content}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)  # whole, or the one before


def resume(path: Path, model: nn.Module, optimizer: Any, state: TopQState | None) -> int:
    if not path.exists():
        return 0
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    if state:
        state.load_state_dict(saved["topq"])  # of however many ranks there were
    return int(saved["step"])


def samples(step: int, count: int) -> Tensor:
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1000 * SEED + step))
    return order[:BATCH][dist.get_rank() :: dist.get_world_size()]


def main(path: Path, *, dense: bool) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_S))
    images, digits = load_digits(return_X_y=True)
    inputs, targets = torch.from_numpy(images).float() / 16, torch.from_numpy(digits).long()
    train = torch.arange(len(inputs)) % 2 == 0
    torch.manual_seed(SEED)
    layers = nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    model = DistributedDataParallel(nn.Sequential(*layers))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    # by name: with "auto", each start would try the exchanges anew
    state = None if dense else register_topq_hook(model, optimizer, exchange="allgather")
    first = resume(path, model.module, optimizer, state)
    if dist.get_rank() == 0:
        print(f"step {first}: a world of {dist.get_world_size()}", flush=True)
    for step in range(first, STEPS):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        mine = samples(step, int(train.sum()))
        optimizer.zero_grad()
        loss: Any = nn.functional.cross_entropy(model(inputs[train][mine]), targets[train][mine])
        loss.backward()
        optimizer.step()
        if (step + 1) % 50 == 0:
            save(path, step + 1, model.module, optimizer, state)
    if dist.get_rank() == 0:
        right = (model.module(inputs[~train]).argmax(1) == targets[~train]).double().mean()
        print(f"{100 * right.item():.2f} % of the test part right after {STEPS} steps", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]) / "checkpoint.pt", dense="dense" in sys.argv[2:])
