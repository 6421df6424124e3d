"""The hook's state as torch's distributed checkpoint takes it: DTensors under names of replicas.

Residuals differ between replicas, so that each has its own under "replica0", "replica1" and so on,
sharded as the parameters are: another number of shards reads them as it reads parameters. What all
ranks have alike is plain tensors, and all keys are there at any time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.tensor import DTensor

from topq_dist.compress.residual import check_residual
from topq_dist.dtypes import accumulate_dtype, local_part
from topq_dist.exchange.registry import ExchangeName
from topq_dist.fsdp.stored_tensors import TensorReader
from topq_dist.hook.momentum import MomentumName, Unit
from topq_dist.hook.parts import HookParts, Ranks

_VERSION = 1
_EXCHANGES = get_args(ExchangeName)
_UNITS = get_args(Unit)
# what a method keeps by name, a tensor of the parameter's shape each
_KEPT: dict[MomentumName, tuple[str, ...]] = {
    "feedback": (),
    "optimizer": (),
    "corrected": ("velocity",),
    "adam": ("first", "second"),
}
_NO_RATES = [-1.0, -1.0, -1.0]
_REMEDY = "give the hook's state load_checkpoint(), which takes any number of replicas"


class Kept(NamedTuple):
    """Of a parameter: its name, itself, and the dtype of its residual."""

    name: str
    parameter: DTensor
    dtype: torch.dtype

    def zeros(self) -> Tensor:
        """Return a residual of its shard, in which nothing is kept."""
        part = local_part(self.parameter.detach())
        return torch.zeros(part.shape, dtype=self.dtype, device=part.device)


def kept(parts: HookParts, dtypes: Mapping[Tensor, torch.dtype]) -> list[Kept]:
    """Return what may be kept of each parameter that trains; dtypes: of their reductions."""
    return [
        Kept(name, one, accumulate_dtype(dtypes[one]))
        for one, name in parts.names.items()
        if one.requires_grad and isinstance(one, DTensor)
    ]


def save(parts: HookParts, ranks: Ranks, of: Sequence[Kept]) -> dict[str, Any]:
    """Return the state of a hook on this rank, of DTensors and tensors in nested dicts."""
    stages = parts.stages
    momentum = stages.momentum.state_dict()
    replica = ranks.context.rank
    chosen = ranks.exchange.chosen
    rates = momentum.get("rates", {})
    mine: dict[str, Any] = {"residuals": _sharded(stages.momentum.residuals(), of)}
    for key in _KEPT[parts.method]:
        mine[key] = _sharded(momentum.get(key, {}), of)
    if parts.method == "adam":
        steps = momentum.get("steps", {})
        mine["steps"] = {one.name: torch.tensor(steps.get(one.name, 0)) for one in of}
    return {
        "version": torch.tensor(_VERSION),
        "replicas": torch.tensor(ranks.context.size),
        "q": torch.tensor(stages.sparsity.state_dict()["q"], dtype=torch.float64),
        "chosen_exchange": torch.tensor(-1 if chosen is None else _EXCHANGES.index(chosen)),
        "dense_steps": torch.tensor(ranks.exchange.dense_steps),
        "unit": torch.tensor(_UNITS.index(momentum["unit"])),
        "coherence": torch.tensor(momentum.get("coherence", [0.0, 0.0]), dtype=torch.float64),
        # a residual that is counted at none has numbers below nought; in two of before, noughts
        "rates": {
            one.name: torch.tensor(rates.get(one.name, _NO_RATES), dtype=torch.float64)
            for one in of
        },
        f"replica{replica}": mine,
    }


class Loaded(NamedTuple):
    """A state that was read: `mine` are the replicas that this one takes over, of `every`."""

    common: Mapping[str, Any]
    mine: Sequence[Mapping[str, Any]]
    every: Sequence[Mapping[str, Any]]
    is_own: bool


def loaded_of_own(state: Mapping[str, Any], ranks: Ranks) -> Loaded:
    """Return what `save` has returned to as many replicas; raises ValueError for another state."""
    replicas = _whole(state, "replicas")
    if _whole(state, "version") != _VERSION:
        raise ValueError(f"state has version={_whole(state, 'version')}: expected {_VERSION}")
    if replicas != ranks.context.size:
        raise ValueError(
            f"state is of {replicas} replicas, and here are {ranks.context.size}: {_REMEDY}"
        )
    mine = state.get(f"replica{ranks.context.rank}")
    if not isinstance(mine, Mapping):
        raise ValueError(
            f"state lacks 'replica{ranks.context.rank}': expected what state_dict returned on a "
            "rank of this replica"
        )
    return Loaded(state, [mine], [mine], is_own=True)


class Empty(NamedTuple):
    """A state to be read into: of `replicas` that were saved, what this rank takes, by number."""

    reader: TensorReader
    template: dict[str, Any]
    replicas: int
    mine: Sequence[int]
    every: Sequence[int]
    is_own: bool


def prepare(
    parts: HookParts, ranks: Ranks, of: Sequence[Kept], checkpoint_id: str, key: str
) -> Empty:
    """Return what a checkpoint in a folder, of any number of replicas, is to be read into.

    Raises ValueError where there is no state under `key`, or anything but tensors; OSError.
    """
    context = ranks.context
    reader = TensorReader(checkpoint_id)
    reader.check_tensors(key)
    replicas = 0
    while any(name.startswith(f"{key}.replica{replicas}.") for name in reader.described):
        replicas += 1
    if not replicas:
        raise ValueError(f"{checkpoint_id} has no state under {key!r}: expected the hook's")
    if replicas == context.size:
        mine = every = [context.rank]
    else:
        mine = list(range(context.rank, replicas, context.size))
        every = list(range(replicas))
    template = {
        name: value
        for name, value in save(parts, ranks, of).items()
        if not name.startswith("replica")
    }
    # earlier versions have none, or two of each
    template["rates"] = {
        name: rates[:2].clone() if tuple(stored.size) == (2,) else rates
        for name, rates in template["rates"].items()
        if isinstance(stored := reader.described.get(f"{key}.rates.{name}"), TensorStorageMetadata)
    }
    # of the others only what `every` one is asked for
    own = _KEPT[parts.method] if parts.method == "adam" else ()
    for replica in sorted({*mine, *(every if own else [])}):
        held: dict[str, Any] = {}
        for kind in ("residuals", *_KEPT[parts.method]):
            if replica in mine or kind in own:
                held[kind] = _sharded({}, of)
        if own:
            held["steps"] = {one.name: torch.tensor(0) for one in of}
        template[f"replica{replica}"] = held
    return Empty(reader, template, replicas, mine, every if own else mine, replicas == context.size)


def read(empty: Empty, key: str) -> Loaded:
    """Read a state out of a checkpoint in a folder; a collective.

    Raises torch's CheckpointException on every rank where one cannot read it.
    """
    template = empty.template
    load({key: template}, storage_reader=empty.reader)
    return Loaded(
        template,
        [template[f"replica{replica}"] for replica in empty.mine],
        [template[f"replica{replica}"] for replica in empty.every],
        is_own=empty.is_own,
    )


def as_hook_state(held: Mapping[str, Any], loaded: Loaded, of: Sequence[Kept]) -> dict[str, Any]:
    """Return what a replica has saved as the momentum's methods take it, of this rank's shards.

    Raises TypeError or ValueError, naming it, for what cannot be.
    """
    tensors = {kind: _local(kind, given, of) for kind, given in held.items() if kind != "steps"}
    momentum: dict[str, Any] = {
        "unit": _UNITS[_whole(loaded.common, "unit")],
        "coherence": loaded.common["coherence"].tolist(),
        "rates": _rates(loaded.common, of),
    }
    if "steps" in held:
        steps = {one.name: int(held["steps"][one.name]) for one in of}
        momentum["steps"] = {name: step for name, step in steps.items() if step}
    for kind in tensors.keys() - {"residuals"}:
        momentum[kind] = tensors[kind]
        if "steps" in momentum:
            some = momentum["steps"]
            momentum[kind] = {name: one for name, one in tensors[kind].items() if name in some}
    # what is all zero need not be kept
    residuals = {name: one for name, one in tensors.get("residuals", {}).items() if bool(one.any())}
    return {"residuals": residuals, "momentum": momentum}


def _rates(common: Mapping[str, Any], of: Sequence[Kept]) -> dict[str, list[float]]:
    given = common.get("rates", {})
    if not isinstance(given, Mapping):
        raise TypeError(f"state has rates={given!r}: expected a tensor by name")
    rates = {one.name: given[one.name] for one in of if one.name in given}
    for name, numbers in rates.items():
        if not isinstance(numbers, Tensor) or tuple(numbers.shape) not in ((2,), (3,)):
            raise ValueError(f"state has rates[{name!r}]={numbers!r}: expected a tensor of three")
    held = {name: [float(one) for one in numbers] for name, numbers in rates.items()}
    return {
        name: numbers
        for name, numbers in held.items()
        if min(numbers) >= 0 and (len(numbers) == 3 or any(numbers))
    }


def chosen_in(loaded: Loaded) -> str | None:
    """Return what "auto" had chosen for as many replicas."""
    number = _whole(loaded.common, "chosen_exchange")
    return _EXCHANGES[number] if loaded.is_own and number >= 0 else None


def _sharded(held: Mapping[str, Tensor], of: Sequence[Kept]) -> dict[str, DTensor]:
    """Return tensors of this rank's shards as DTensors, zeros where there is none."""
    sharded = {}
    for one in of:
        name, parameter = one.name, one.parameter
        local = held.get(name)
        if local is None:
            local = one.zeros()
        sharded[name] = DTensor.from_local(
            local,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
    return sharded


def _local(kind: str, given: Mapping[str, Any], of: Sequence[Kept]) -> dict[str, Tensor]:
    tensors = {}
    for name, parameter, _ in of:
        if name not in given:
            raise ValueError(f"state lacks {name!r} among its {kind}: expected every parameter")
        local = local_part(given[name])
        check_residual(name, local)
        expected = tuple(local_part(parameter).shape)
        if tuple(local.shape) != expected:
            raise ValueError(
                f"state has {name!r} among its {kind} with shape {tuple(local.shape)} on this "
                f"rank: expected {expected}"
            )
        tensors[name] = local
    return tensors


def _whole(state: Mapping[str, Any], key: str) -> int:
    value = state.get(key) if isinstance(state, Mapping) else None
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise ValueError(f"state has {key}={value!r}: expected what state_dict returned")
    return int(value)
