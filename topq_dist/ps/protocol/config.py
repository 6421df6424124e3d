"""Configuration of a parameter server, checked at construction."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

Mode = Literal["sync", "async"]
Downlink = Literal["exact", "topq", "dense"]
Momentum = Literal["feedback", "optimizer"]


class ConfigError(ValueError):
    """A configuration that cannot be: `field` names what is out of place, as the message does."""

    def __init__(self, field: str, value: object, problem: str) -> None:
        super().__init__(f"{field}={value!r}: {problem}")
        self.field = field


def _option(
    text: str,
    *,
    option: str = "",
    only_with: tuple[str, str] | None = None,
    metavar: str | None = None,
    derives: bool = False,
) -> dict[str, Any]:
    """Return the metadata of a field, from which cli/options.py makes an option of `topq serve`.

    text: its help. option: its name, where it is not the field's. only_with: the field and its
    value without which this one has no effect. derives: others follow from it where it is given,
    so that it has no default of its own.
    """
    return {
        "text": text,
        "option": option,
        "only_with": only_with,
        "metavar": metavar,
        "derives": derives,
    }


def option_of(config: type, name: str) -> str:
    """Return the option of `topq serve` that sets this field, as "--inner-opt"."""
    said = next(one.metadata["option"] for one in fields(config) if one.name == name)
    return str(said) or "--" + name.replace("_", "-")


def _check_whole(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(name, value, f"expected a whole number of at least {least}")


def _check(name: str, value: float, least: float, *, above: bool = False) -> None:
    wrong_type = isinstance(value, bool) or not isinstance(value, int | float)
    if wrong_type or not math.isfinite(value) or value < least or (above and value == least):
        bound = "above" if above else "of at least"
        raise ConfigError(name, value, f"expected a number {bound} {least}")


def _check_one_of(name: str, value: object, known: Any, otherwise: str = "") -> None:
    if value not in get_args(known):
        raise ConfigError(name, value, f"expected one of {', '.join(get_args(known))}{otherwise}")


def _idle(name: str, value: object, switch: str, is_now: str, needed: str) -> ConfigError:
    problem = f"no effect with {switch}={is_now!r}, expected {switch}={needed!r}"
    return ConfigError(name, value, problem)


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
    adapt_rate: with momentum "feedback" and an inner optimizer of Adam's kind, multiply its rate on
        sparse pushes by what their coherence with the workers' residuals says; elsewhere True is
        refused. None: as the run began, and True for a new one; runs of before this could be said
        began without.
    mode: "sync" averages one push of each live worker a version; "async" applies each as it comes.
    max_staleness: versions that a push may lag behind in async mode; older ones are refused.
    downlink: "exact" sends each element that changed, "topq" the top-Q part (q) of what workers
        lack, as value_format (None: the tensors' own), "dense" everything.

    Raises ConfigError for a value out of place, or one without effect beside the others.
    """

    inner_opt: str = field(
        metadata=_option(
            "The inner optimizer: a class of torch.optim, in any case.", metavar="NAME"
        )
    )
    options: Mapping[str, Any] = field(
        default_factory=dict,
        metadata=_option(
            "A keyword argument of it, such as betas=(0.9,0.95); again for each. In the variable"
            " parted by ';'.",
            option="--inner-option",
        ),
    )
    groups: tuple[GroupRule, ...] = field(
        default=(),
        metadata=_option(
            "Other arguments for the tensors whose names match, such as '*.bias:weight_decay=0';"
            " the first that matches counts. In the variable parted by ';'.",
            option="--group",
        ),
    )
    momentum: Momentum | None = field(
        default=None,
        metadata=_option(
            "feedback: taken out of the inner optimizer while pushes are sparse, since workers'"
            " error feedback acts as one. optimizer: left in it.  [default: as the run began,"
            " feedback for a new one]"
        ),
    )
    adapt_rate: bool | None = field(
        default=None,
        metadata=_option(
            "With feedback and an optimizer of Adam's kind: raise its rate on sparse pushes where"
            " gradients agree over steps.  [default: as the run began, true for a new one]"
        ),
    )
    mode: Mode = field(
        default="sync",
        metadata=_option(
            "sync: a version averages a push of each live worker. async: each is applied as it"
            " comes."
        ),
    )
    max_staleness: int = field(
        default=16,
        metadata=_option(
            "async: versions that a push may lag behind.", only_with=("mode", "async")
        ),
    )
    downlink: Downlink = field(
        default="exact",
        metadata=_option(
            "What workers are sent: what changed, the top-Q part of what they lack, or all."
        ),
    )
    q: float = field(
        default=0.99,
        metadata=_option(
            "topq: the part of what workers lack that is left for later.",
            option="--downlink-q",
            only_with=("downlink", "topq"),
        ),
    )
    value_format: str | None = field(
        default=None,
        metadata=_option(
            "topq: how its values travel; as the tensors' own where left out.",
            option="--downlink-value-format",
            only_with=("downlink", "topq"),
            metavar="FORMAT",
        ),
    )

    def __post_init__(self) -> None:
        if self.momentum is not None:
            _check_one_of("momentum", self.momentum, Momentum, ", or None")
        if self.adapt_rate is not None and not isinstance(self.adapt_rate, bool):
            raise ConfigError("adapt_rate", self.adapt_rate, "expected True or False, or None")
        if self.adapt_rate and self.momentum == "optimizer":
            raise _idle("adapt_rate", self.adapt_rate, "momentum", self.momentum, "feedback")
        _check_one_of("mode", self.mode, Mode)
        _check_one_of("downlink", self.downlink, Downlink)
        _check_whole("max_staleness", self.max_staleness, 0)
        _check("q", self.q, 0)
        if self.q > 1:
            raise ConfigError("q", self.q, "expected a number in [0, 1]")
        for one in fields(self):
            value, (switch, needed) = getattr(self, one.name), one.metadata["only_with"] or ("", "")
            if switch and getattr(self, switch) != needed and value != one.default:
                raise _idle(one.name, value, switch, getattr(self, switch), needed)

    def begun(self, saved: Mapping[str, Any] | None = None) -> TrainingConfig:
        """Return this, what it leaves open filled in: from `saved`, the run's; None: it is new."""
        momentum: Momentum = self.momentum or (
            "feedback" if saved is None else saved.get("momentum", "optimizer")
        )
        adapt_rate = self.adapt_rate
        if adapt_rate is None and momentum == "feedback":  # elsewhere it has no effect
            adapt_rate = saved is None or bool(saved.get("adapt_rate", False))
        if (momentum, adapt_rate) == (self.momentum, self.adapt_rate):
            return self
        return replace(self, momentum=momentum, adapt_rate=adapt_rate)


