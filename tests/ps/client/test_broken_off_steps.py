"""A step that Ctrl-C breaks off, wherever it does, is finished by the next one; nothing is lost."""

from __future__ import annotations

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
from topq_dist.ps.client.step_under_way import StepUnderWay

pytestmark = pytest.mark.usefixtures("one_thread")
SGD: Options = {"inner_opt": "sgd", "options": {"lr": 0.1}}
STEPS = 4


class Broken:
    """Has one call of a method raise KeyboardInterrupt, before or after its own work."""

    def __init__(self, patch: pytest.MonkeyPatch, of: type, name: str, call: int, *, after: bool):
        self.left = call
        real: Callable[..., Any] = getattr(of, name)

        def breaking(*arguments: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left == -1 and not after:
                raise KeyboardInterrupt
            result = real(*arguments, **options)
            if self.left == -1:
                raise KeyboardInterrupt
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
                optimizer.zero_grad()
                backward(model, [batch(0, number)])
                try:
                    optimizer.step()
                except KeyboardInterrupt:
                    after_step(optimizer)
                    if optimizer._step.open:
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
        (StepUnderWay, "make", 1, True),
        (StepUnderWay, "hand_on_pushes", 1, False),
        (StepUnderWay, "hand_on_pushes", 1, True),
        (Residuals, "apply", 2, True),
        (Residuals, "apply", 3, True),
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
