"""The central model: pushes in, one step of the inner optimizer, an update for the workers out."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from topq_dist.compress.coherence import Coherence, bounded_total, total
from topq_dist.optim.momentum_rules import remembers_squares, sums_momentum
from topq_dist.ps.model.flat import FlatModel, copy_of, raw_view
from topq_dist.ps.model.spec import ModelSpec
from topq_dist.ps.protocol.config import TrainingConfig
from topq_dist.ps.protocol.errors import InvalidError, NonFiniteError
from topq_dist.ps.protocol.types import (
    GroupView,
    Push,
    UpdateKind,
    group_momentum,
)
from topq_dist.ps.training.downlink import make_downlink
from topq_dist.ps.training.group_numbers import GroupNumbers
from topq_dist.ps.training.inner_optimizer import make_inner_optimizer
from topq_dist.ps.training.inner_state import (
    InnerState,
    check_inner_state,
    copy_inner_state,
    inner_state,
    load_inner_state,
)
from topq_dist.ps.training.inner_step import MomentumOut, SparseStep, step_evenly
from topq_dist.ps.training.round_mean import GradientSum
from topq_dist.ps.training.step_guard import StepGuard


@dataclass(frozen=True, kw_only=True)
class _Whole:
    """All that the next steps depend on, checked: a flat vector for each dtype, and the rest."""

    params: Sequence[Tensor]
    held: Sequence[Tensor]
    inner: InnerState
    momentum: tuple[bool, list[float]]


class CentralModel:
    """The parameters, their inner optimizer, and what workers hold of them.

    values: taken over, not copied. Not for several threads at once.

    Raises ValueError, naming the option, where torch.optim does not take the configuration for this
    model.
    """

    def __init__(self, config: TrainingConfig, spec: ModelSpec, values: FlatModel) -> None:
        if values.spec != spec:
            raise ValueError("values is of another model than spec: expected the same")
        self.spec = spec
        self._mode = config.mode
        self._params = values
        self._gradient = GradientSum(spec)
        self._named = values.tensors()
        self._inner, self._group_names = make_inner_optimizer(config, self._named)
        # some optimizers divide by the elements of a tensor: one without any has no gradient
        gradients = self._gradient.model.tensors()
        self._gradients = {name: tensor for name, tensor in gradients.items() if tensor.numel()}
        for name, gradient in self._gradients.items():
            self._named[name].grad = gradient
        self._group_numbers = GroupNumbers(self._inner)
        # whether some tensors may have gone through fewer steps than others
        self._uneven = True
        # for people, where the workers of the last version sent different numbers
        self.disagreement = ""
        self._sparse_step = SparseStep(self._inner, self._group_names, spec)
        self._momentum = MomentumOut(
            self._inner,
            enabled=config.begun().momentum == "feedback",
            adapt_rate=config.begun().adapt_rate is True,
        )
        self._downlink = make_downlink(config, values)
        self._guard = StepGuard(spec, self._inner.param_groups, lambda: self.state(copied=False)[0])

    def check_push(self, push: Push, *, max_lr: float = math.inf) -> None:
        """Raise InvalidError or NonFiniteError unless `apply` can take the push.

        Its frames must be none or one for each vector, of as many elements, and finite, and hold
        nothing of a tensor that it has no gradient of; its learning rates none or one for each
        group, from 0 to `max_lr`, and its weight decay likewise, where the optimizer has one, of
        no more than a step can take off a weight; its momentum none or one for each group, where
        the optimizer has one, in [0, 1); its coherence nothing or two finite sums. A replay names
        its own worker among its members.
        """
        vectors = self.spec.vectors
        if push.frames and len(push.frames) != len(vectors):
            raise InvalidError(f"{len(push.frames)} frames: expected {len(vectors)}, or none")
        for place, (frame, vector) in enumerate(zip(push.frames, vectors, strict=False)):
            if frame.numel != vector.numel:
                raise InvalidError(
                    f"frame {place} is of {frame.numel} elements: expected {vector.numel}"
                )
            if not frame.finite:
                raise NonFiniteError(f"frame {place} says that its gradient is NaN or infinite")
        self._check_nothing_of_absent(push)
        self._group_numbers.check(push, max_lr=max_lr)
        _check_coherence(push.coherence)
        if push.applied_version and push.worker not in push.members:
            raise InvalidError(
                f"a replay of {push.worker!r} has members={push.members!r}: expected itself there"
            )

    def _check_nothing_of_absent(self, push: Push) -> None:
        if not push.no_gradient:
            return
        absent = self.spec.without_gradient(push.no_gradient)
        for number, (frame, vector, places) in enumerate(
            zip(push.frames, self.spec.vectors, self.spec.places, strict=False)
        ):
            edges = np.searchsorted(frame.indices.numpy(), vector.layout.edges)
            sent = absent[places] & (np.diff(edges) > 0)
            if sent.any():
                name = vector.layout.names[int(sent.argmax())]
                raise InvalidError(
                    f"frame {number} holds elements of {name!r}, of which its header says that "
                    "there is no gradient"
                )

    def apply(self, pushes: Sequence[Push]) -> tuple[UpdateKind, tuple[memoryview, ...]]:
        """Take one step on the mean gradient of the pushes; return the update for the workers.

        The terms are divided first and added in the order given, as the DDP hook does. A push
        without frames does not count in the mean; where none has any there is no step. A tensor
        that no push with frames has a gradient of stays as it is, and its state; one that only
        some have none of has zeros of theirs. Learning rates, momenta and weight decays become the
        median of those that pushes have. The pushes must have passed check_push, and stay as they
        are.

        Raises NonFiniteStepError, leaving everything as it was, for a step that would end in
        numbers that are not finite.
        """
        counted = [push for push in pushes if push.frames]
        if not counted:
            self.disagreement = self._group_numbers.take(pushes)
            return self._downlink.nothing()
        self._gradient.add([push.frames for push in counted])
        if self._guard.is_calm(self._gradient.magnitude(), self._group_numbers.scale(pushes)):
            return self._step(pushes, counted)
        before = self._copy()
        try:
            update = self._step(pushes, counted)
            if self._guard.is_finite():
                return update
            why = None
        except (ArithmeticError, RuntimeError) as error:  # of a number that no tensor can take
            self._gradient.clear()
            why = error
        self._restore(before)
        raise self._guard.error(pushes) from why

    def is_finite(self) -> bool:
        """Return whether all that the next steps depend on is finite."""
        return self._guard.is_finite()

    def _step(
        self, pushes: Sequence[Push], counted: Sequence[Push]
    ) -> tuple[UpdateKind, tuple[memoryview, ...]]:
        self.disagreement = self._group_numbers.take(pushes)
        frames = [push.frames for push in counted]
        given = [Coherence(*push.coherence) for push in counted]
        if self._mode == "async":
            # a push is alone in its version: it weighs what every other one does, or one worker
            # that claims ever larger sums would soon be all that is heard
            coherence = total(one.of_size_one for one in given)
        else:
            coherence = bounded_total(given)
        unused, numels = self._without_gradient(counted)
        with self._momentum.stepping(frames, coherence, numels), self._skipped(unused):
            touched = self._sparse_step.take(self._params, self._gradient)
            if touched is None:
                self._downlink.before_step(self._params)
                step_evenly(self._inner) if self._uneven else self._inner.step()
        self._uneven = bool(unused)
        self._gradient.clear()
        return self._downlink.after_step(self._params, touched)

    def _without_gradient(self, pushes: Sequence[Push]) -> tuple[list[str], list[int]]:
        """Return which tensors no push has a gradient of, and how many elements each has one of.

        Nothing of either where each push has all.
        """
        if not any(push.no_gradient for push in pushes):
            return [], []
        absent = [self.spec.without_gradient(push.no_gradient) for push in pushes]
        sizes = np.array([tensor.numel for tensor in self.spec.tensors])
        unused = np.flatnonzero(np.logical_and.reduce(absent)).tolist()
        return (
            [self.spec.tensors[place].name for place in unused],
            [int(sizes[~one].sum()) for one in absent],
        )

    @contextmanager
    def _skipped(self, names: Sequence[str]) -> Iterator[None]:
        """Have the optimizer see no gradient of these tensors while the block runs."""
        for name in names:
            self._named[name].grad = None
        try:
            yield
        finally:
            for name in names:
                self._named[name].grad = self._gradients.get(name)

    def groups(self) -> tuple[GroupView, ...]:
        """Return the parameter groups: betas, and lr first, every hyperparameter that is a number.

        All as the user has them, whatever the last step did without.
        """
        return tuple(
            GroupView(
                names=names,
                numbers=_numbers(group),
                betas=tuple(map(float, group.get("betas", ()))),
                takes_momentum=group_momentum(group) is not None,
                takes_coherence=self._momentum.takes_coherence,
                takes_weight_decay=self._group_numbers.have_weight_decay,
                keeps_rate=self._momentum.enabled,
                sums_momentum=sums_momentum(self._inner),
                remembers_squares=remembers_squares(self._inner),
            )
            for names, group in zip(self._group_names, self._inner.param_groups, strict=True)
        )

    def workers_raw(self) -> list[memoryview]:
        """Return the bytes of what workers hold, copied, for each vector."""
        return self._downlink.held(self._params).raw()

    def central_raw(self) -> list[memoryview]:
        """Return the bytes of the server's own parameters, copied, for each vector."""
        return self._params.clone().raw()

    def state(self, *, copied: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return all that the next steps depend on: tensors by key, and the rest fit for JSON.

        copied: False returns views, which the next `apply` changes: for a snapshot that is written
            before it.
        """
        tensors = {f"model.{place}": flat for place, flat in enumerate(self._params.flats)}
        tensors |= {f"held.{place}": flat for place, flat in enumerate(self._downlink.state())}
        inner_tensors, metadata = inner_state(self._inner, self._named)
        tensors |= inner_tensors
        if copied:
            tensors = {key: copy_of(tensor) for key, tensor in tensors.items()}
        return tensors, {"inner": metadata, **self._momentum.state()}

    def load_state(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Go on from what `state` returned, bit for bit.

        Raises ValueError, leaving everything as it was, for what no `state` of this model and
        configuration can have returned.
        """
        own = {f"model.{place}": flat for place, flat in enumerate(self._params.flats)}
        held = {f"held.{place}": flat for place, flat in enumerate(self._downlink.state())}
        for key, flat in (own | held).items():
            saved = tensors.get(key)
            if saved is None or saved.dtype != flat.dtype or saved.shape != flat.shape:
                raise ValueError(
                    f"state has {_described(saved)} as {key!r}: expected {_described(flat)}"
                )
        inner_tensors = {key: t for key, t in tensors.items() if key not in own | held}
        inner_metadata = metadata.get("inner")
        state = check_inner_state(self._inner, self._named, inner_tensors, inner_metadata)
        momentum_state = self._momentum.check_state(metadata)
        self._restore(
            _Whole(
                params=[tensors[key] for key in own],
                held=[tensors[key] for key in held],
                inner=state,
                momentum=momentum_state,
            )
        )

    def _copy(self) -> _Whole:
        """Return what `_restore` takes; unlike `state`, it needs no check."""
        return _Whole(
            params=[copy_of(flat) for flat in self._params.flats],
            held=[copy_of(flat) for flat in self._downlink.state()],
            inner=copy_inner_state(self._inner, self._named),
            momentum=self._momentum.check_state(self._momentum.state()),
        )

    def _restore(self, whole: _Whole) -> None:
        for flat, saved in zip(self._params.flats, whole.params, strict=True):
            flat.copy_(saved)
        self._downlink.load_state(whole.held, self._params)
        load_inner_state(self._inner, self._named, whole.inner)
        self._uneven = True
        self._momentum.load_state(whole.momentum)

    def sha256(self) -> str:
        """Return the SHA-256, in hexadecimal, of all that `state` returns."""
        tensors, metadata = self.state(copied=False)
        digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
        for key in sorted(tensors):
            tensor = tensors[key]
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(raw_view(tensor.contiguous().view(-1)))
        return digest.hexdigest()


def _check_coherence(given: Sequence[float]) -> None:
    if len(given) not in (0, 2):
        raise InvalidError(f"{len(given)} sums of coherence: expected two, or none")
    if not all(map(math.isfinite, given)):
        raise NonFiniteError(f"coherence={given!r}: expected finite numbers")
    if given and given[1] < 0:
        raise InvalidError(f"coherence={given!r}: expected a sum of squares of 0 or more")


def _numbers(group: Mapping[str, Any]) -> dict[str, float]:
    numbers = {
        name: float(value)
        for name, value in group.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    return {"lr": numbers.pop("lr"), **numbers}


def _described(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"
