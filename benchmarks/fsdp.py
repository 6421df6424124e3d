"""Accuracy and bytes between replicas: the hook under fully_shard beside the same in DDP.

    python benchmarks/fsdp.py
    python benchmarks/fsdp.py --tasks digits-sgd --steps 300 --seeds 0 1 2
    python benchmarks/fsdp.py --show benchmarks/results/fsdp.json

Trains a task on gloo ranks with the same batches whatever the way: all-reduced whole under
fully_shard (to the bits of native HSDP), with the hook under fully_shard on a mesh of replicas x
shards, and with the hook on DistributedDataParallel, of a rank a replica or of as many ranks.
Prints a table and writes fsdp.json. Data are those of benchmarks/convergence.py.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).with_name("experiments")))

import torch
import torch.distributed as dist
from emulated_ranks import make_scheduler
from harness.console import integer_from, option_parser, say, text_table, write_report
from tasks import TASKS, Batches, Task, evaluate, load_data, loss_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

from topq_dist import register_topq_hook

ALLGATHER: dict[str, Any] = {"exchange": "allgather"}
CORRECTED: dict[str, Any] = {**ALLGATHER, "momentum": "corrected"}
# by name: the wrapper, and knobs of the hook beside q. "replica" is DistributedDataParallel on one
# rank for each replica, which takes the batches of all of its shards: as many frames, of that mean
WAYS: dict[str, tuple[Literal["fsdp", "ddp", "replica"], dict[str, Any]]] = {
    "fully_shard, all-reduced whole": ("fsdp", {"exchange": "dense"}),
    "fully_shard, the hook": ("fsdp", ALLGATHER),
    "DDP, a rank a replica, the hook": ("replica", ALLGATHER),
    "DDP, as many ranks, the hook": ("ddp", ALLGATHER),
    "fully_shard, momentum corrected": ("fsdp", CORRECTED),
    "DDP, a rank a replica, momentum corrected": ("replica", CORRECTED),
}
MOMENTUM = 0.9


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run; replicas and shards: of the mesh. `ranks` train it, each on `batches` of a step."""

    task: str
    way: str
    seed: int
    q: float
    steps: int
    replicas: int
    shards: int

    @property
    def ranks(self) -> int:
        """Processes."""
        return self.replicas * self.shards // self.batches

    @property
    def batches(self) -> int:
        """Batches of the task that one process has in a step."""
        return self.shards if WAYS[self.way][0] == "replica" else 1


def main() -> None:
    parser = option_parser(__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["digits-sgd", "gpt-moby"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS)[:4])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=integer_from(1), default=300)
    parser.add_argument("--q", type=float, default=0.99)
    parser.add_argument("--replicas", type=integer_from(1), default=2)
    parser.add_argument("--shards", type=integer_from(1), default=2)
    parser.add_argument("--show", type=Path, help="print the table of a report, and train nothing")
    options = parser.parse_args()
    if options.show is not None:
        print(table(json.loads(options.show.read_text())["rows"]))
        return
    rows = []
    for task in options.tasks:
        for seed in options.seeds:
            for way in options.ways:
                run = Run(
                    task=task,
                    way=way,
                    seed=seed,
                    q=options.q,
                    steps=options.steps,
                    replicas=options.replicas,
                    shards=options.shards,
                )
                rows.append(asdict(run) | trained(run))
                say(f"{task}, seed {seed}, {way}: {rows[-1]['quality']:.3f}")
                write_report(options.out, "fsdp", {"rows": rows})
    print(table(rows))


def trained(run: Run) -> dict[str, float]:
    """Train one run in processes of its own, and return what it came to."""
    began_s = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="topq-fsdp-") as folder:
        start_processes(  # type: ignore[no-untyped-call]
            train_rank,
            args=(run, folder),
            nprocs=run.ranks,
            start_method="spawn",
        )
        result: dict[str, float] = json.loads((Path(folder) / "result.json").read_text())
    return result | {"wall_s": time.perf_counter() - began_s}


def train_rank(rank: int, run: Run, folder: str) -> None:
    """Train one rank; the first writes result.json: quality, wire_bytes, dense_bytes, steps."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", store=dist.FileStore(f"{folder}/store", run.ranks), rank=rank, world_size=run.ranks
    )
    task = TASKS[run.task]
    data = load_data(task)
    torch.manual_seed(run.seed)
    model = task.model(data)
    wrapper, knobs = WAYS[run.way]
    if wrapper == "fsdp":
        names = ("replicate", "shard")
        mesh = init_device_mesh("cpu", (run.replicas, run.shards), mesh_dim_names=names)
        layers = next(one for one in model.modules() if isinstance(one, nn.Sequential))
        for layer in layers:
            if any(True for _ in layer.parameters()):
                fully_shard(layer, mesh=mesh["shard"])
        fully_shard(model, mesh=mesh["shard"])
        knobs = {**knobs, "replicate_group": mesh.get_group("replicate")}
        wrapped = model
    else:
        wrapped = DistributedDataParallel(model)
    optimizer = task.make_optimizer(model, lr=task.lr, momentum=MOMENTUM)
    state = register_topq_hook(wrapped, optimizer, q=run.q, **knobs)
    scheduler = make_scheduler(task, optimizer, run.steps)
    batches = Batches(task, data, seed=run.seed, workers=run.ranks * run.batches, steps=run.steps)
    for step in range(run.steps):
        mine = [batches.take(step, rank * run.batches + one) for one in range(run.batches)]
        inputs, targets = (torch.cat(several) for several in zip(*mine, strict=True))
        loss_of(wrapped, inputs, targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    whole = gathered(task, data, model)
    if rank == 0:
        stats = state.stats()
        result = {
            "quality": evaluate(task, whole, data, "test"),
            "wire_bytes": stats.wire_bytes,
            "dense_bytes": stats.dense_bytes,
        }
        (Path(folder) / "result.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def gathered(task: Task, data: Any, model: nn.Module) -> nn.Module:
    """Return the model whole, as one that no wrapper holds; a collective."""
    whole = task.model(data)
    tensors = {
        name: one.full_tensor() if isinstance(one, DTensor) else one
        for name, one in model.state_dict().items()
    }
    whole.load_state_dict(tensors)
    return whole


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return quality and the bytes that a rank puts on its link to other replicas in a step, means
    over the seeds, as plain text."""
    lines: dict[str, list[str]] = {}
    for task, steps in dict.fromkeys((row["task"], row["steps"]) for row in rows):
        mine = [row for row in rows if (row["task"], row["steps"]) == (task, steps)]
        for way in dict.fromkeys(row["way"] for row in mine):
            runs = [row for row in mine if row["way"] == way]
            qualities = [row["quality"] for row in runs]
            a_step = [row["wire_bytes"] / steps for row in runs]
            lines[f"{task}, {steps} steps, {way}"] = [
                f"{statistics.fmean(qualities):.3f}",
                " ".join(f"{one:.3f}" for one in qualities),
                f"{statistics.fmean(a_step) / 1e3:.1f} kB",
            ]
    heads = ("quality, mean", "seed by seed", "between replicas a step")
    return text_table("per cent or nats on test data", heads, lines)


if __name__ == "__main__":
    main()
