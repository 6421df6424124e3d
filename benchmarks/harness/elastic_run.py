"""Ranks of an elastic run that are killed and come back, and what each had after every step."""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from topq_dist import Elastic, LocalTopQ, register_topq_hook
from topq_dist.elastic.store import serve

WIDTH = 48
_POLL_S = 0.02


class Line(NamedTuple):
    """A line of a rank after an inner step: a digest of what must be alike, and who was in."""

    at_s: float
    step: int
    exchanged: str
    members: str


class Kill(NamedTuple):
    """A rank killed, and how long it took until the last of the others had a round that counts."""

    name: str
    recovered_s: float
    returned_s: float


def model_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, 4)
    )


class LocalRank:
    """A rank with LocalTopQ."""

    def __init__(self, elastic: Elastic, options: dict[str, Any]) -> None:
        self.model = model_of(int(elastic.name))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.state = LocalTopQ(self.model, self.optimizer, elastic=elastic, **options)
        self.step = self.state.step
        self.end = self.state.synchronize

    def exchanged(self) -> dict[str, torch.Tensor]:
        """Return what is alike on all ranks after every step: the outer parameters."""
        outer: dict[str, torch.Tensor] = self.state.state_dict()["outer"]
        return outer

    def whole(self) -> dict[str, torch.Tensor]:
        """Return what is alike on all ranks at the end."""
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}


class HookRank:
    """A rank with the hook of DistributedDataParallel; buffers are each rank's own."""

    def __init__(self, elastic: Elastic, options: dict[str, Any]) -> None:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        module = model_of(int(elastic.name))
        self.model = DistributedDataParallel(module)
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
        self.state = register_topq_hook(self.model, self.optimizer, elastic=elastic, **options)
        self.step = self.optimizer.step

    def exchanged(self) -> dict[str, torch.Tensor]:
        """Return what is alike on all ranks after every step: the parameters."""
        return {name: one.detach().clone() for name, one in self.model.module.named_parameters()}

    whole = exchanged

    def end(self) -> None:
        """Do nothing: ranks are alike."""


KINDS: dict[str, type[LocalRank | HookRank]] = {"local": LocalRank, "hook": HookRank}
_USUAL: dict[str, dict[str, Any]] = {
    "local": {"every": 2, "q": 0.9},
    "hook": {"exchange": "allgather", "q": 0.9},
}


def train(folder: Path, kind: str, elastic: Elastic, pause_s: float, options: Any) -> None:
    """Train until the folder says at which step to stop, with a line after each step."""
    torch.set_num_threads(1)
    rank = KINDS[kind](elastic, _USUAL[kind] | options)
    state, stop = rank.state, folder / "stop"
    with (folder / f"{elastic.name}.{os.getpid()}.lines").open("w") as lines:
        _write(lines, rank)
        while not (stop.exists() and state.steps_taken >= int(stop.read_text())):
            torch.manual_seed(1000 * state.steps_taken + int(elastic.name))
            rank.optimizer.zero_grad()
            loss = nn.functional.mse_loss(rank.model(torch.randn(8, WIDTH)), torch.randn(8, 4))
            loss.backward()  # type: ignore[no-untyped-call]
            time.sleep(pause_s)
            rank.step()
            _write(lines, rank)
    rank.end()
    lost = [one.member for one in state.lost_residuals]
    torch.save({"model": rank.whole(), "lost": lost}, folder / f"{elastic.name}.end")
    state.close()
    # in Python's shutdown torch's gloo threads abort one process in a hundred
    os._exit(0)


def _write(lines: Any, rank: LocalRank | HookRank) -> None:
    digest = hashlib.sha256()
    for tensor in rank.exchanged().values():
        digest.update(tensor.numpy().tobytes())
    state = rank.state
    members = "-".join(state.members)
    lines.write(f"{time.time()} {state.steps_taken} {digest.hexdigest()[:16]} {members}\n")
    lines.flush()


