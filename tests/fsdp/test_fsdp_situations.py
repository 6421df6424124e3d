"""The many ways of fully_shard: the hook follows them, to the bits of native HSDP at q = 0."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compatibility_page import cases_of, outcome_of
from fsdp_cases import (
    Before,
    Nested,
    adamw,
    equal,
    hooked,
    mesh_of,
    nested,
    plain,
    replicas_are_equal,
    train,
)
from hook_cases import batch
from ranks import run_ranks
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from topq_dist.exchange.registry import ExchangeName

pytestmark = pytest.mark.gloo
STEPS = range(4)
HERE = "tests/fsdp/test_fsdp_situations.py"
Make = Callable[[DeviceMesh], Any]
Other = Callable[[DeviceMesh], bool]


def toggled(model: Nested, step: int) -> None:
    """Leave modules out of some steps, on all ranks alike, and apply one once or twice."""
    model.uses_further, model.times = step % 2 == 0, 1 + step % 2


def thawed(model: Nested, step: int) -> None:
    for parameter in model.further.parameters():
        parameter.requires_grad_(step >= 2)


def kept_apart(model: Any, step: int) -> None:
    """Add up reduce-scattered gradients over two passes, and exchange them with the third's."""
    model.set_requires_all_reduce(step % 3 == 2)


def on_columns(parameter: nn.Parameter) -> Shard | None:
    return Shard(1) if parameter.ndim == 2 and parameter.shape[1] % 2 == 0 else None


