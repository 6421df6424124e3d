"""A worker's saved state: made, and read back checked."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from topq_dist.compress.residual import check_residual
from topq_dist.compress.residual_rates import check_rates
from topq_dist.ps.client.local_steps import SavedLocal, read_saved_local
from topq_dist.ps.client.param_groups import SavedGroups
from topq_dist.ps.client.replay_log import ReplayLog
from topq_dist.ps.client.server_client import ServerClient
from topq_dist.ps.client.shard import Shard
from topq_dist.ps.model.flat import FlatModel
from topq_dist.ps.protocol.types import ModelVersion, point_from_state
from topq_dist.telemetry import Stats
from topq_dist.validation import check_number


@dataclass(frozen=True, kw_only=True)
class SavedShard:
    """All that was saved of one server's part.

    model_sha256: tells which parameters belong to it. rates: those that residuals are counted at;
    empty in a state of before they followed any.
    """

    run: str
    point: ModelVersion
    pushes: ReplayLog
    residuals: Mapping[str, Tensor]
    model_sha256: str
    rates: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class SavedWorker:
    """All that was saved of a worker, beside its parameter groups.

    density: what its q or policy has saved; empty in a state of before there were policies. local:
    None of a worker without local steps.
    """

    open: bool
    groups: SavedGroups
    stats: Stats
    density: Mapping[str, Any]
    shards: tuple[SavedShard, ...]
    local: SavedLocal | None


class Resumed:
    """A loaded state, until the parameters are looked at: the model may be loaded later.

    local: what parameters were after the last round, of a worker with local steps.
    """

    def __init__(self, shards: Sequence[SavedShard] = (), local: SavedLocal | None = None) -> None:
        self._shards = shards
        self._local = local

    def held(self, shards: Sequence[Shard]) -> Mapping[str, Tensor]:
        """Return what the parameters were after the last round, by name."""
        if self._local is not None:
            return self._local.held
        models = [shard.model.tensors() for shard in shards]
        return {name: tensor for model in models for name, tensor in model.items()}

    def sha256(self, shards: Sequence[Shard]) -> list[str]:
        """Return the SHA-256 of each shard's values."""
        if self._shards:
            return [saved.model_sha256 for saved in self._shards]
        return [model_sha256(shard.model) for shard in shards]

    def take_up(self, shards: Sequence[Shard], clients: Sequence[ServerClient]) -> list[Shard]:
        """Read the parameters after a load; return the shards where they are not the saved ones."""
        elsewhere = []
        for shard, client, saved in zip(shards, clients, self._shards, strict=False):
            if self._local is None:
                shard.read_parameters()
            else:
                shard.hold(self._local.held)
            if model_sha256(shard.model) != saved.model_sha256:
                elsewhere.append(shard)
                client.resync_from("the parameters are not those that were saved with this state")
        return elsewhere


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
        "rates": shard.rates.state(),
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
        if set(state["stats"]) != set(vars(Stats())):
            raise ValueError(f"state_dict has stats of {list(state['stats'])}")
        for key, total in state["stats"].items():
            check_number(f"stats[{key!r}]", total)
        density = state.get("density", {})
        if not isinstance(density, Mapping):
            raise TypeError(f"state_dict has density={density!r}: expected a dict")
        return SavedWorker(
            open=bool(state["open"]),
            groups=SavedGroups.read(state, len(state_dict["param_groups"])),
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
    rates = state.get("rates", {})
    check_rates(rates)
    pushes = ReplayLog.from_state(state["pushes"])
    pushes.check_frames([vector.numel for vector in shard.spec.vectors], len(shard.names))
    return SavedShard(
        run=str(state["run"]),
        point=point_from_state(state["point"]),
        pushes=pushes,
        residuals=state["residuals"],
        model_sha256=str(state["model_sha256"]),
        rates=rates,
    )
