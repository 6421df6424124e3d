"""How much of each parameter's gradient a step sends: q or its policy, or the optimizer's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer

from topq_dist.compress.defaults import DEFAULT_Q
from topq_dist.compress.planned_segments import PlannedSegments, widest_format
from topq_dist.compress.sparsify.segments import Scope, Segment
from topq_dist.optim import TopQGradientOptimizer
from topq_dist.optim.momentum_rules import sparsifier
from topq_dist.q_policies import QPolicy
from topq_dist.sparsity import draw_q, k_from_q, row_shape, rows_lie_apart
from topq_dist.validation import warn_caller


class SparsityPolicy(Protocol):
    """What the hook asks before it selects."""

    def begin_step(self) -> None:
        """Read the settings of the step that starts; raises where they are not valid."""

    def end_step(self) -> None:
        """Take note of a step whose gradients were finite on every rank."""

    def settings(self) -> str:
        """Return this step's settings, which must be the same text on every rank."""

    def sent_fraction(self) -> float:
        """Return about which fraction of all gradients this step sends, the same on every rank."""

    def segments(self, parameters: Sequence[Tensor]) -> Sequence[Segment]:
        """Return the segments of a flat vector of the gradients of `parameters` in order."""

    def selects_apart(self, parameter: Tensor, strides: Sequence[int]) -> bool:
        """Return whether this step selects from sub-tensors that are no runs of memory.

        strides: of a gradient of `parameter` in memory.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned."""


def make_sparsity_policy(
    names: Mapping[Tensor, str],
    optimizer: Optimizer | None,
    *,
    q: float | QPolicy | None,
    scope: Scope,
    value_format: str | None = None,
) -> SparsityPolicy:
    """Return where a hook's q comes from; raises TypeError or ValueError where that is unclear."""
    found = sparsifier(optimizer)
    if found is None:
        return PlannedSparsity(DEFAULT_Q if q is None else q, scope, names, value_format)
    kind = type(found).__name__
    if q is not None:
        raise ValueError(f"q={q!r} with a {kind}: expected None, since its groups hold q")
    if scope != "parameter":
        raise ValueError(f"scope={scope!r} with a {kind}: expected 'parameter'")
    return OptimizerSparsity(found, names)


class PlannedSparsity:
    """q as the user gave it, a number or a policy; `q` may be set anew between steps.

    At least one element of each parameter (scope "parameter") or bucket (scope "bucket") is sent
    unless q is 1, so that no bias is left behind for good.

    names: of each parameter that may be in a bucket.
    """

    def __init__(
        self,
        q: float | QPolicy,
        scope: Scope,
        names: Mapping[Tensor, str],
        value_format: str | None,
    ) -> None:
        self._names = names
        shapes = {name: self._shape_of(parameter) for parameter, name in names.items()}
        own = widest_format(parameter.dtype for parameter in names)
        self._planned = PlannedSegments(q, scope, shapes, value_format or own)

    def _shape_of(self, parameter: Tensor) -> tuple[int, ...]:
        """Return the shape of what a bucket has of a parameter."""
        return tuple(parameter.shape)

    @property
    def q(self) -> float | QPolicy:
        """What was given, or set since."""
        return self._planned.q

    @q.setter
    def q(self, q: float | QPolicy) -> None:
        self._planned.q = q

    def begin_step(self) -> None:
        pass

    def end_step(self) -> None:
        self._planned.step += 1

    def settings(self) -> str:
        return self._planned.settings()

    def sent_fraction(self) -> float:
        return self._planned.sent_fraction()

    def segments(self, parameters: Sequence[Tensor]) -> Sequence[Segment]:
        return self._planned.of(tuple([self._names[parameter] for parameter in parameters]))

    def selects_apart(self, parameter: Tensor, strides: Sequence[int]) -> bool:
        return False

    def state_dict(self) -> dict[str, Any]:
        return self._planned.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._planned.load_state_dict(state)


