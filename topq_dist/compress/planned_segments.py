"""The segments of a step as q or its policy has them, whoever compresses: a hook or a worker."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch

from topq_dist.compress.codec.frame import max_frame_bytes
from topq_dist.compress.sparsify.by_loss import SegmentsByLoss
from topq_dist.compress.sparsify.segments import (
    Scope,
    Segment,
    Segments,
    UniformSegments,
    check_scope,
)
from topq_dist.dtypes import FLOATS
from topq_dist.q_policies import QByLoss, QByTensor, QPolicy, check_q, q_at
from topq_dist.sparsity import at_least_one
from topq_dist.validation import check_fraction

Shape = Sequence[int]
# what entropy-coded values are counted as, with a bit more for each: none is sure to be shorter
_STAND_IN = {"ec1": "int2", "ec2": "int2", "ecfp16": "fp16", "ecbf16": "bf16"}
# of each frame, where a step is several
_FRAME_BYTES = 64


class PlannedSegments:
    """Segments of vectors of a model's tensors, by q and the number of the step.

    shapes: of all tensors that may be in a vector, by name.
    value_format: of the frames; None: of an unknown one that holds numbers as they are.

    `q` and `step` may be set anew between steps. Raises TypeError or ValueError for a q that is no
    fraction and no policy, or a policy that does not go with `scope`, the names, or the sizes.
    """

    def __init__(
        self,
        q: float | QPolicy,
        scope: Scope,
        shapes: Mapping[str, Shape],
        value_format: str | None = None,
    ) -> None:
        self.scope = check_scope(scope)
        self.step = 0
        self._numels = {name: math.prod(shape) for name, shape in shapes.items()}
        self._dimensions = {name: len(shape) for name, shape in shapes.items()}
        self._value_format = value_format or "fp64"
        self._uniform = UniformSegments()
        self._made: dict[tuple[str, ...], tuple[Any, Segments]] = {}
        self.q = q

    @property
    def q(self) -> float | QPolicy:
        """The fraction of each tensor that is not sent, or what says it."""
        return self._q

    @q.setter
    def q(self, q: float | QPolicy) -> None:
        q, most = check_q(q), 1.0
        if isinstance(q, QByTensor | QByLoss) and self.scope != "parameter":
            raise ValueError(f"q={q!r} with scope={self.scope!r}: expected scope='parameter'")
        if isinstance(q, QByTensor):
            q.check_names(self._numels)
        if isinstance(q, QByLoss):
            most = _most_density(q, list(self._numels.values()), self._value_format)
        self._q, self._most, self._made = q, most, {}

    def settings(self) -> str:
        """Return what must be the same for all that train one model in this step."""
        step = f" step={self.step}" if isinstance(self._q, QPolicy) else ""
        return f"q={self._q}{step} scope={self.scope}"

    def sent_fraction(self) -> float:
        """Return about which fraction of the model a step sends; of QByLoss, the most."""
        if isinstance(self._q, QByLoss):
            return self._most
        if not isinstance(self._q, QByTensor):
            return 1.0 - q_at(self._q, self.step)
        sent = sum((1.0 - self._q_of(name)) * numel for name, numel in self._numels.items())
        return sent / (sum(self._numels.values()) or 1)

    def of(self, names: tuple[str, ...], left_out: tuple[bool, ...] = ()) -> Segments:
        """Return the segments of a vector of these tensors in this step.

        left_out: of which of them nothing is selected.
        """
        if not isinstance(self._q, QByTensor | QByLoss):
            numels = tuple([self._numels[name] for name in names])
            q = q_at(self._q, self.step)
            return self._uniform.of(numels, q=q, scope=self.scope, left_out=left_out)
        qs = tuple([self._q_of(name) for name in names])
        if names not in self._made or self._made[names][0] != (qs, left_out):
            self._made[names] = (qs, left_out), self._segments(names, qs, left_out)
        return self._made[names][1]

    def state_dict(self) -> dict[str, Any]:
        """Return what goes on in a resumed run: numbers and texts."""
        if isinstance(self._q, QPolicy):
            return {"policy": repr(self._q), "step": self.step}
        return {"q": self._q}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what state_dict returned, of a number the number itself.

        Raises ValueError or TypeError, with nothing changed, for another policy's state.
        """
        step = self.step_in(state)
        if not isinstance(self._q, QPolicy):
            self.q = check_fraction("q", state["q"])
        self.step = step

    def step_in(self, state: Mapping[str, Any]) -> int:
        """Return the step that a state is at, or raise as load_state_dict does."""
        mine = repr(self._q) if isinstance(self._q, QPolicy) else None
        if state.get("policy") != mine:
            held = state.get("policy", state.get("q"))
            raise ValueError(
                f"state is of q={held}: expected {self._q!r}; pass q={held} when this is made, and "
                "set q anew once the state is loaded"
            )
        step = state.get("step", None if mine else 0)
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"state has step={step!r}: expected a whole number from 0")
        if mine is None and "q" not in state:
            raise ValueError("state has no q: expected that of a hook without an optimizer")
        return step

    def _q_of(self, name: str) -> float:
        if isinstance(self._q, QByTensor):
            return self._q.of(name, self._numels[name], self._dimensions[name], self.step)
        return 1.0 - self._most

    def _segments(
        self, names: Sequence[str], qs: Sequence[float], left_out: Sequence[bool]
    ) -> Segments:
        numels = [self._numels[name] for name in names]
        starts = accumulate(numels, initial=0)
        out = left_out or [False] * len(numels)
        made = [
            Segment(start=start, rows=1, row_numel=numel, k=0 if left else at_least_one(q, numel))
            for start, numel, q, left in zip(starts, numels, qs, out, strict=False)
        ]
        if isinstance(self._q, QByLoss):
            return SegmentsByLoss(made, self._q)
        return Segments(made)


def widest_format(dtypes: Iterable[torch.dtype]) -> str | None:
    """Return the value format of the widest of these dtypes; None where there is none."""
    known = [dtype for dtype in dtypes if dtype in FLOATS]
    return FLOATS[max(known, key=lambda dtype: dtype.itemsize)].value_format if known else None


def _most_density(q: QByLoss, numels: Sequence[int], value_format: str) -> float:
    """Return the density that takes the budget, if every tensor has it and a frame of its own.

    1 where there is room for everything, and for everything but one element, whose place is told.
    """
    filled = [numel for numel in numels if numel]
    numel, tensors = sum(filled), len(filled)
    stand_in = _STAND_IN.get(value_format, value_format)

    def planned_bytes(k: int) -> int:
        more = tensors * _FRAME_BYTES + (k // 8 + 1 if value_format in _STAND_IN else 0)
        # of fewer than all, as the loss may have it, the indices are in the frame as well
        counts = {k, k - 1} if k == numel > 0 else {k}
        return more + max(max_frame_bytes(numel, n, stand_in, segments=tensors) for n in counts)

    least = planned_bytes(min(2 * tensors, numel))
    if least > q.budget_bytes:
        raise ValueError(
            f"budget_bytes={q.budget_bytes}: expected {least} at least, for one element of each of "
            f"{tensors} tensors"
        )
    # no k takes less than a smaller one
    low, high = min(2 * tensors, numel), numel
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if planned_bytes(middle) <= q.budget_bytes else (low, middle - 1)
    if low == numel:
        return 1.0
    # one of each tensor may be more than its share
    return (low - tensors) / numel