class ElasticRun:
    """Three ranks or more, in processes of their own, and the store that outlives them."""

    def __init__(
        self,
        folder: Path,
        *,
        kind: str = "local",
        ranks: int = 3,
        lease_s: float = 5.0,
        pause_s: float = 0.01,
        context: Any = None,
        **options: Any,
    ) -> None:
        self.folder = folder
        self._context = context or _forked()
        self._store: dist.TCPStore = serve("127.0.0.1:0")
        self._lease_s = lease_s
        self._ranks = ranks
        self._pause_s = pause_s
        self._per_node = int(options.get("ranks_per_node", 1))
        self._kind = kind
        self._options = options
        self.names = [str(rank) for rank in range(ranks)]
        self._processes: dict[str, BaseProcess] = {name: self._started(name) for name in self.names}

    def _started(self, name: str) -> BaseProcess:
        elastic = Elastic(
            store=f"127.0.0.1:{self._store.port}",
            name=name,
            ranks=self._ranks,
            lease_s=self._lease_s,
        )
        arguments = (self.folder, self._kind, elastic, self._pause_s, self._options)
        process: BaseProcess = self._context.Process(target=train, args=arguments)
        process.start()
        return process

    def kill_and_return(self, name: str, after_s: float) -> Kill:
        """Kill a rank at a moment of its own, wait for the others to go on, and start it anew."""
        self._wait_until(lambda: all(len(self._last(one)) > 1 for one in self.names), "start")
        time.sleep(after_s)
        process = self._processes[name]
        # SIGKILL
        process.kill()
        killed_s = time.time()
        process.join()
        # with a rank its node is out
        node = int(name) // self._per_node
        others = [one for one in self.names if int(one) // self._per_node != node]
        self._wait_until(
            lambda: all(self._counted_without(name, one, killed_s) for one in others), "go on"
        )
        recovered_s = max(self._counted_without(name, one, killed_s) for one in others) - killed_s
        began_s = time.time()
        self._processes[name] = self._started(name)
        whole = "-".join(self.names)
        self._wait_until(
            lambda: all(
                bool(lines) and lines[-1].members == whole and lines[-1].at_s > began_s
                for lines in map(self._last, self.names)
            ),
            "take it in",
        )
        return Kill(name, recovered_s, time.time() - began_s)

    def _counted_without(self, lost: str, name: str, since_s: float) -> float:
        """Return when a rank had its first round without the one that is lost; 0 where not yet."""
        lines = self._last(name)
        for before, line in itertools.pairwise(lines):
            without = lost not in line.members.split("-")
            if line.at_s > since_s and without and line.exchanged != before.exchanged:
                return line.at_s
        return 0.0

    def end(self) -> dict[str, Any]:
        """Have all ranks end at the same step; return what each had at the end, by name."""
        latest = max(line.step for line in self.lines())
        (self.folder / "stop.new").write_text(str(latest + 40))
        (self.folder / "stop.new").rename(self.folder / "stop")
        for process in self._processes.values():
            process.join(120)
        return {
            name: torch.load(self.folder / f"{name}.end", weights_only=True) for name in self.names
        }

    def disagreements(self) -> list[str]:
        """Return steps after which two ranks had other parameters, with digests of them."""
        found: dict[int, set[str]] = {}
        for line in self.lines():
            found.setdefault(line.step, set()).add(line.exchanged)
        return [f"step {step}: {ends}" for step, ends in sorted(found.items()) if len(ends) > 1]

    def lines(self) -> Iterator[Line]:
        """Yield every line of every process."""
        for path in self.folder.glob("*.lines"):
            yield from read_lines(path)

    def _last(self, name: str) -> list[Line]:
        process = self._processes[name]
        path = self.folder / f"{name}.{process.pid}.lines"
        return read_lines(path) if path.exists() else []

    def _wait_until(self, condition: Any, what: str, patience_s: float = 120.0) -> None:
        ends_s = time.monotonic() + patience_s
        while not condition():
            dead = [name for name, one in self._processes.items() if one.exitcode not in (None, -9)]
            if dead or time.monotonic() > ends_s:
                raise RuntimeError(f"ranks did not {what}; ended: {dead}")
            time.sleep(_POLL_S)

    def stop(self) -> None:
        """Kill what is still there."""
        for process in self._processes.values():
            if process.is_alive():
                process.kill()
            process.join()


def _forked() -> Any:
    """Return a context whose processes start in a fraction of a second: they find torch loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["harness.elastic_run", "topq_dist.local.local_topq", "torch._dynamo"]
    )
    return context


def read_lines(path: Path) -> list[Line]:
    # the last line may be under way, or cut off where its writer was killed
    whole = path.read_text().split("\n")[:-1]
    fields = [line.split(" ") for line in whole]
    return [Line(float(at_s), int(step), digest, who) for at_s, step, digest, who in fields]


def random_kills(run: ElasticRun, count: int, seed: int) -> Iterator[Kill]:
    """Kill ranks that are drawn, at moments that are, one after the other."""
    draw = random.Random(seed)
    for _ in range(count):
        yield run.kill_and_return(draw.choice(run.names), draw.uniform(0.0, 1.0))
