"""Refusals of the hook under fully_shard, and the errors where ranks disagree or one fails."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from compatibility_page import cases_of, outcome_of
from fsdp_cases import adamw, hooked, locals_of, mesh_of, nested, plain, train
from hook_cases import batch, small_model
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from topq_dist import (
    ExchangeError,
    GradientTransformerOptimizer,
    QByTensor,
    TopQGradientOptimizer,
    register_topq_hook,
)

HERE = "tests/fsdp/test_fsdp_errors.py"


def alone_mesh() -> Any:
    return mesh_of(1, 1)


def native_hsdp() -> None:
    hooked(plain(alone_mesh()), alone_mesh())


def replicated_by_torch() -> None:
    mesh = alone_mesh()
    model = nn.Linear(3, 3)
    fully_shard(model, mesh=mesh["shard"])
    parameter = nn.Parameter(distribute_tensor(torch.ones(3), mesh["shard"], [Replicate()]))
    model.register_parameter("replicated", parameter)
    hooked(model, mesh)


def no_replicate_group() -> None:
    register_topq_hook(plain(alone_mesh()["shard"]))


def a_mesh_for_a_group() -> None:
    mesh = alone_mesh()
    register_topq_hook(plain(mesh["shard"]), replicate_group=mesh["replicate"])


def ddp_with_a_group() -> None:
    model = DistributedDataParallel(small_model())
    register_topq_hook(model, replicate_group=dist.group.WORLD)


def older_fsdp() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FullyShardedDataParallel(small_model(), device_id=torch.device("cpu"))
    register_topq_hook(model, replicate_group=alone_mesh().get_group("replicate"))


def modules_within_alone() -> None:
    mesh = alone_mesh()
    model = small_model()
    fully_shard(model[0], mesh=mesh["shard"])
    hooked(model, mesh)


def several_dimensions() -> None:
    mesh = init_device_mesh("cpu", (1, 1, 1), mesh_dim_names=("replicate", "shard", "tensor"))
    model = nn.Linear(4, 4, bias=False)
    whole = distribute_tensor(model.weight.detach(), mesh["tensor"], [torch_shard()])
    model.weight = nn.Parameter(whole)
    fully_shard(model, mesh=mesh["shard"])
    hooked(model, mesh)


def torch_shard() -> Any:
    from torch.distributed.tensor import Shard

    return Shard(0)


def with_knobs(**knobs: Any) -> Callable[[], object]:
    return lambda: hooked(plain(alone_mesh()["shard"]), alone_mesh(), **knobs)


def paired() -> None:
    model = small_model()
    optimizer = TopQGradientOptimizer(model.parameters(), torch.optim.SGD, q=0.9, lr=0.1)
    within = GradientTransformerOptimizer(None, optimizer, param_ndim=None)
    hooked(plain(alone_mesh()["shard"]), alone_mesh(), within)


def anothers_optimizer() -> None:
    hooked(plain(alone_mesh()["shard"]), alone_mesh(), adamw(small_model()))


def with_a_hook_of_its_own() -> None:
    model = plain(alone_mesh()["shard"])
    next(iter(model.parameters())).register_post_accumulate_grad_hook(lambda _: None)
    hooked(model, alone_mesh())


def a_second_hook() -> None:
    model = plain(alone_mesh()["shard"])
    hooked(model, alone_mesh(), adamw(model))
    hooked(model, alone_mesh(), adamw(model))


def on_meta() -> None:
    with torch.device("meta"):
        model = small_model()
    fully_shard(model, mesh=alone_mesh()["shard"])
    hooked(model, alone_mesh())


def frozen() -> None:
    model = plain(alone_mesh()["shard"])
    model.requires_grad_(False)
    hooked(model, alone_mesh())


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "fully_shard on a 2-D mesh, native HSDP": (
        native_hsdp,
        "give fully_shard its mesh['shard'], and the hook",
    ),
    "parameters that torch replicates": (
        replicated_by_torch,
        "is replicated by fully_shard or replicate()",
    ),
    "fully_shard over all ranks, without replicate_group": (
        no_replicate_group,
        "has no replicas, and nothing that could be sent",
    ),
    "replicate_group= a DeviceMesh": (
        a_mesh_for_a_group,
        "replicate_group is a DeviceMesh: expected its get_group()",
    ),
    "replicate_group= with DistributedDataParallel": (
        ddp_with_a_group,
        "expected a model under fully_shard",
    ),
    "FullyShardedDataParallel, FSDP1": (older_fsdp, "expected fully_shard (FSDP2) in its place"),
    "fully_shard of modules within alone": (
        modules_within_alone,
        "and not to modules within it alone",
    ),
    "tensor parallelism beside it": (several_dimensions, "without tensor or expert parallelism"),
    'scope="bucket"': (
        with_knobs(scope="bucket"),
        "a model under fully_shard: expected 'parameter'",
    ),
    "q by a policy": (with_knobs(q=QByTensor(q=0.9)), "under fully_shard: expected a number"),
    'exchange="hierarchical"': (
        with_knobs(exchange="hierarchical"),
        "fully_shard adds up gradients inside of a replica already",
    ),
    "ranks_per_node": (with_knobs(ranks_per_node=2), "ranks_per_node=2"),
    "q": (with_knobs(q=1.5), "q=1.5"),
    "clip_norm": (with_knobs(clip_norm=0.0), "clip_norm=0.0"),
    "TopQGradientOptimizer": (paired, "which takes no DTensor"),
    "another's optimizer": (anothers_optimizer, "holds none of the 6 trainable parameters"),
    "optimizers in post-accumulate-grad hooks": (
        with_a_hook_of_its_own,
        "step optimizers after backward()",
    ),
    "a second all-reduce hook": (
        a_second_hook,
        "all-reduce hook already: expected a model without one",
    ),
    "parameters on the meta device": (on_meta, "give it memory with to_empty()"),
    "nothing to train": (frozen, "no trainable parameter that is sharded"),
}


# of one knob each, which other tests have for every wrapper
UNLISTED = {"ranks_per_node", "q", "clip_norm", "another's optimizer", "nothing to train"}


def test_every_refusal_has_its_row_with_its_words() -> None:
    others = {"replicas that use different parameters in a step"}
    assert cases_of(HERE) - others == REFUSED.keys() - UNLISTED
    for what in REFUSED.keys() - UNLISTED:
        assert outcome_of(what, HERE) == ("refused", REFUSED[what][1])


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("what", REFUSED)
def test_it_is_refused_with_what_to_do_instead(what: str) -> None:
    action, words = REFUSED[what]
    with pytest.raises((TypeError, ValueError), match=re.escape(words)):
        action()


@pytest.mark.usefixtures("alone")
def test_parameters_that_were_replaced_are_named() -> None:
    model = plain(alone_mesh()["shard"])
    hooked(model, alone_mesh(), adamw(model), exchange="allgather")
    whole = {name: one.detach().clone() for name, one in model.state_dict().items()}
    model.load_state_dict(whole, assign=True)
    with pytest.raises(RuntimeError, match="register it after whatever replaces them"):
        train(model, adamw(model), range(2))


@pytest.mark.usefixtures("alone")
def test_a_part_of_a_larger_model_is_named_in_its_first_step() -> None:
    model = nested(alone_mesh()["shard"])
    hooked(model.block, alone_mesh(), adamw(model.block))
    with pytest.raises(RuntimeError, match="part of a larger model under fully_shard"):
        train(model, adamw(model), [0])
    with pytest.raises(TypeError, match="ddp_model is a int"):
        register_topq_hook(5)  # type: ignore[call-overload]


def said(action: Callable[[], object]) -> str:
    try:
        action()
    except (ExchangeError, ValueError) as error:
        return str(error)
    raise AssertionError("expected an error")


def disagreements(rank: int) -> dict[str, str]:
    """Return what each rank says where one of four does otherwise."""
    mesh = mesh_of(2, 2)
    odd = rank == 3
    found = {}
    model = plain(mesh["shard"])
    wrong = mesh.get_group("shard")
    with pytest.raises(ValueError, match="expected no rank but this one in both"):
        register_topq_hook(model, replicate_group=wrong)
    found["registered with another q"] = said(
        lambda: hooked(model, mesh, adamw(model), q=0.9 if odd else 0.8)
    )
    knobs: dict[str, Any]
    for knobs in ({"clip_norm": 0.0}, {"q": 1.5}, {"scope": "bucket"}, {"bound": -1.0}):
        found[f"registered with {knobs} on one"] = said(
            partial(hooked, model, mesh, adamw(model), **(knobs if odd else {}))
        )
    hooking = plain(mesh["shard"])
    if odd:
        next(iter(hooking.parameters())).register_post_accumulate_grad_hook(lambda _: None)
    found["registered with hooks on one"] = said(partial(hooked, hooking, mesh, adamw(hooking)))
    # nothing is touched, and it may be tried again
    optimizer = adamw(model)
    state = hooked(model, mesh, optimizer, q=0.8, exchange="allgather")
    train(model, optimizer, range(2))
    if odd:
        state.q = 0.7
    found["another q later"] = said(lambda: train(model, optimizer, [2]))

    for q in (0.8, 0.0):
        other = nested(mesh["shard"])
        optimizer = adamw(other)
        hooked(other, mesh, optimizer, q=q, exchange="allgather")
        train(other, optimizer, range(2))
        # a whole replica: its shards could not be reduced otherwise
        other.uses_further = rank < 2
        found[f"unused in one replica, q={q}"] = said(partial(train, other, optimizer, [2]))

    # those of one shard know it before the others, which are about to add up a norm
    for exchange, q in (("dense", 0.8), ("allgather", 0.0)):
        clipped = plain(mesh["shard"])
        optimizer = adamw(clipped)
        knobs = {"q": q, "exchange": exchange, "clip_norm": 1.0}
        state = hooked(clipped, mesh, optimizer, **knobs)
        train(clipped, optimizer, range(2))
        if odd:
            state.q = 0.5
        found[f"another q with clip_norm, {exchange}"] = said(
            partial(train, clipped, optimizer, [2])
        )

    failing = plain(mesh["shard"])
    optimizer = adamw(failing)
    state = hooked(failing, mesh, optimizer, q=0.8, exchange="allgather")
    if odd:
        stages = state._parts.stages
        stages.sparsity.segments = fails  # type: ignore[assignment,method-assign]
    try:
        train(failing, optimizer, [0])
    except (ExchangeError, ZeroDivisionError) as error:
        found["one fails"] = str(error)
    return found


def fails(_: Any) -> Any:
    raise ZeroDivisionError("of this rank alone")


@pytest.mark.gloo
def test_where_ranks_disagree_or_one_fails_all_of_them_say_so(tmp_path: Path) -> None:
    results = run_ranks(4, disagreements, tmp_path)
    for found in results:
        for what in [what for what in found if "another q" in what]:
            assert "disagree" in found[what], found
            assert re.search(r"q=0\.[5789]", found[what]), found
        for q in (0.8, 0.0):
            words = found[f"unused in one replica, q={q}"]
            assert "parameters without a gradient: never.weight" in words
            assert "further.weight" in words
        one_alone = {
            "clip": "clip_norm=0.0",
            "1.5": "q=1.5",
            "bucket": "scope='bucket'",
            "-1": "bound=-1.0",
        }
        for what in [what for what in found if what.endswith("on one")]:
            words = next((say for of, say in one_alone.items() if of in what), "-accumulate-grad")
            assert words in found[what], found
    assert results[3]["one fails"] == "of this rank alone"
    assert "could not compress its gradient" in results[1]["one fails"]
    assert "of this rank alone" in results[2]["one fails"]
    assert "could not compress its gradient" in results[0]["one fails"]


def void(rank: int) -> dict[str, bool]:
    """Return whether a step that overflows on one rank leaves everything as it was on all."""
    mesh = mesh_of(2, 2)
    found = {}
    for exchange in ("allgather", "split"):
        model = plain(mesh["shard"])
        optimizer = adamw(model)
        state = hooked(model, mesh, optimizer, q=0.8, exchange=exchange)
        train(model, optimizer, range(3))
        before = state.state_dict()
        parameters = locals_of(model)
        inputs, targets = batch(3, rank)
        loss = nn.functional.cross_entropy(model(inputs), targets)
        (loss * (float("inf") if rank == 2 else 1.0)).backward()  # type: ignore[no-untyped-call]
        gradients = [one.grad.to_local() for one in model.parameters()]
        found[f"{exchange}: all NaN"] = all(bool(one.isnan().all()) for one in gradients)
        optimizer.zero_grad()
        mine = f"replica{rank // 2}"
        after = state.state_dict()
        found[f"{exchange}: residuals"] = all(
            torch.equal(one.to_local(), after[mine]["residuals"][name].to_local())
            for name, one in before[mine]["residuals"].items()
        )
        found[f"{exchange}: coherence"] = torch.equal(before["coherence"], after["coherence"])
        assert all(map(torch.equal, parameters, locals_of(model)))
        train(model, optimizer, range(3, 5))
        found[f"{exchange}: goes on"] = all(bool(one.isfinite().all()) for one in locals_of(model))
    torch.manual_seed(rank // 2)
    differing: Any = nn.Linear(4, 4)
    fully_shard(differing, mesh=mesh["shard"])
    with pytest.warns(UserWarning, match="the replicas begin with different parameters"):
        hooked(differing, mesh, adamw(differing))
    return found


@pytest.mark.gloo
def test_a_step_that_is_not_finite_on_one_rank_is_void_on_all(tmp_path: Path) -> None:
    for found in run_ranks(4, void, tmp_path):
        assert all(found.values()), found
