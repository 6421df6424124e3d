"""How q changes: with the steps, from tensor to tensor, and by what a step would lose.

Each of these can stand where a hook or the server's worker takes q; q is the fraction of a gradient
that is not sent, and 1 - q its density.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias, get_args

from topq_dist.validation import check_fraction, check_number

QShape = Literal["exponential", "linear", "constant"]


@dataclass(frozen=True, kw_only=True)
class QSchedule:
    """q by the step: from `start` to `end` in the first `steps` steps, and `end` from then on.

    shape: "exponential" multiplies the density by the same factor in each step (the warm-up of
        "Deep Gradient Compression", ICLR 2018); "linear" adds the same to it; "constant" stays at
        `start` until the last of them.

    Steps are those whose gradients were finite. Raises TypeError or ValueError, naming the field,
    for what is no fraction or no number of steps, and for an exponential that ends at q = 1, or
    begins there.
    """

    start: float
    end: float
    steps: int
    shape: QShape = "exponential"

    def __post_init__(self) -> None:
        _set_fraction(self, "start")
        _set_fraction(self, "end")
        if _whole("steps", self.steps) < 1:
            raise ValueError(f"steps={self.steps!r}: expected a number of steps above zero")
        if self.shape not in get_args(QShape):
            raise ValueError(f"shape={self.shape!r}: expected one of {', '.join(get_args(QShape))}")
        if self.shape == "exponential":
            for name in ("start", "end"):
                if getattr(self, name) == 1.0:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} with shape='exponential': expected less, "
                        "since no factor leads to or from a density of 0"
                    )

    def at(self, step: int) -> float:
        """Return the q of a step, counted from 0."""
        if step >= self.steps:
            return self.end
        if self.shape == "constant":
            return self.start
        part = step / self.steps
        if self.shape == "linear":
            return self.start + (self.end - self.start) * part
        first, last = 1.0 - self.start, 1.0 - self.end
        # the first as it is: 1 - (1 - q) need not be q
        return self.start if step == 0 else 1.0 - first * (last / first) ** part


@dataclass(frozen=True, kw_only=True)
class QByTensor:
    """q by the tensor: the first of these that says one.

    patterns: q by a pattern of the parameter's name, as a shell's (`*`, `?`, `[...]`), the first
        that fits. Each must fit a parameter of the model.
    whole_below: tensors of fewer elements travel whole.
    whole_vectors: so do those of one dimension or none, which biases and norms are.
    q: of all others, a number or a schedule, as those of patterns are.

    Raises TypeError or ValueError, naming the field, for what is none of these.
    """

    q: float | QSchedule
    patterns: Mapping[str, float | QSchedule] = field(default_factory=dict)
    whole_below: int = 0
    whole_vectors: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "q", _fraction_or_schedule("q", self.q))
        if not isinstance(self.patterns, Mapping):
            raise TypeError(f"patterns={self.patterns!r}: expected a dict of q by pattern")
        checked = {}
        for pattern, q in self.patterns.items():
            if not isinstance(pattern, str):
                raise TypeError(f"patterns has {pattern!r}: expected a text")
            checked[pattern] = _fraction_or_schedule(f"patterns[{pattern!r}]", q)
        object.__setattr__(self, "patterns", checked)
        if _whole("whole_below", self.whole_below) < 0:
            raise ValueError(f"whole_below={self.whole_below!r}: expected a number from 0 on")
        if not isinstance(self.whole_vectors, bool):
            raise TypeError(f"whole_vectors={self.whole_vectors!r}: expected True or False")

    def of(self, name: str, numel: int, dimensions: int, step: int) -> float:
        """Return the q of a tensor in a step."""
        for pattern, q in self.patterns.items():
            if fnmatchcase(name, pattern):
                return q_at(q, step)
        if numel < self.whole_below or (self.whole_vectors and dimensions < 2):
            return 0.0
        return q_at(self.q, step)

    def check_names(self, names: Mapping[str, Any]) -> None:
        """Raise ValueError, naming it, for a pattern that fits none of these parameters' names."""
        for pattern in self.patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                some = ", ".join(list(names)[:5])
                raise ValueError(
                    f"patterns has {pattern!r}, which fits no parameter: expected a pattern of a "
                    f"name such as {some}"
                )


@dataclass(frozen=True, kw_only=True)
class QByLoss:
    """q by what is lost: as few elements of each tensor as leave no more, within a budget.

    energy: of each tensor's gradient with its residual, the share of the squared norm that is
        selected, in (0, 1].
    residual: instead of it, what the norm of the part that is not selected is at most, times that
        of the gradient without the residual; above 0. One of the two is given.
    budget_bytes: what the frames that a rank makes of a step may take in all. Where the loss asks
        for more, all tensors are cut at the same density, the highest that it allows; at least one
        element of each is sent. Frames of values of fixed width ("int2", "fp16") never exceed it
        where there is one a bucket; entropy-coded values are counted as those, and a bit more for
        each. With exchange="split" a rank makes a frame of each bucket for every rank: what the
        further ones take, their headers above all, is not counted, nor are an owner's means.

    Ranks send what their own gradients ask for. Raises TypeError or ValueError, naming the field.
    """

    energy: float | None = None
    residual: float | None = None
    budget_bytes: int

    def __post_init__(self) -> None:
        if (self.energy is None) == (self.residual is None):
            raise ValueError(
                f"energy={self.energy!r} and residual={self.residual!r}: expected one of the two"
            )
        if self.energy is not None and not check_fraction("energy", self.energy) > 0.0:
            raise ValueError(f"energy={self.energy!r}: expected a number in (0, 1]")
        if self.residual is not None and not check_number("residual", self.residual) > 0.0:
            raise ValueError(f"residual={self.residual!r}: expected a number above zero")
        if _whole("budget_bytes", self.budget_bytes) < 1:
            raise ValueError(f"budget_bytes={self.budget_bytes!r}: expected a number above zero")

    def needed(self, total: float, gradient: float) -> float:
        """Return the least energy to select.

        total, gradient: squared norms of the gradient with its residual, and without.
        """
        if self.residual is not None:
            return total - self.residual**2 * gradient
        return (self.energy or 0.0) * total


QPolicy: TypeAlias = QSchedule | QByTensor | QByLoss


def check_q(q: Any) -> float | QPolicy:
    """Return `q`, or raise TypeError or ValueError unless it is a fraction or a policy."""
    if isinstance(q, QSchedule | QByTensor | QByLoss):
        return q
    if isinstance(q, type) or not isinstance(q, float | int):
        # numpy's numbers are fractions as well
        try:
            return check_fraction("q", q)
        except TypeError:
            raise TypeError(
                f"q={q!r}: expected a number in [0, 1], a QSchedule, a QByTensor or a QByLoss"
            ) from None
    return check_fraction("q", q)


def q_at(q: float | QSchedule, step: int) -> float:
    """Return the q of a step, counted from 0."""
    return q.at(step) if isinstance(q, QSchedule) else q


def _fraction_or_schedule(name: str, q: Any) -> float | QSchedule:
    return q if isinstance(q, QSchedule) else check_fraction(name, q)


def _set_fraction(policy: Any, name: str) -> None:
    object.__setattr__(policy, name, check_fraction(name, getattr(policy, name)))


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r}: expected a whole number")
    return value