@dataclass(frozen=True, kw_only=True)
class ServingConfig:
    """All that may change at a restart.

    start_workers: the first version waits until so many have joined; in async mode nobody waits.
    min_workers: no version is made of fewer live ones, in sync mode. max_workers: no more can join.
    lease_s: a worker not heard of for so long is gone. round_timeout_s: a round that waits longer
    after its first push closes without the rest, who are not waited for until they push again; None
    waits for every live worker, for ever where one is silent and renews its lease.
    snapshot_every: versions between two snapshots; 1 makes each durable before it is answered.
    history_bytes: recent updates kept for workers that catch up or come back.
    max_model_bytes: of the values that a worker may bring. max_lr: of the rates that one may set.
    metrics, http: where Prometheus and people may look on, HOST:PORT; None: nowhere. Workers then
    report their loss and residuals as well.

    Raises ConfigError for a value out of place.
    """

    start_workers: int = field(
        default=1,
        metadata=_option(
            "The first version waits for so many (sync; with async nobody waits), and no more can"
            " join; later ones go on with those that are alive.",
            option="--workers",
            derives=True,
        ),
    )
    min_workers: int = field(
        default=1,
        metadata=_option(
            "sync: no version is made of fewer live workers.",
            only_with=("mode", "sync"),
            derives=True,
        ),
    )
    max_workers: int = field(default=64, metadata=_option("No more can join.", derives=True))
    lease_s: float = field(
        default=60.0, metadata=_option("A worker not heard of for so long is gone.")
    )
    round_timeout_s: float | None = field(
        default=600.0,
        metadata=_option(
            "sync: a round closes so long after its first push, and those that missed it are not"
            " waited for until they push again.",
            only_with=("mode", "sync"),
        ),
    )
    snapshot_every: int = field(
        default=50,
        metadata=_option("Versions between snapshots; 1 makes each durable before it is answered."),
    )
    history_bytes: int = field(
        default=256 << 20,
        metadata=_option(
            "Recent updates kept for workers that catch up; 64MB and 64MiB are understood.",
            metavar="BYTES",
        ),
    )
    max_model_bytes: int = field(
        default=64 << 30,
        metadata=_option("The largest model that a worker may bring.", metavar="BYTES"),
    )
    max_lr: float = field(
        default=1000.0, metadata=_option("The highest learning rate that a worker may set.")
    )
    metrics: str | None = field(
        default=None,
        metadata=_option(
            "Serve metrics for Prometheus at http://HOST:PORT/metrics; a PORT alone is of"
            " loopback.",
            metavar="HOST:PORT",
        ),
    )
    http: str | None = field(
        default=None,
        metadata=_option(
            "Serve a status page at http://HOST:PORT/, read-only and in the clear; a PORT alone is"
            " of loopback.",
            metavar="HOST:PORT",
        ),
    )

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
        _check("max_lr", self.max_lr, 0, above=True)
        for name, where in (("metrics", self.metrics), ("http", self.http)):
            if where is not None and not isinstance(where, str):
                raise ConfigError(name, where, "expected HOST:PORT, or None")


def check_together(training: TrainingConfig, serving: ServingConfig) -> None:
    """Raise ConfigError for what one of them says and the other gives no effect, or forbids."""
    for options in (training.options, *(rule.options for rule in training.groups)):
        lr = options.get("lr")
        if isinstance(lr, int | float) and lr > serving.max_lr:
            raise ConfigError("max_lr", serving.max_lr, f"expected at least the run's own lr {lr}")
    if training.mode == "sync":
        return
    if serving.round_timeout_s not in (None, ServingConfig.round_timeout_s):
        raise _idle("round_timeout_s", serving.round_timeout_s, "mode", training.mode, "sync")
    if serving.min_workers != ServingConfig.min_workers:
        raise _idle("min_workers", serving.min_workers, "mode", training.mode, "sync")
