"""torch's distributed checkpoint takes the hook's state, and gives it to any mesh."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fsdp_cases import adamw, equal, hooked, mesh_of, plain, replicas_are_equal, train
from ranks import run_ranks
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from topq_dist import ExchangeError
from topq_dist.fsdp.hook import ShardedTopQState
from topq_dist.hook.momentum import MomentumName

pytestmark = pytest.mark.gloo
dcp: Any = torch.distributed.checkpoint
METHODS: tuple[MomentumName, ...] = ("feedback", "corrected", "adam", "optimizer")
# in fp64 sums of residuals say whether they are the same to the bit
IN_FP64 = MixedPrecisionPolicy(reduce_dtype=torch.float64)


def made(mesh: DeviceMesh, momentum: MomentumName, **knobs: Any) -> tuple[Any, Any, Any]:
    model = plain(mesh["shard"], mp_policy=IN_FP64)
    optimizer = adamw(model)
    with warnings.catch_warnings():
        # of a momentum that stays
        warnings.simplefilter("ignore")
        state = hooked(
            model, mesh, optimizer, q=0.9, exchange="allgather", momentum=momentum, **knobs
        )
    return model, optimizer, state


def save(path: Path, model: Any, optimizer: Any, state: ShardedTopQState) -> None:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save(
        {"model": model_state, "optimizer": optimizer_state, "topq": state}, checkpoint_id=path
    )


def load(path: Path, model: Any, optimizer: Any, state: ShardedTopQState | None) -> None:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    held = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(held if state is None else held | {"topq": state}, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)


def residual_sums(state: ShardedTopQState, mesh: DeviceMesh) -> dict[str, Tensor]:
    """Return the sum of each parameter's residual over the replicas, whole on every rank."""
    sums = {}
    (mine,) = [
        held
        for key, held in state.state_dict().items()
        if isinstance(held, dict) and key != "rates"
    ]
    for name, residual in mine["residuals"].items():
        total = residual.full_tensor()
        assert total.dtype == torch.float64
        dist.all_reduce(total, group=mesh.get_group("replicate"))
        sums[name] = total
    return sums


def on_four(_: int, folder: Path) -> dict[str, Any]:
    """Save on 2 x 2, go on, and resume: on the same mesh, and on others of four ranks."""
    square = mesh_of(2, 2)
    found: dict[str, Any] = {}
    for momentum in METHODS:
        path = folder / momentum
        model, optimizer, state = made(square, momentum)
        is_stateful = isinstance(state, Stateful)
        assert is_stateful
        train(model, optimizer, range(4))
        save(path, model, optimizer, state)
        sums = residual_sums(state, square)
        assert any(bool(total.any()) for total in sums.values())
        train(model, optimizer, range(4, 8))

        resumed = made(square, momentum)
        resumed[2].q = 0.5
        load(path, *resumed)
        assert resumed[2].q == 0.9
        assert all(map(torch.equal, residual_sums(resumed[2], square).values(), sums.values()))
        train(resumed[0], resumed[1], range(4, 8))
        found[f"{momentum}, to the bit"] = equal(model, resumed[0])
        for shape in ((4, 1), (1, 4)):
            mesh = mesh_of(*shape)
            other = made(mesh, momentum)
            load(path, other[0], other[1], None)
            other[2].load_checkpoint(path)
            now = residual_sums(other[2], mesh)
            kept = all(torch.equal(now[name], total) for name, total in sums.items())
            train(other[0], other[1], range(4, 6))
            found[f"{momentum}, {shape}"] = kept and replicas_are_equal(other[0], mesh)
    found["refusals"] = refusals(folder / "feedback", square)
    found["sums"] = residual_sums_of(folder / "feedback", square)
    found |= flushed(folder / "feedback", square)
    return found


def flushed(path: Path, square: DeviceMesh) -> dict[str, Any]:
    """Load residuals where the first step is an all-reduce, also where one replica has none."""
    found = {}
    _, _, sparse = made(square, "feedback")
    dcp.load({"topq": sparse}, checkpoint_id=path)
    replica = dist.get_rank(square.get_group("replicate"))
    for emptied in (False, True):
        saved = sparse.state_dict()
        if emptied and replica == 0:
            for residual in saved["replica0"]["residuals"].values():
                residual.to_local().zero_()
        model = plain(square["shard"], mp_policy=IN_FP64)
        optimizer = adamw(model)
        state = hooked(model, square, optimizer, q=0.9, exchange="dense", momentum="feedback")
        state.load_state_dict(saved)
        before = residual_sums(state, square)
        train(model, optimizer, [0])
        after = residual_sums(state, square)
        found[f"flushed, one emptied: {emptied}"] = any(
            bool(total.any()) for total in before.values()
        ) and all(
            torch.allclose(after[name], total * (31 / 32), rtol=1e-12)
            for name, total in before.items()
        )
        inputs = torch.full((2, 13), torch.inf)
        if replica == 0:
            model(inputs).sum().backward()
        else:
            model(inputs.zero_()).sum().backward()
        void = [bool(one.grad.to_local().isnan().all()) for one in model.parameters()]
        found[f"void on both, one emptied: {emptied}"] = all(void) and all(
            map(torch.equal, residual_sums(state, square).values(), after.values())
        )
    return found


