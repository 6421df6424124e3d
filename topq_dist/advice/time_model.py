"""A model of time: a step is its own compute, what a method adds to it, and what the link takes.

The three are added up. Some of the exchange goes on beside the backward pass, so that a step may
take less: by no more than that pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from topq_dist.compress.defaults import DEFAULT_Q, DEFAULT_VALUE_FORMAT
from topq_dist.validation import check_number, check_positive

MethodKind = Literal["dense", "fp16", "PowerSGD", "top-Q", "local steps"]
# a method is worth its trouble where it is faster than dense by more
_ALIKE = 1.05
# of methods so near to the fastest, the one that changes training least
_NEAR = 1.10
# above this share of a step the link is what a step waits for
_LINK_BOUND = 0.5


class Traffic(NamedTuple):
    """Collectives of one kind in a round: how many, and the bytes a rank hands to all of them.

    collective: torch's name and the dtype, as "all_reduce float32".
    """

    collective: str
    calls: int
    handed_bytes: int

    def wire_bytes(self, world_size: int) -> float:
        """Return what a rank puts on its link, forwarding in rings included."""
        kind = self.collective.split()[0]
        if kind == "all_reduce":
            return 2 * (world_size - 1) / world_size * self.handed_bytes
        return (world_size - 1) * self.handed_bytes if kind == "all_gather" else self.handed_bytes


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way of exchanging gradients; what does not apply to it is None.

    power_rank: of PowerSGD's approximation. every: steps from one exchange to the next.
    """

    kind: MethodKind
    q: float | None = None
    value_format: str | None = None
    exchange: Literal["allgather", "split"] | None = None
    power_rank: int | None = None
    every: int = 1

    @property
    def title(self) -> str:
        """The method in a few words."""
        words = [str(self.kind)]
        if self.power_rank is not None:
            words.append(f"rank {self.power_rank}")
        if self.every > 1:
            words.append(f"every={self.every}")
        if self.q is not None:
            words.append(f"q={self.q:g} {self.value_format}")
        if self.exchange == "split":
            words.append("split")
        return " ".join(words)


@dataclass(frozen=True, kw_only=True)
class MethodCost:
    """A method's seconds of a step's computation, and its traffic from one exchange to the next."""

    method: Method
    engine_s: float
    traffic: tuple[Traffic, ...]


class CollectiveTimes(Protocol):
    """How long collectives take on a link."""

    def seconds(self, collective: str, handed_bytes: float) -> float:
        """Return the seconds of one to which each rank hands so many bytes."""


@dataclass(frozen=True, kw_only=True)
class GivenLink:
    """A link of known bandwidth and one-way latency between any two of `world_size` hosts.

    An all-reduce is a ring of 2 (W - 1) rounds, an all-gather one of W - 1; an all-to-all and a
    broadcast take one. Raises TypeError or ValueError for a number out of place.
    """

    bandwidth_bits_per_s: float
    latency_s: float
    world_size: int

    def __post_init__(self) -> None:
        check_positive("bandwidth_bits_per_s", self.bandwidth_bits_per_s)
        if check_number("latency_s", self.latency_s) < 0:
            raise ValueError(f"latency_s={self.latency_s!r}: expected a number from 0")
        if isinstance(self.world_size, bool) or not isinstance(self.world_size, int):
            raise TypeError(f"world_size={self.world_size!r}: expected an integer")
        if self.world_size < 2:
            raise ValueError(f"world_size={self.world_size}: expected at least 2 ranks")

    def seconds(self, collective: str, handed_bytes: float) -> float:
        """Return the seconds of one to which each rank hands so many bytes."""
        kind = collective.split()[0]
        hops = {"all_reduce": 2 * (self.world_size - 1), "all_gather": self.world_size - 1}
        wire_bytes = Traffic(collective, 1, 1).wire_bytes(self.world_size) * handed_bytes
        return hops.get(kind, 1) * self.latency_s + 8 * wire_bytes / self.bandwidth_bits_per_s


