"""Servers and workers that are killed: the run ends bit for bit as if they had not been."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import FORKED
from ps.servers import Options, serving
from ps.workers import backward, batch, make_model, side_by_side, values
from server_process import ServerProcess
from torch import Tensor

from topq_dist.ps import ParameterServerOptimizer

STEPS = 14
ADAMW: Options = {"inner_opt": "adamw", "options": {"lr": 0.01, "weight_decay": 0.1}}
Between = Callable[[int, int], None]


def train(
    servers: str | list[str], *, workers: int = 2, between: Between = lambda worker, step: None
) -> list[Tensor]:
    """Return what each worker holds after STEPS; `between` is called after each backward pass."""

    def work(worker: int) -> Tensor:
        return train_one(servers, worker, lambda step: between(worker, step))

    return side_by_side(workers, work)


def train_one(
    servers: str | list[str],
    worker: int,
    between: Callable[[int], None] = lambda step: None,
    checkpoint: Path | None = None,
) -> Tensor:
    """Train as one worker, from the checkpoint on where it is there; write it after step 3."""
    model = make_model()
    start = 0
    with ParameterServerOptimizer(
        model.named_parameters(), servers, q=0.8, worker=f"w{worker}", timeout_s=40
    ) as optimizer:
        if checkpoint is not None and checkpoint.exists():
            saved = torch.load(checkpoint, weights_only=True)
            optimizer.load_state_dict(saved["optimizer"])
            model.load_state_dict(saved["model"])
            start = saved["step"]
        for step in range(start, STEPS):
            if checkpoint is not None and step == 3:
                state = {"optimizer": optimizer.state_dict(), "model": model.state_dict()}
                torch.save({**state, "step": step}, checkpoint)
            optimizer.zero_grad()
            backward(model, [batch(worker, step)])
            between(step)
            optimizer.step()
    return values(model)


def undisturbed(folder: Path, training: Options, **options: Any) -> Tensor:
    with serving(folder / "undisturbed", training, **options) as server:
        first, *others = train(str(server.address))
    assert all(torch.equal(first, other) for other in others)
    return first


@pytest.mark.parametrize("downlink", ["exact", "topq"])
def test_a_server_killed_again_and_again(tmp_path: Path, downlink: str) -> None:
    own = {"q": 0.7} if downlink == "topq" else {}
    training = {**ADAMW, "downlink": downlink, **own}
    options: Options = {"start_workers": 2, "snapshot_every": 4}
    expected = undisturbed(tmp_path, training, **options)
    with ServerProcess(tmp_path / "state", training, options) as server:

        def between(worker: int, step: int) -> None:
            if worker == 0 and step in (2, 6):  # the other waits for us, or is about to push
                server.kill()
                server.start()
            if worker == 1 and step == 11:  # both push into the void for a while
                server.kill()
                threading.Timer(0.5, server.start).start()

        first, second = train(server.address, between=between)
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)


def train_and_die(servers: str | list[str], checkpoint: Path) -> None:
    torch.set_num_threads(1)

    def between(step: int) -> None:
        if step == 8:
            os.kill(os.getpid(), signal.SIGKILL)

    train_one(servers, 0, between, checkpoint)


@pytest.mark.parametrize("server_too", [False, True])
def test_a_worker_killed_and_resumed_from_its_checkpoint(tmp_path: Path, server_too: bool) -> None:
    options: Options = {"start_workers": 2, "snapshot_every": 4}
    expected = undisturbed(tmp_path, ADAMW, **options)
    checkpoint = tmp_path / "checkpoint.pt"
    with ServerProcess(tmp_path / "state", ADAMW, options) as server:

        def work(worker: int) -> Tensor:
            if worker == 1:
                return train_one(server.address, 1)
            dying = FORKED.Process(target=train_and_die, args=(server.address, checkpoint))
            dying.start()
            dying.join(60)
            assert dying.exitcode == -signal.SIGKILL
            if server_too:
                server.kill()
                server.start()
            return train_one(server.address, 0, checkpoint=checkpoint)

        first, second = side_by_side(2, work)
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)


def test_two_servers_of_which_each_is_killed(tmp_path: Path) -> None:
    options: Options = {"start_workers": 2, "snapshot_every": 4}
    with (
        serving(tmp_path / "1", ADAMW, **options) as one,
        serving(tmp_path / "2", ADAMW, **options) as two,
    ):
        expected, _ = train([str(one.address), str(two.address)])
    with (
        ServerProcess(tmp_path / "3", ADAMW, options) as three,
        ServerProcess(tmp_path / "4", ADAMW, options) as four,
    ):

        def between(worker: int, step: int) -> None:
            if worker == 0 and step in (2, 7):
                killed = three if step == 2 else four
                killed.kill()
                killed.start()

        first, second = train([four.address, three.address], between=between)
    assert torch.equal(first, second)
    assert torch.equal(first, expected)