def several_modules_in_one(mesh: DeviceMesh) -> Any:
    model = Nested()
    fully_shard([model.first, model.further], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def with_factor(mesh: DeviceMesh, *, sums: bool = False) -> Any:
    """Divide the sum over all ranks by 2, of which gloo can have a replica's two ranks averaged."""
    model = nested(mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(2.0)
            module.set_force_sum_reduction_for_comms(sums)
    return model


CASES: dict[str, tuple[Make, Before | None]] = {
    "nested modules, applied several times": (nested, None),
    "modules that are not always used": (nested, toggled),
    "layers that are freed later": (nested, thawed),
    "set_requires_all_reduce": (nested, kept_apart),
    "reshard_after_forward=True": (lambda m: nested(m, reshard_after_forward=True), None),
    "reshard_after_forward=False": (lambda m: nested(m, reshard_after_forward=False), None),
    "activation checkpointing": (lambda m: nested(m, {"recomputes": True}), None),
    "activation checkpointing, reentrant": (
        lambda m: nested(m, {"recomputes": True, "reentrant": True}),
        None,
    ),
    "shard_placement_fn=, columns": (
        lambda m: nested(m, shard_placement_fn=on_columns),
        None,
    ),
    "fully_shard of a list of modules": (several_modules_in_one, toggled),
    "set_gradient_divide_factor": (with_factor, None),
    "set_force_sum_reduction_for_comms, with a factor": (lambda m: with_factor(m, sums=True), None),
    "torch.compile": (lambda m: torch.compile(nested(m), backend="aot_eager"), None),
}


def situations(_: int) -> dict[str, bool]:
    mesh = mesh_of(2, 2)
    found = {}
    for name, (make, before) in CASES.items():
        native = make(mesh)
        train(native, adamw(native), STEPS, before=before)
        model = make(mesh["shard"])
        optimizer = adamw(model)
        hooked(model, mesh, optimizer, q=0)
        train(model, optimizer, STEPS, before=before)
        sparse = make(mesh["shard"])
        optimizer = adamw(sparse)
        state = hooked(sparse, mesh, optimizer, q=0.9, exchange="allgather")
        train(sparse, optimizer, STEPS, before=before)
        found[name] = equal(native, model) and replicas_are_equal(sparse, mesh)
        assert state.stats().steps == (len(STEPS) if before is not kept_apart else 1), name
    return found


def test_what_fully_shard_does_is_followed(tmp_path: Path) -> None:
    for found in run_ranks(4, situations, tmp_path):
        assert found.keys() == CASES.keys()
        assert all(found.values()), found


def test_every_case_of_this_file_has_its_row() -> None:
    assert cases_of(HERE) == CASES.keys() | OTHERS.keys()
    assert {outcome_of(what, HERE) for what in (*CASES, *OTHERS)} == {("works", "")}


def tiny(mesh: DeviceMesh) -> bool:
    """Of one row there is nothing on the second shard, whose ranks go along."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(13, 1, bias=False))
    fully_shard(model, mesh=mesh["shard"])
    optimizer = adamw(model)
    hooked(model, mesh, optimizer, q=0.5, exchange="allgather")
    for step in STEPS:
        model(batch(step, mesh.get_rank())[0]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return replicas_are_equal(model, mesh)


def clipped(mesh: DeviceMesh) -> bool:
    """A replica's whole gradient has the norm asked for, over its shards together."""
    model = plain(mesh["shard"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    knobs = {"value_format": None, "bound": None, "error_feedback": False}
    hooked(model, mesh, optimizer, q=0.0, clip_norm=1e-3, exchange="dense", **knobs)
    inputs, targets = batch(0, 0)
    nn.functional.cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
    norm = nn.utils.get_total_norm([one.grad for one in model.parameters()])
    return bool(abs(float(norm.full_tensor()) - 1e-3) < 1e-8)  # type: ignore[attr-defined]


def scaled(mesh: DeviceMesh) -> bool:
    """With a scaler the residual is in unscaled units: the same bits as without one."""
    ends = []
    for scales in (False, True):
        model = plain(mesh["shard"], mp_policy=MixedPrecisionPolicy())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = GradScaler("cpu", init_scale=2.0**10, growth_interval=2, enabled=scales)
        given = scaler if scales else None
        hooked(model, mesh, optimizer, q=0.8, exchange="allgather", grad_scaler=given)
        for step in STEPS:
            inputs, targets = batch(step, mesh.get_rank())
            loss = nn.functional.cross_entropy(model(inputs), targets)
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        ends.append(model)
    return equal(*ends) and half_is_rescued(mesh)


def half_is_rescued(mesh: DeviceMesh) -> bool:
    """Gradients too small for float16 without the scale are sent or kept."""
    torch.manual_seed(0)
    model: Any = nn.Linear(64, 64, bias=False)
    half = MixedPrecisionPolicy(param_dtype=torch.float16)
    fully_shard(model, mesh=mesh["shard"], mp_policy=half)
    scaler = GradScaler("cpu", init_scale=2.0**16)
    knobs: dict[str, Any] = {"exchange": "allgather", "q": 0.9, "momentum": "optimizer"}
    state = hooked(model, mesh, None, grad_scaler=scaler, **knobs)
    sent = true = torch.zeros(())
    for step in STEPS:
        gradient = (torch.rand(64, 64, generator=torch.Generator().manual_seed(step)) + 0.5) * 1e-8
        loss = (model(torch.eye(64)).float() * gradient.t()).sum()
        scaler.scale(loss).backward()
        sent = sent + model.weight.grad.full_tensor().sum() / scaler.get_scale()
        true = true + gradient.sum()
        model.zero_grad()
    own = state.state_dict()[f"replica{mesh.get_local_rank('replicate')}"]
    kept = own["residuals"]["weight"].full_tensor().sum()
    return bool(abs(sent + kept - true) < 1e-3 * true)


def of_size_one(shape: tuple[int, int]) -> Other:
    def action(_: DeviceMesh) -> bool:
        mesh = mesh_of(*shape)
        native = plain(mesh)
        train(native, adamw(native), STEPS)
        model = plain(mesh["shard"])
        optimizer = adamw(model)
        state = hooked(model, mesh, optimizer, q=0)
        train(model, optimizer, STEPS)
        same = equal(native, model)
        state.q = 0.9
        train(model, optimizer, STEPS)
        return same and replicas_are_equal(model, mesh)

    return action


def exchanged_by(exchange: ExchangeName) -> Other:
    def action(mesh: DeviceMesh) -> bool:
        model = nested(mesh["shard"])
        optimizer = adamw(model)
        state = hooked(model, mesh, optimizer, q=0.9, exchange=exchange)
        train(model, optimizer, range(28 if exchange == "auto" else 4), before=toggled)
        assert (state.chosen_exchange is not None) == (exchange == "auto")
        return replicas_are_equal(model, mesh)

    return action


def used_differently(mesh: DeviceMesh) -> bool:
    """A module that one replica leaves out of a step counts with zeros there."""
    model = nested(mesh["shard"])
    model.set_reduce_scatter_unused_params(True)
    optimizer = adamw(model)
    hooked(model, mesh, optimizer, q=0.9, exchange="allgather")
    for step in STEPS:
        model.uses_further = step < 2 or mesh.get_local_rank("replicate") == step % 2
        train(model, optimizer, [step])
    return replicas_are_equal(model, mesh)


OTHERS: dict[str, Other] = {
    'exchange="auto"': exchanged_by("auto"),
    'exchange="split"': exchanged_by("split"),
    'exchange="dense"': exchanged_by("dense"),
    "shards of one rank": of_size_one((4, 1)),
    "one replica": of_size_one((1, 4)),
    "ranks on which every shard is empty": tiny,
    "clip_norm=": clipped,
    "GradScaler, given as grad_scaler=": scaled,
    "set_reduce_scatter_unused_params, replicas that use different parameters": used_differently,
}


def others(_: int) -> dict[str, bool]:
    mesh = mesh_of(2, 2)
    return {name: action(mesh) for name, action in OTHERS.items()}


def test_other_exchanges_meshes_and_options(tmp_path: Path) -> None:
    for found in run_ranks(4, others, tmp_path):
        assert all(found.values()), found
