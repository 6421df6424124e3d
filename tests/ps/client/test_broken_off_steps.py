"""A step that Ctrl-C breaks off, wherever it does, is finished by the next one; nothing is lost."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ps.servers import Options, serving
from ps.workers import backward, batch, make_model

from topq_dist.compress.residual import Residuals
from topq_dist.ps import ParameterServerOptimizer
from topq_dist.ps.client.server_client import ServerClient
from topq_dist.ps.client.shard import Shard
from topq_dist.ps.client.step_under_way import StepUnderWay

pytestmark = pytest.mark.usefixtures("one_thread")
SGD: Options = {"inner_opt": "sgd", "options": {"lr": 0.1}}
STEPS = 4


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    # where a signal raises, it does so by now
    time.sleep(0)


class Broken:
    """Has Ctrl-C come in one call of a method, before or after its own work."""

    def __init__(self, patch: pytest.MonkeyPatch, of: type, name: str, call: int, *, after: bool):
        self.left = call
        real: Callable[..., Any] = getattr(of, name)

        def breaking(*arguments: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left == -1 and not after:
                interrupt()
            result = real(*arguments, **options)
            if self.left == -1 and after:
                interrupt()
            return result

        patch.setattr(of, name, breaking)


def trained(folder: Path, after_step: Callable[[ParameterServerOptimizer], None]) -> Any:
    """Train one worker at two servers; return parameters and residuals."""
    model = make_model()
    with serving(folder / "one", SGD) as one, serving(folder / "two", SGD) as two:
        optimizer = ParameterServerOptimizer(
            model.named_parameters(),
            [str(one.address), str(two.address)],
            worker="w0",
            q=0.9,
            timeout_s=20.0,
        )
        with optimizer:
            for number in range(STEPS):
                for group in optimizer.param_groups:
                    group["lr"] = 0.1 * 0.8**number
                optimizer.zero_grad(set_to_none=False)
                backward(model, [batch(0, number)])
                try:
                    optimizer.step()
                except KeyboardInterrupt:
                    after_step(optimizer)
                    if optimizer._step.open:
                        # no newer gradient is looked at
                        for parameter in model.parameters():
                            parameter.grad = torch.full_like(parameter, 7.0)
                        optimizer.step()
            residuals = {
                name: held.clone()
                for server in optimizer.state_dict()["topq"]["servers"]
                for name, held in server["residuals"].items()
            }
    return {name: one.detach().clone() for name, one in model.named_parameters()}, residuals


@pytest.mark.parametrize("saved", [False, True], ids=["", "and saved"])
@pytest.mark.parametrize(
    ("of", "name", "call", "after"),
    [
        (ServerClient, "begin", 2, False),
        (ServerClient, "begin", 2, True),
        (ServerClient, "begin", 3, False),
        (ServerClient, "begin", 3, True),
        (Residuals, "multiply", 0, False),
        (Residuals, "multiply", 0, True),
        (Shard, "compress", 2, False),
        (StepUnderWay, "make", 1, False),
        (StepUnderWay, "make", 1, True),
        (StepUnderWay, "hand_on_pushes", 1, False),
        (StepUnderWay, "hand_on_pushes", 1, True),
        (Residuals, "apply", 2, False),
        (Residuals, "apply", 3, True),
        (ServerClient, "collect", 4, False),
        (ServerClient, "collect", 4, True),
        (Shard, "write_back", 4, False),
        (Shard, "write_back", 4, True),
    ],
)
def test_it_is_as_if_nothing_had_been(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    of: type,
    name: str,
    call: int,
    after: bool,
    saved: bool,
) -> None:
    whole, residuals = trained(tmp_path / "whole", lambda _: None)
    with monkeypatch.context() as patch:
        broken = Broken(patch, of, name, call, after=after)
        looked_at = (lambda optimizer: optimizer.state_dict()) if saved else (lambda _: None)
        now, left = trained(tmp_path / "broken", looked_at)
    assert broken.left < 0
    assert all(torch.equal(now[name], whole[name]) for name in whole)
    assert left.keys() == residuals.keys()
    assert all(torch.equal(left[name], residuals[name]) for name in residuals)
