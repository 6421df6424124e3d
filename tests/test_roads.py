"""Roads: how many files of the package one steady step passes, that nobody lengthens one unseen.

A file counts where a function of it is called, by whichever thread. `python tests/test_roads.py`
lists them.
"""

from __future__ import annotations

import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from ps.servers import serving
from ps.workers import backward, batch, make_model
from ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import topq_dist
from topq_dist import register_topq_hook
from topq_dist.ps import ParameterServerOptimizer

PACKAGE = f"{Path(topq_dist.__file__).parent}/"
STEADY = 4
MOST_OF_A_BUCKET = 48
MOST_OF_A_STEP = 78
# what works beside the steps, and on none of them
ASIDE = ("snapshot", "lease", "watchdog", "notice")


class Road:
    """The files that calls have been made to, while `open`."""

    def __init__(self) -> None:
        self.open = False
        self.files: dict[str, set[str]] = {}

    def saw(self, frame: FrameType, event: str, _: Any) -> None:
        if not self.open or event != "call" or not frame.f_code.co_filename.startswith(PACKAGE):
            return
        if not any(word in threading.current_thread().name for word in ASIDE):
            name = frame.f_code.co_filename.removeprefix(PACKAGE)
            self.files.setdefault(name, set()).add(frame.f_code.co_name)

    def walk(self, step: Callable[[], object]) -> None:
        self.open = True
        sys.setprofile(self.saw)
        try:
            step()
        finally:
            sys.setprofile(None)
            self.open = False

    def listed(self) -> dict[str, str]:
        return {name: " ".join(sorted(calls)) for name, calls in sorted(self.files.items())}


def of_buckets(_: int) -> dict[str, str]:
    """Return the files of a backward pass of one bucket, all-gathered as everybody has it."""
    torch.manual_seed(1)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 8)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    register_topq_hook(model, optimizer, exchange="allgather")
    road = Road()
    for step in range(STEADY + 1):
        optimizer.zero_grad()
        loss = model(torch.randn(4, 300)).square().mean()
        if step == STEADY:
            road.walk(loss.backward)
        else:
            loss.backward()
        optimizer.step()
    return road.listed()


def of_servers_step(folder: Path) -> dict[str, str]:
    """Return the files of a step of a worker alone: its own, and those of its server."""
    road = Road()
    threading.setprofile(road.saw)
    try:
        training = {"inner_opt": "adamw", "options": {"lr": 0.01}}
        model = make_model()
        with (
            serving(folder, training) as server,
            ParameterServerOptimizer(model.named_parameters(), str(server.address)) as optimizer,
        ):
            for step in range(STEADY + 1):
                optimizer.zero_grad()
                backward(model, [batch(0, step)])
                if step == STEADY:
                    road.walk(optimizer.step)
                else:
                    optimizer.step()
    finally:
        threading.setprofile(None)
    return road.listed()


@pytest.mark.gloo
def test_of_a_bucket(tmp_path: Path) -> None:
    for passed in run_ranks(2, of_buckets, tmp_path):
        assert {"hook/pipeline.py", "compress/compressor.py"} <= passed.keys()
        assert len(passed) <= MOST_OF_A_BUCKET, passed


def test_of_a_servers_step(tmp_path: Path) -> None:
    passed = of_servers_step(tmp_path)
    assert {"ps/client/optimizer.py", "ps/server/service.py"} <= passed.keys()
    assert len(passed) <= MOST_OF_A_STEP, passed


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for title, files in (
            ("a bucket", run_ranks(2, of_buckets, Path(folder) / "ranks")[0]),
            ("a step of a server", of_servers_step(Path(folder) / "state")),
        ):
            print(f"{title}: {len(files)} files")
            for name, calls in files.items():
                print(f"    {name}: {calls}")