@dataclass(frozen=True, kw_only=True)
class MeasuredLink:
    """Measured times by collective: (bytes handed, seconds), from few bytes to many.

    Between two sizes the time is on the line through both, beyond the last on the last line.
    """

    points: Mapping[str, Sequence[tuple[int, float]]]

    def seconds(self, collective: str, handed_bytes: float) -> float:
        """Return the seconds of one to which each rank hands so many bytes."""
        points = self.points[collective]
        upper = next(
            (place for place in range(1, len(points)) if points[place][0] >= handed_bytes),
            len(points) - 1,
        )
        (low_bytes, low_s), (high_bytes, high_s) = points[upper - 1], points[upper]
        # more bytes in less time are noise
        slope = max(0.0, high_s - low_s) / (high_bytes - low_bytes)
        return max(low_s + slope * (handed_bytes - low_bytes), points[0][1])


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A step under a method, in seconds; `wire_bytes` is what a rank puts on its link in it."""

    method: Method
    compute_s: float
    engine_s: float
    link_s: float
    wire_bytes: float

    @property
    def step_s(self) -> float:
        """The whole step, nothing of it beside anything else."""
        return self.compute_s + self.engine_s + self.link_s


class Recommendation(NamedTuple):
    """The method to use, and why."""

    prediction: Prediction
    reason: str


def predict(
    costs: Iterable[MethodCost], link: CollectiveTimes, *, compute_s: float, world_size: int
) -> list[Prediction]:
    """Return what a step takes under each method, the fastest first.

    Of top-Q by several exchanges only the fastest is there.
    """
    found: dict[tuple[object, ...], Prediction] = {}
    for cost in costs:
        method = cost.method
        one = Prediction(
            method=method,
            compute_s=compute_s,
            engine_s=cost.engine_s,
            link_s=sum(_link_s(traffic, link) for traffic in cost.traffic) / method.every,
            wire_bytes=sum(t.wire_bytes(world_size) for t in cost.traffic) / method.every,
        )
        key = (method.kind, method.q, method.value_format, method.power_rank, method.every)
        if key not in found or one.step_s < found[key].step_s:
            found[key] = one
    return sorted(found.values(), key=lambda one: one.step_s)


def _link_s(traffic: Traffic, link: CollectiveTimes) -> float:
    # of what a link lets pass at once after a pause, a step has one share, not one a collective
    together_s = link.seconds(traffic.collective, traffic.handed_bytes)
    return together_s + (traffic.calls - 1) * link.seconds(traffic.collective, 0)


def recommend(predictions: Sequence[Prediction]) -> Recommendation:
    """Return the method to use; `predictions` are those of `predict`, dense among them.

    Dense, unless another is over 5 % faster; else of those within 10 % of the fastest the one that
    changes training least: fp16, then top-Q from its defaults to higher q, then PowerSGD. Local
    steps, whose rates have to be found, only where the fastest of the others waits for the link
    for more than half of a step.
    """
    dense = next(one for one in predictions if one.method.kind == "dense")
    each_step = [one for one in predictions if one.method.kind != "local steps"]
    fastest = min(each_step, key=lambda one: one.step_s)
    if dense.step_s <= _ALIKE * fastest.step_s:
        return Recommendation(dense, f"leave it off: {_beside(dense, each_step)}")
    if fastest.link_s > _LINK_BOUND * fastest.step_s:
        local = [one for one in predictions if one.method.kind == "local steps"]
        best = min(local, key=lambda one: one.step_s, default=fastest)
        if _NEAR * best.step_s < fastest.step_s:
            return Recommendation(
                best,
                f"{best.method.title}: {_ms(best)} a step where dense takes {_ms(dense)}; "
                f"{fastest.method.title}, the fastest that exchanges every step, spends "
                f"{100 * fastest.link_s / fastest.step_s:.0f} % of its {_ms(fastest)} on the link",
            )
    others = [one for one in each_step if one is not dense]
    near = [one for one in others if one.step_s <= _NEAR * fastest.step_s]
    best = min(near, key=_change)
    return Recommendation(
        best,
        f"{best.method.title}: {_ms(best)} a step where dense takes {_ms(dense)}, "
        f"{dense.step_s / best.step_s:.1f} x faster"
        + (
            ""
            if best is fastest
            else f"; {fastest.method.title} takes {_ms(fastest)}, too little less to "
            "change training more"
        ),
    )


def _beside(dense: Prediction, each_step: Sequence[Prediction]) -> str:
    others = [one for one in each_step if one is not dense]
    if not others:
        return f"dense takes {_ms(dense)} a step"
    other = min(others, key=lambda one: one.step_s)
    return (
        f"dense takes {_ms(dense)} a step, and {other.method.title}, the fastest other that "
        f"exchanges every step, {_ms(other)}"
    )


def _change(one: Prediction) -> tuple[float, ...]:
    """Return how much a method changes training, as far as this knows."""
    method = one.method
    order = ("fp16", "top-Q", "PowerSGD")
    beyond = max(0.0, (method.q or 0.0) - DEFAULT_Q)
    unusual = method.value_format != DEFAULT_VALUE_FORMAT
    return (order.index(method.kind), beyond, float(unusual), one.step_s)


def _ms(one: Prediction) -> str:
    return f"{1e3 * one.step_s:.1f} ms"