def residual_sums_of(path: Path, mesh: DeviceMesh) -> dict[str, Tensor]:
    _, _, state = made(mesh, "feedback")
    dcp.load({"topq": state}, checkpoint_id=path)
    return residual_sums(state, mesh)


def refusals(path: Path, square: DeviceMesh) -> bool:
    """Try what does not fit: it says so on every rank, and changes nothing."""
    _, _, alone = made(mesh_of(1, 4), "feedback")
    with pytest.raises(ValueError, match=re.escape("state is of 2 replicas, and here are 1: give")):
        dcp.load({"topq": alone}, checkpoint_id=path)
    _, _, many = made(mesh_of(4, 1), "feedback")
    with pytest.raises(CheckpointException, match=re.escape("topq.replica3.residuals")):
        dcp.load({"topq": many}, checkpoint_id=path)
    _, _, state = made(square, "feedback")
    dcp.load({"topq": state}, checkpoint_id=path)
    before = residual_sums(state, square)
    broken = state.state_dict()
    if dist.get_rank() == 1:
        broken["replica0"]["residuals"]["0.weight"].to_local().fill_(torch.nan)
    with pytest.raises((ValueError, RuntimeError), match="holds NaN or infinity"):
        state.load_state_dict(broken)
    with pytest.raises(ValueError, match="has no state under 'hook'"):
        state.load_checkpoint(path, key="hook")
    with pytest.raises((CheckpointException, OSError, ExchangeError), match="No such file"):
        state.load_checkpoint(path / "nowhere" if dist.get_rank() == 1 else path)
    _, _, lossy = made(square, "optimizer", error_feedback=False)
    with pytest.raises(ValueError, match="expected a hook with error_feedback=True"):
        lossy.load_checkpoint(path)
    for wrong in ({}, {"version": torch.tensor(1)}, {"version": 1, "replicas": torch.tensor(2)}):
        with pytest.raises(ValueError, match="expected what state_dict returned"):
            state.load_state_dict(wrong)
    return all(map(torch.equal, before.values(), residual_sums(state, square).values()))


def rates_of(state: ShardedTopQState) -> dict[str, list[float]]:
    return {name: numbers.tolist() for name, numbers in state.state_dict()["rates"].items()}


def rates_on_four(rank: int, folder: Path) -> dict[str, Any]:
    """Save where a rank has no row of a bias: what all have alike is written by any of them."""
    mesh = mesh_of(1, 4)
    model, optimizer, state = made(mesh, "feedback")
    empty = [one for one in model.parameters() if not one.to_local().numel()]
    for rate in (1e-2, 0.8e-2):
        optimizer.param_groups[0]["lr"] = rate
        train(model, optimizer, [0])
    rates = rates_of(state)
    _, _, same = made(mesh, "feedback")
    dcp.save({"topq": state}, checkpoint_id=folder / "now")
    same.load_checkpoint(folder / "now")
    of_before = state.state_dict()
    of_before["rates"] = {name: one[[0, 2]] for name, one in of_before["rates"].items()}
    dcp.save({"topq": of_before}, checkpoint_id=folder / "before")
    _, _, older = made(mesh, "feedback")
    older.load_checkpoint(folder / "before")
    return {
        "rates": rates,
        "empty": len(empty),
        "read": rates_of(same) == rates,
        "of_before": rates_of(older) == rates,
    }


def test_all_ranks_have_the_same_rates_also_those_without_rows(tmp_path: Path) -> None:
    four = run_ranks(4, rates_on_four, tmp_path, tmp_path)
    assert [found["empty"] > 0 for found in four] == [False, False, False, True]
    for found in four:
        assert len(found["rates"]) == 6
        assert all(one == [0.8e-2, 0.8e-2, 1e-2] for one in found["rates"].values())
        assert found["read"]
        assert found["of_before"]


def on_six(_: int, folder: Path) -> list[dict[str, Tensor]]:
    """Load what 2 x 2 ranks saved on 2 x 3, as it is, and on 3 x 2."""
    wide, tall = mesh_of(2, 3), mesh_of(3, 2)
    sums = [residual_sums_of(folder / "feedback", wide)]
    model, optimizer, state = made(tall, "feedback")
    load(folder / "feedback", model, optimizer, None)
    state.load_checkpoint(folder / "feedback")
    sums.append(residual_sums(state, tall))
    train(model, optimizer, range(2))
    assert replicas_are_equal(model, tall)
    return sums


def test_it_is_resumed_to_the_bit_and_on_other_meshes(tmp_path: Path) -> None:
    four = run_ranks(4, on_four, tmp_path, tmp_path)
    for found in four:
        assert all(value for what, value in found.items() if what != "sums"), found
    for sums in run_ranks(6, on_six, tmp_path / "six", tmp_path):
        for now in sums:
            assert all(torch.equal(now[name], total) for name, total in four[0]["sums"].items())
