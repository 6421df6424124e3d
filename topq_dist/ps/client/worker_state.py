"""A worker's saved state: made, and read back checked."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from topq_dist.compress.residual import check_residual
from topq_dist.ps.client.local_steps import SavedLocal, read_saved_local
from topq_dist.ps.client.replay_log import ReplayLog
from topq_dist.ps.client.server_client import ServerClient
from topq_dist.ps.client.shard import Shard
from topq_dist.ps.model.flat import FlatModel
from topq_dist.ps.protocol.types import ModelVersion, point_from_state
from topq_dist.telemetry import Stats
from topq_dist.validation import check_number


@dataclass(frozen=True, kw_only=True)
class SavedShard:
    """All that was saved of one server's part; model_sha256 tells which parameters belong to it."""

    run: str
    point: ModelVersion
    pushes: ReplayLog
    residuals: Mapping[str, Tensor]
    model_sha256: str


@dataclass(frozen=True, kw_only=True)
class SavedWorker:
    """All that was saved of a worker, beside its parameter groups.

    told_momentum, told_weight_decay: None in a state of before workers could set it. density: what
    its q or policy has saved; empty in a state of before there were policies. local: None of a
    worker without local steps.
    """

    open: bool
    sends_lr: bool
    told_lr: tuple[float, ...]
    sends_momentum: bool
    told_momentum: tuple[float | None, ...] | None
    sends_weight_decay: bool
    told_weight_decay: tuple[float | None, ...] | None
    stats: Stats
    density: Mapping[str, Any]
    shards: tuple[SavedShard, ...]
    local: SavedLocal | None


def model_sha256(model: FlatModel) -> str:
    """Return the SHA-256 of a model's values."""
    digest = hashlib.sha256()
    for raw in model.raw():
        digest.update(raw)
    return digest.hexdigest()


def shard_state(shard: Shard, client: ServerClient, held_sha256: str) -> dict[str, Any]:
    """Return the state of one server's part."""
    return {
        **client.state_dict(),
        "names": shard.names,
        "residuals": shard.compressor.residuals.state_dict(),
        "model_sha256": held_sha256,
    }


def read_state(state_dict: Mapping[str, Any], worker: str, shards: Sequence[Shard]) -> SavedWorker:
    """Return what `state_dict` of an optimizer holds, checked against worker and parameters.

    Raises TypeError or ValueError.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"state_dict is a {type(state_dict).__name__}: expected what state_dict returned"
        )
    state = state_dict.get("topq")
    if not isinstance(state, Mapping) or "param_groups" not in state_dict:
        raise ValueError("state_dict lacks 'topq' or 'param_groups': expected this optimizer's")
    try:
        if state["worker"] != worker:
            raise ValueError(
                f"state_dict is of worker {state['worker']!r}: expected {worker!r}, so pass "
                f"worker={state['worker']!r} to resume as that one"
            )
        if len(state["servers"]) != len(shards):
            raise ValueError(
                f"state_dict has {len(state['servers'])} servers: expected {len(shards)}"
            )
        if len(state["told_lr"]) != len(state_dict["param_groups"]):
            raise ValueError("state_dict has another number of told_lr than of param_groups")
        if set(state["stats"]) != set(vars(Stats())):
            raise ValueError(f"state_dict has stats of {list(state['stats'])}")
        for key, total in state["stats"].items():
            check_number(f"stats[{key!r}]", total)
        density = state.get("density", {})
        if not isinstance(density, Mapping):
            raise TypeError(f"state_dict has density={density!r}: expected a dict")
        return SavedWorker(
            open=bool(state["open"]),
            sends_lr=bool(state["sends_lr"]),
            told_lr=tuple(check_number("told_lr", lr) for lr in state["told_lr"]),
            sends_momentum=bool(state.get("sends_momentum", False)),
            told_momentum=_told("told_momentum", state),
            sends_weight_decay=bool(state.get("sends_weight_decay", False)),
            told_weight_decay=_told("told_weight_decay", state),
            stats=Stats(**state["stats"]),
            density=density,
            shards=tuple(
                _read_shard(saved, shard)
                for saved, shard in zip(state["servers"], shards, strict=True)
            ),
            local=read_saved_local(state.get("local"), shards),
        )
    except (TypeError, ValueError):
        raise
    except Exception as error:  # there may be anything in it
        raise ValueError(f"state_dict is not this optimizer's: {error!r}") from error


def _told(key: str, state: Mapping[str, Any]) -> tuple[float | None, ...] | None:
    told = state.get(key)
    if told is None:
        return None
    if len(told) != len(state["told_lr"]):
        raise ValueError(f"state_dict has another number of {key} than of param_groups")
    return tuple(None if one is None else check_number(key, one) for one in told)


def _read_shard(state: Mapping[str, Any], shard: Shard) -> SavedShard:
    if list(state["names"]) != shard.names:
        raise ValueError(
            f"state_dict has a server with {state['names']}: expected {shard.names}; the model, or "
            "how it is split over the servers, has changed"
        )
    if state["residuals"] and not shard.compressor.error_feedback:
        raise ValueError("state_dict has residuals: expected error_feedback=True")
    for name, residual in state["residuals"].items():
        check_residual(name, residual)
        expected = shard.parameters[name].shape if name in shard.parameters else None
        if residual.shape != expected:
            raise ValueError(
                f"residual of {name!r} has shape {tuple(residual.shape)}: expected {expected}"
            )
    pushes = ReplayLog.from_state(state["pushes"])
    pushes.check_frames([vector.numel for vector in shard.spec.vectors])
    return SavedShard(
        run=str(state["run"]),
        point=point_from_state(state["point"]),
        pushes=pushes,
        residuals=state["residuals"],
        model_sha256=str(state["model_sha256"]),
    )
