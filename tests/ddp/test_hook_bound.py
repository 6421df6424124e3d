"""bound= of the hook: what is sent is clipped, and ranks must agree on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hook_cases import loss_of, small_model
from ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from topq_dist import register_topq_hook
from topq_dist.exchange.agreement import ExchangeError

pytestmark = pytest.mark.gloo


def gradients(net: nn.Module) -> list[torch.Tensor]:
    return [
        parameter.grad.flatten() for parameter in net.parameters() if parameter.grad is not None
    ]


def clipped(rank: int) -> bool:
    nets = []
    for bound in (None, 1.25):
        model = DistributedDataParallel(small_model())
        state = register_topq_hook(
            model,
            q=0.9,
            value_format="fp32",
            exchange="allgather",
            bound=bound,
            momentum="optimizer",
        )
        # the same gradient on each rank, so that the average is what each has sent
        loss_of(model, 0, 0).backward()  # type: ignore[no-untyped-call]
        nets.append((gradients(model), state.state_dict()["residuals"]))
    for whole, sent, residual in zip(nets[0][0], nets[1][0], nets[1][1].values(), strict=True):
        k = int((whole != 0).sum())
        limit = float(whole.abs().sum()) / k * 1.25
        torch.testing.assert_close(sent, whole.clamp(-limit, limit), rtol=1e-5, atol=0)
        assert bool(residual.any())
    with pytest.raises(ValueError, match=r"bound=1.25 with error_feedback=False"):
        register_topq_hook(
            DistributedDataParallel(small_model()), q=0.9, error_feedback=False, bound=1.25
        )
    with pytest.raises(ExchangeError, match=r"bound=2\.0"):
        register_topq_hook(DistributedDataParallel(small_model()), bound=1.0 + rank)
    return True


def test_what_ranks_send_is_clipped_alike(tmp_path: Path) -> None:
    assert run_ranks(2, clipped, tmp_path) == [True, True]