class OptimizerSparsity:
    """q, dq, param_ndim and generator of a TopQGradientOptimizer, read live from its groups.

    With dq > 0 one q is drawn a parameter a step, in group then parameter order, as the optimizer
    itself would; a parameter that no rank used in the step is drawn for all the same, a frozen one
    is not.

    names: of each parameter that may be in a bucket, those included that are frozen by now.
    """

    def __init__(self, optimizer: TopQGradientOptimizer, names: Mapping[Tensor, str]) -> None:
        self._optimizer = optimizer
        self._names = names
        self._step_q: dict[Tensor, float] = {}
        self._param_ndim: dict[Tensor, int | None] = {}
        grouped = {p for group in optimizer.param_groups for p in group["params"]}
        missing = [
            name
            for parameter, name in names.items()
            if parameter.requires_grad and parameter not in grouped
        ]
        if missing:
            raise ValueError(
                f"optimizer holds no group with {', '.join(missing)}: "
                "expected every trainable parameter of the model"
            )
        self._warn_of_the_unmoving()

    def leave_to_hook(self) -> None:
        """Have the optimizer take the gradients of a backward pass as sparsified already."""
        self._optimizer.sparsified_until_step(self._names)

    def begin_step(self) -> None:
        step_q: dict[Tensor, float] = {}
        param_ndim: dict[Tensor, int | None] = {}
        for group in self._optimizer.param_groups:
            self._optimizer.check_group(group)
            for parameter in group["params"]:
                if parameter.requires_grad and parameter in self._names:
                    step_q[parameter] = draw_q(group["q"], group["dq"], self._optimizer.generator)
                    param_ndim[parameter] = group["param_ndim"]
        self._step_q, self._param_ndim = step_q, param_ndim

    def end_step(self) -> None:
        pass

    def settings(self) -> str:
        return "\n".join(
            f"group {number}: q={group['q']} dq={group['dq']} param_ndim={group['param_ndim']}"
            for number, group in enumerate(self._optimizer.param_groups)
        )

    def sent_fraction(self) -> float:
        # by q, not by what dq has drawn, or an optimizer would lose and regain its momentum by lot
        sent = numel = 0.0
        for group in self._optimizer.param_groups:
            held = sum(
                param.numel()
                for param in group["params"]
                if param.requires_grad and param in self._names
            )
            sent, numel = sent + (1.0 - group["q"]) * held, numel + held
        return sent / numel if numel else 0.0

    def segments(self, parameters: Sequence[Tensor]) -> list[Segment]:
        segments, start = [], 0
        for parameter in parameters:
            if not parameter.requires_grad:
                # frozen since DDP was made, which still exchanges the zeros in its place
                numel = parameter.numel()
                segments.append(Segment(start=start, rows=1, row_numel=numel, k=0))
                start += numel
                continue
            if parameter not in self._step_q:
                raise ValueError(
                    f"optimizer holds no group with {self._names[parameter]}: expected every "
                    "trainable parameter of the model, so give it one with add_param_group"
                )
            rows, row_numel = row_shape(parameter.shape, self._param_ndim[parameter])
            k = k_from_q(self._step_q[parameter], row_numel)
            segments.append(Segment(start=start, rows=rows, row_numel=row_numel, k=k))
            start += parameter.numel()
        return segments

    def selects_apart(self, parameter: Tensor, strides: Sequence[int]) -> bool:
        return rows_lie_apart(parameter.shape, strides, self._param_ndim.get(parameter))

    def state_dict(self) -> dict[str, Any]:
        if not any(group["dq"] for group in self._optimizer.param_groups):
            return {}
        return {"generator": self._optimizer.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if "q" in state or "policy" in state:
            raise ValueError("state has a q: expected that of a hook paired with an optimizer")
        if "generator" in state:
            saved = state["generator"]
            try:
                self._optimizer.generator.set_state(saved)
            except (RuntimeError, TypeError) as error:
                raise ValueError(
                    "state has a generator state that this generator cannot take: expected what "
                    f"get_state() of one on {self._optimizer.generator.device} returned"
                ) from error

    def _warn_of_the_unmoving(self) -> None:
        unmoving = []
        for group in self._optimizer.param_groups:
            lowest_q = max(0.0, group["q"] - group["dq"])
            for parameter in group["params"]:
                if not (parameter.requires_grad and parameter in self._names and parameter.numel()):
                    continue
                _, row_numel = row_shape(parameter.shape, group["param_ndim"])
                if k_from_q(lowest_q, row_numel) == 0:
                    unmoving.append(self._names[parameter])
        if unmoving:
            warn_caller(
                f"these parameters can never move, since q and param_ndim keep 0 elements of each "
                f"of their sub-tensors: {', '.join(unmoving)}; give them a group with a smaller q "
                "or another param_ndim"
            )
