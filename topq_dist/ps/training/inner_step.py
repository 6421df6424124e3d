"""One step of the inner optimizer: without momentum, and at few elements, where that is right.

What a worker leaves out of a push stays in its residual and comes later, which acts as a momentum;
a second one behind it breaks training (docs/parameter_server.md). Where pushes are dense there are
no residuals, and the optimizer's own momentum is as good as ever.

SGD without momentum and weight decay changes nothing where the gradient is zero. Elsewhere its step
is the same operation as torch's, and its bits are the same: see tests/ps/training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from topq_dist.compress.codec.frame import Frame
from topq_dist.compress.coherence import NO_COHERENCE, Coherence, CoherenceMean
from topq_dist.optim.momentum_rules import (
    SPARSE_BELOW,
    divides_by_mean_square,
    momentum_rule,
    takes_momentum_out,
    with_rate_factor,
)
from topq_dist.ps.model.flat import FlatModel, picked, put
from topq_dist.ps.model.spec import ModelSpec
from topq_dist.ps.model.update import SparseDelta
from topq_dist.ps.protocol.config import ConfigError, TrainingConfig
from topq_dist.ps.protocol.types import group_momentum
from topq_dist.ps.training.inner_optimizer import example_optimizers
from topq_dist.ps.training.round_mean import GradientSum


class MomentumOut:
    """Runs sparse steps of an inner optimizer without its momentum, and dense ones with it.

    The groups hold the user's values but for the time of a sparse step. What is sparse follows from
    the pushes alone, and what is kept between steps is in `state`: a replay ends in the same bits.

    enabled: False leaves every step as it is. adapt_rate: multiply the rate of an optimizer that
    divides by the root of a mean of squares by what the pushes' coherence says.
    """

    def __init__(
        self, inner: torch.optim.Optimizer, *, enabled: bool, adapt_rate: bool = True
    ) -> None:
        self._inner = inner
        self.enabled = enabled
        self._rule = momentum_rule(inner) if enabled else None
        # whether the last step ran without a momentum that the user wants
        self._is_out = False
        self.takes_coherence = enabled and adapt_rate and divides_by_mean_square(inner)
        self._coherence = CoherenceMean()

    @contextmanager
    def stepping(
        self,
        pushes: Sequence[Sequence[Frame]],
        coherence: Coherence = NO_COHERENCE,
        numels: Sequence[int] = (),
    ) -> Iterator[None]:
        """Have the block's step run as these pushes ask, each of one frame for each vector.

        coherence: of all of them. numels: as `density` takes them.
        """
        overrides: list[Mapping[str, Any]] = []
        sent = density(pushes, numels)
        if self._rule is not None and takes_momentum_out(sent):
            factor = 1.0
            if self.takes_coherence:
                self._coherence.add(coherence)
                factor = self._coherence.rate_factor(sent)
            overrides = [self._without(group, factor) for group in self._inner.param_groups]
        if not any(overrides):
            self._put_back()
            yield
            return
        self._take_out()
        theirs = [
            {name: group[name] for name in changed}
            for group, changed in zip(self._inner.param_groups, overrides, strict=True)
        ]
        try:
            for group, changed in zip(self._inner.param_groups, overrides, strict=True):
                group.update(changed)
            yield
        finally:
            for group, values in zip(self._inner.param_groups, theirs, strict=True):
                group.update(values)

    def _without(self, group: Mapping[str, Any], factor: float) -> Mapping[str, Any]:
        try:
            values = {} if self._rule is None else self._rule(group)
            return with_rate_factor(group, values, factor, self._inner)
        except ValueError:
            # a worker's lr that overflows where it is scaled is not to end the server, and ruins
            # the model in either case
            return {}

    def _take_out(self) -> None:
        """Forget buffers that a later dense step would apply, though feedback brought all of it."""
        self._is_out = True
        for state in self._inner.state.values():
            state.pop("momentum_buffer", None)

    def _put_back(self) -> None:
        """Give the optimizer what its momentum begins from."""
        if self._is_out:
            self._is_out = False
            for state in self._inner.state.values():
                # the last sparse gradient, whole: with beta1 it would be applied 1 / (1 - beta1)
                # times, and Muon keeps it likewise
                if "exp_avg" in state:
                    state["exp_avg"].zero_()
                state.pop("momentum_buffer", None)
        if isinstance(self._inner, torch.optim.RMSprop):
            self._give_buffers()

    def _give_buffers(self) -> None:
        # RMSprop makes them in its first step only, and may have had no momentum then
        for group in self._inner.param_groups:
            for parameter in group["params"] if group["momentum"] else ():
                state = self._inner.state.get(parameter)
                if state and "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)

    def state(self) -> dict[str, Any]:
        """Return what the next steps depend on, fit for JSON; empty where momentum is in."""
        state: dict[str, Any] = {"momentum_out": True} if self._is_out else {}
        if self._coherence.sums != NO_COHERENCE:
            state["coherence"] = self._coherence.state()
        return state

    @staticmethod
    def check_state(metadata: Mapping[str, Any]) -> tuple[bool, list[float]]:
        """Return what `load_state` takes of the metadata with `state` in it; raises ValueError."""
        is_out = metadata.get("momentum_out", False)
        if not isinstance(is_out, bool):
            raise ValueError(f"state has momentum_out={is_out!r}: expected true or nothing")
        sums = metadata.get("coherence", list(NO_COHERENCE))
        return is_out, CoherenceMean.check_state(sums)

    def load_state(self, state: tuple[bool, list[float]]) -> None:
        """Go on from what `check_state` returned."""
        self._is_out, sums = state
        self._coherence.load_state(sums)


def step_evenly(inner: torch.optim.Optimizer) -> None:
    """Step an optimizer some of whose tensors may have had no gradient in earlier steps.

    torch's fused SGD takes tensors with a momentum buffer, or tensors without, and not both.
    """
    fused = [
        parameter
        for group in inner.param_groups
        if isinstance(inner, torch.optim.SGD) and group["fused"] and group["momentum"]
        for parameter in group["params"]
        if parameter.grad is not None
    ]
    first = [p for p in fused if inner.state.get(p, {}).get("momentum_buffer") is None]
    if not first or len(first) == len(fused):
        inner.step()
        return
    held = [(p, p.grad) for group in inner.param_groups for p in group["params"]]
    firsts = set(first)
    for now in (True, False):
        for parameter, gradient in held:
            parameter.grad = gradient if (parameter in firsts) is now else None
        inner.step()
    for parameter, gradient in held:
        parameter.grad = gradient


def density(pushes: Sequence[Sequence[Frame]], numels: Sequence[int] = ()) -> float:
    """Return which share of the elements that have a gradient a push sends, on average over these.

    numels: how many have one in each push; nothing: all of the model's.
    """
    if not numels:
        numels = [sum(frame.numel for frame in frames) for frames in pushes]
    shares = [
        sum(frame.indices.numel() for frame in frames) / max(1, numel)
        for frames, numel in zip(pushes, numels, strict=True)
    ]
    return sum(shares) / len(shares)


def check_adapt_rate(config: TrainingConfig) -> None:
    """Raise ConfigError where `adapt_rate` is asked for, and no step of the optimizer follows it.

    config: as it was given: where it is left open, a run has it, with effect or without.
    """
    if config.adapt_rate and not divides_by_mean_square(example_optimizers(config)[""]):
        raise ConfigError(
            "adapt_rate",
            config.adapt_rate,
            f"no effect with inner_opt={config.inner_opt!r}, expected one of Adam's kind",
        )


def describe_momentum(config: TrainingConfig) -> tuple[str, bool]:
    """Return what is done to the momentum of which numbers, and whether that calls for a warning.

    The numbers are those of the configuration; workers may set others. Raises ValueError, naming
    the option, for a momentum that cannot be taken out.
    """
    momentum, examples = config.begun().momentum, example_optimizers(config)
    name = type(examples[""]).__name__
    groups = {pattern: example.param_groups[0] for pattern, example in examples.items()}
    if all(group_momentum(group) is None for group in groups.values()):
        return f"{momentum}: {name} has none", False
    if momentum == "optimizer":
        stays = any(group_momentum(group) for group in groups.values())
        return f"optimizer: {name} keeps its own, however sparse pushes are", stays
    rule = momentum_rule(examples[""])
    if rule is None:
        return f"feedback: how {name} steps without is not known, so it keeps its own", True
    changes = []
    for pattern, group in groups.items():
        try:
            changed = _changed(group, rule(group))
        except ValueError as error:
            raise ValueError(f"inner_opt={config.inner_opt!r} with {error}") from error
        if changed:
            changes.append(f"{pattern!r}: {changed}" if pattern else changed)
    what = "; ".join(changes) or "momentum from workers taken out"
    if config.begun().adapt_rate and divides_by_mean_square(examples[""]):
        what += ", at a rate that is raised where gradients agree over steps"
    share = f"less than {SPARSE_BELOW:.0%} of the elements"
    return f"feedback: while pushes hold {share}, {name} steps with {what}", False


def _changed(group: Mapping[str, Any], overrides: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name}={_plain(value)} for {_plain(group[name])}"
        for name, value in overrides.items()
        if value != group[name]
    )


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_plain, value))})"
    return repr(value) if isinstance(value, bool) else f"{value:g}"


class SparseStep:
    """Takes an inner optimizer's step at few elements where that is all it does."""

    def __init__(
        self, inner: torch.optim.Optimizer, names: Sequence[Sequence[str]], spec: ModelSpec
    ) -> None:
        self._inner = inner
        group_of = {name: place for place, group in enumerate(names) for name in group}
        self._runs = [
            _runs([group_of[name] for name in vector.layout.names], vector.numels)
            for vector in spec.vectors
        ]

    def take(self, params: FlatModel, gradient: GradientSum) -> list[SparseDelta] | None:
        """Step, and return what may have changed; None, and nothing done, where it is dense."""
        if type(self._inner) is not torch.optim.SGD or not all(
            map(_is_sparse, self._inner.param_groups)
        ):
            return None
        unions = gradient.touched()
        if unions is None:
            return None
        before = [picked(flat, at) for at, flat in zip(unions, params.flats, strict=True)]
        if any(flat.dtype.itemsize == 2 for flat in params.flats):
            # in half precision torch's kernels round by where in memory an element lies
            self._inner.step()
            after = [picked(flat, at) for at, flat in zip(unions, params.flats, strict=True)]
        else:
            after = [
                self._stepped(place, at, before[place], picked(slopes, at))
                for place, (at, slopes) in enumerate(zip(unions, gradient.model.flats, strict=True))
            ]
            for flat, at, values in zip(params.flats, unions, after, strict=True):
                put(flat, at, values)
        return [
            SparseDelta(indices=at, before=old, after=new)
            for at, old, new in zip(unions, before, after, strict=True)
        ]

    def _stepped(self, place: int, at: Tensor, before: Tensor, slopes: Tensor) -> Tensor:
        groups = self._inner.param_groups
        ends = torch.tensor([end for end, _ in self._runs[place]])
        stops = torch.searchsorted(at, ends).tolist()
        return torch.cat(
            [
                before[start:stop].add(slopes[start:stop], alpha=-groups[group]["lr"])
                for start, stop, (_, group) in zip(
                    [0, *stops], stops, self._runs[place], strict=False
                )
            ]
        )


def _is_sparse(group: dict[str, Any]) -> bool:
    # maximize turns -0.0 into 0.0 where the gradient is zero, and so does a negative lr
    return (
        not (group["momentum"] or group["weight_decay"] or group["maximize"]) and group["lr"] >= 0
    )


def _runs(groups: Sequence[int], numels: Sequence[int]) -> list[tuple[int, int]]:
    """Return (end, group) of each run of neighbouring tensors that share a group."""
    runs: list[tuple[int, int]] = []
    end = 0
    for group, numel in zip(groups, numels, strict=True):
        end += numel
        if runs and runs[-1][1] == group:
            runs.pop()
        runs.append((end, group))
    return runs
