"""Configuration of a parameter server, checked at construction."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

Mode = Literal["sync", "async"]
Downlink = Literal["exact", "topq", "dense"]
Momentum = Literal["feedback", "optimizer"]


def _check_whole(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: expected a whole number of at least {least}")


def _check(name: str, value: float, least: float, *, above: bool = False) -> None:
    wrong_type = isinstance(value, bool) or not isinstance(value, int | float)
    if wrong_type or not math.isfinite(value) or value < least or (above and value == least):
        bound = "above" if above else "of at least"
        raise ValueError(f"{name}={value!r}: expected a number {bound} {least}")


def _idle(name: str, value: object, switch: str, is_now: str, needed: str) -> str:
    return f"{name}={value!r}: no effect with {switch}={is_now!r}, expected {switch}={needed!r}"


@dataclass(frozen=True, kw_only=True)
class GroupRule:
    """Hyperparameters of the tensors whose names match `pattern` (as fnmatch does)."""

    pattern: str
    options: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """All that decides the numbers: kept in the snapshot, and the same at every restart.

    inner_opt: name of a class of torch.optim, in any case. options: its keyword arguments.
    groups: the first rule that matches a tensor's name overrides options for it.
    momentum: "feedback" takes it out of the inner optimizer's steps on sparse pushes, since the
        workers' error feedback acts as one; "optimizer" leaves it in. None: as the run began, and
        "feedback" for a new one; runs of before this could be said began with "optimizer".
    mode: "sync" averages one push of each live worker a version; "async" applies each as it comes.
    max_staleness: versions that a push may lag behind in async mode; older ones are refused.
    downlink: "exact" sends each element that changed, "topq" the top-Q part (q) of what workers
        lack, as value_format (None: the tensors' own), "dense" everything.

    Raises ValueError, naming it, for a value out of place, or one without effect beside the others.
    """

    inner_opt: str
    options: Mapping[str, Any] = field(default_factory=dict)
    groups: tuple[GroupRule, ...] = ()
    momentum: Momentum | None = None
    mode: Mode = "sync"
    max_staleness: int = 16
    downlink: Downlink = "exact"
    q: float = 0.99
    value_format: str | None = None

    def __post_init__(self) -> None:
        if self.momentum is not None and self.momentum not in get_args(Momentum):
            known = ", ".join(get_args(Momentum))
            raise ValueError(f"momentum={self.momentum!r}: expected one of {known}, or None")
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode={self.mode!r}: expected one of {', '.join(get_args(Mode))}")
        if self.downlink not in get_args(Downlink):
            known = ", ".join(get_args(Downlink))
            raise ValueError(f"downlink={self.downlink!r}: expected one of {known}")
        _check_whole("max_staleness", self.max_staleness, 0)
        _check("q", self.q, 0)
        if self.q > 1:
            raise ValueError(f"q={self.q!r}: expected a number in [0, 1]")
        self._check_idle("mode", "async", "max_staleness")
        self._check_idle("downlink", "topq", "q", "value_format")

    def begun(self, saved: Mapping[str, Any] | None = None) -> TrainingConfig:
        """Return this, what it leaves open filled in: from `saved`, the run's; None: it is new."""
        if self.momentum is not None:
            return self
        if saved is None:
            return replace(self, momentum="feedback")
        return replace(self, momentum=saved.get("momentum", "optimizer"))

    def _check_idle(self, switch: str, needed: str, *names: str) -> None:
        """Refuse what is given beside a switch with which it has no effect."""
        defaults = {one.name: one.default for one in fields(self)}
        for name in names:
            value = getattr(self, name)
            if getattr(self, switch) != needed and value != defaults[name]:
                raise ValueError(_idle(name, value, switch, getattr(self, switch), needed))


@dataclass(frozen=True, kw_only=True)
class ServingConfig:
    """All that may change at a restart.

    start_workers: the first version waits until so many have joined. min_workers: no version is
    made of fewer live ones. max_workers: no more can join.
    lease_s: a worker not heard of for so long is gone. round_timeout_s: a round that waits longer
    after its first push closes without the rest; None waits for every live worker.
    snapshot_every: versions between two snapshots; 1 makes each durable before it is answered.
    history_bytes: recent updates kept for workers that catch up or come back.
    max_model_bytes: of the values that a worker may bring.

    Raises ValueError for a value out of place, naming it.
    """

    start_workers: int = 1
    min_workers: int = 1
    max_workers: int = 64
    lease_s: float = 60.0
    round_timeout_s: float | None = None
    snapshot_every: int = 50
    history_bytes: int = 256 << 20
    max_model_bytes: int = 64 << 30

    def __post_init__(self) -> None:
        _check_whole("start_workers", self.start_workers, 1)
        _check_whole("min_workers", self.min_workers, 1)
        _check_whole("max_workers", self.max_workers, max(self.start_workers, self.min_workers))
        _check("lease_s", self.lease_s, 0, above=True)
        if self.round_timeout_s is not None:
            _check("round_timeout_s", self.round_timeout_s, 0, above=True)
        _check_whole("snapshot_every", self.snapshot_every, 1)
        _check_whole("history_bytes", self.history_bytes, 0)
        _check_whole("max_model_bytes", self.max_model_bytes, 1)


def check_together(training: TrainingConfig, serving: ServingConfig) -> None:
    """Raise ValueError, naming it, for what one of them says and the other gives no effect."""
    if training.mode != "sync" and serving.round_timeout_s is not None:
        value = serving.round_timeout_s
        raise ValueError(_idle("round_timeout_s", value, "mode", training.mode, "sync"))
