"""LocalTopQ in an elastic run of few ranks: the same numbers as without, and what is refused."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hook_cases import small_model
from local_cases import backward, equal, inner_optimizer, local, numbers, train
from ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from topq_dist import Elastic, LocalTopQ
from topq_dist.elastic.store import serve

pytestmark = [pytest.mark.gloo, pytest.mark.usefixtures("one_thread")]
OPTIONS: tuple[dict[str, Any], ...] = (
    {"every": 2, "q": 0.8, "outer_momentum": 0.5},
    {"every": 3, "q": 0.8, "fragments": 2, "overlap": 1, "exchange": "split"},
    {"every": 2, "q": 0.0},
)


def both_ways(rank: int, port: int) -> dict[str, Any]:
    """Train with the group of torch's making and with the elastic one."""
    results: dict[str, Any] = {}
    for case, options in enumerate(OPTIONS):
        model, steps = local(0, **options)
        train(model, steps, rank, 0, 7)
        steps.synchronize()
        place = Elastic(store=f"127.0.0.1:{port}", name=str(rank), ranks=2, run=str(case))
        other, elastic = local(rank, elastic=place, **options)
        train(other, elastic, rank, 0, 7)
        elastic.synchronize()
        results[f"{case}"] = equal(numbers(model), numbers(other))
        results[f"{case}, state"] = sorted(set(elastic.state_dict()) - set(steps.state_dict()))
        results[f"{case}, rank"] = [elastic.rank, list(elastic.members), elastic.steps_taken]
        elastic.close()
        elastic.close()
    frozen = small_model(seed=rank)
    frozen[0].requires_grad_(False)
    place = Elastic(store=f"127.0.0.1:{port}", name=str(rank), ranks=2, run="frozen")
    LocalTopQ(frozen, inner_optimizer(frozen), every=2, q=0.5, elastic=place).close()
    results["frozen"] = numbers(frozen)
    # torch's own group is still there
    dist.barrier()
    return results


def test_an_elastic_run_that_loses_nobody_ends_in_the_same_bits(tmp_path: Path) -> None:
    store = serve("127.0.0.1:0")
    ranks = run_ranks(2, both_ways, tmp_path, store.port)
    assert equal(ranks[0]["frozen"], ranks[1]["frozen"])
    for rank, result in enumerate(ranks):
        for case in range(len(OPTIONS)):
            assert result[f"{case}"], OPTIONS[case]
            assert result[f"{case}, state"] == ["lost_residuals"]
            assert result[f"{case}, rank"] == [rank, ["0", "1"], 7]


class WithFunction(torch.optim.SGD):
    """An optimizer whose groups hold what is no number."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1)
        self.param_groups[0]["schedule"] = print


def test_a_rank_alone_is_a_run_and_what_cannot_be_elastic_is_refused(
    alone: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("topq_dist.elastic.settings._STORE_TIMEOUT", dt.timedelta(seconds=1))
    store = serve("127.0.0.1:0")
    place = Elastic(store=f"127.0.0.1:{store.port}", name="only", ranks=1)
    model, steps = local(0, every=2, q=0.5, elastic=place)
    train(model, steps, 0, 0, 4)
    with pytest.raises(ValueError, match="all_ranks=True of an elastic run"):
        steps.state_dict(all_ranks=True)
    saved = steps.state_dict()
    train(model, steps, 0, 4, 6)
    ended = steps.state_dict()["outer"]
    steps.close()
    again, resumed = local(0, every=2, q=0.5, elastic=Elastic(**{**vars(place), "run": "2"}))
    resumed.optimizer.load_state_dict(steps.optimizer.state_dict())
    resumed.load_state_dict(saved)
    assert resumed.steps_taken == 4
    assert equal(resumed.state_dict()["outer"], saved["outer"])
    assert not equal(saved["outer"], ended)
    backward(again, 4, 0)
    resumed.step()
    resumed.close()
    with pytest.raises(RuntimeError, match="has left the run"):
        resumed.synchronize()

    bare = small_model()
    wrong: tuple[tuple[type[Exception], str, nn.Module, Any, dict[str, Any]], ...] = (
        (ValueError, "process_group=", bare, None, {"process_group": alone}),
        (TypeError, "elastic='yes'", bare, None, {"elastic": "yes"}),
        (ValueError, "DistributedDataParallel", DistributedDataParallel(bare), None, {}),
        (TypeError, "optimizer has a state", bare, WithFunction(bare.parameters()), {}),
        (ConnectionError, "python -m topq_dist.elastic.store", bare, None, {"elastic": NOBODY}),
    )
    for kind, words, one, optimizer, options in wrong:
        usual: dict[str, Any] = {"every": 2, "q": 0.5, "elastic": place}
        with pytest.raises(kind, match=words):
            LocalTopQ(one, optimizer or inner_optimizer(one), **(usual | options))


# no host has this name
NOBODY = Elastic(store="nobody.invalid:29500", name="0", ranks=1)
