"""A worker's local steps: an optimizer of its own, whose changes are what the servers' steps along.

Source: DiLoCo (Douillard et al., 2023), with the servers' inner optimizer as the outer one; their
push's error feedback as in SparseLoCo (arXiv 2508.15706).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from topq_dist.ps.client.shard import Shard
from topq_dist.ps.protocol.errors import NonFiniteError


class SavedLocal(NamedTuple):
    """Saved local steps. held: what the parameters were after the last round, by name."""

    since_round: int
    held: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]


class LocalSteps:
    """Counts the steps that `optimizer` takes between the rounds of a worker, `every` of them.

    Raises TypeError or ValueError for what is no optimizer of some of `parameters`, or no number of
    steps above zero.
    """

    def __init__(self, optimizer: Optimizer, every: int, parameters: Iterable[Tensor]) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"local_optimizer is a {type(optimizer).__name__}: expected the torch.optim."
                "Optimizer that takes this worker's own steps"
            )
        known = set(parameters)
        strangers = [
            tuple(parameter.shape)
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter not in known
        ]
        if strangers:
            raise ValueError(
                f"local_optimizer has parameters of shapes {strangers[:5]}, which no server holds: "
                "expected one of those in named_parameters that need a gradient"
            )
        self.optimizer = optimizer
        self._every = every
        self._since_round = 0

    @property
    def due(self) -> bool:
        """Whether the next thing to be done is a round."""
        return self._since_round >= self._every

    def step(
        self, closure: Callable[[], Any] | None, *, scale: float = 1.0, overflow: bool = False
    ) -> Any:
        """Take one step of the optimizer along gradients / `scale`; returns the closure's loss.

        overflow: count it, but take none.
        """
        loss = None
        if not overflow:
            self._divide_gradients(scale)
            try:
                loss = self.optimizer.step() if closure is None else self.optimizer.step(closure)
            except BaseException:
                # tried again, it divides again
                self._divide_gradients(1 / scale)
                raise
        self._since_round += 1
        return loss

    def _divide_gradients(self, scale: float) -> None:
        if scale == 1.0:
            return
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.div_(scale)

    def end_round(self) -> None:
        """Begin to count anew."""
        self._since_round = 0

    @contextmanager
    def changes_as_gradients(self, shards: Sequence[Shard]) -> Iterator[None]:
        """Have in place of each gradient what steps since the last round have taken off."""
        before = [(one, one.grad) for shard in shards for one in shard.parameters.values()]
        try:
            for shard in shards:
                held = shard.model.tensors()
                for name, parameter in shard.parameters.items():
                    now = parameter.detach()
                    parameter.grad = held[name].to(now.device).view(now.shape).sub(now)
            yield
        finally:
            for parameter, gradient in before:
                parameter.grad = gradient

    @contextmanager
    def dropping_what_is_not_finite(self, shards: Sequence[Shard]) -> Iterator[None]:
        """Go back to the last round where changes are not finite: no later step would mend them."""
        try:
            yield
        except NonFiniteError as error:
            self.end_round()
            for shard in shards:
                shard.write_back()
            raise NonFiniteError(
                f"{error} of what local steps have changed, and the parameters are those of the "
                "last round again; local_optimizer's own state is as it is: load one where it "
                "holds NaN too"
            ) from error

    def state_dict(self, held: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return what a resumed worker needs; `held` as in SavedLocal."""
        return {
            "since_round": self._since_round,
            "held": {name: tensor.clone() for name, tensor in held.items()},
            "optimizer": self.optimizer.state_dict(),
        }

    def load(self, saved: SavedLocal) -> None:
        """Take up what `state_dict` returned, checked.

        Raises ValueError, and changes nothing, where the optimizer refuses it.
        """
        before = self.optimizer.state_dict()
        try:
            self.optimizer.load_state_dict(dict(saved.optimizer))
        except Exception as error:  # there may be anything in it
            self.optimizer.load_state_dict(before)
            raise ValueError(
                f"state_dict does not fit the local optimizer: {error!r}; expected that of another "
                f"{type(self.optimizer).__name__} with these parameters in these groups"
            ) from error
        self._since_round = saved.since_round


def make_local_steps(
    optimizer: Optimizer | None, every: int, parameters: Iterable[Tensor]
) -> LocalSteps | None:
    """Return local steps, None where there is no optimizer for any; see LocalSteps."""
    if isinstance(every, bool) or not isinstance(every, int):
        raise TypeError(f"every={every!r}: expected an integer, got {type(every).__name__}")
    if every < 1:
        raise ValueError(f"every={every}: expected a number of steps above zero")
    if optimizer is not None:
        return LocalSteps(optimizer, every, parameters)
    if every != 1:
        raise ValueError(
            f"every={every} without local_optimizer: expected the optimizer that takes the steps "
            "in between"
        )
    return None


def read_saved_local(state: Any, shards: Sequence[Shard]) -> SavedLocal | None:
    """Return what a state_dict holds of local steps, checked against the model.

    Raises TypeError or ValueError.
    """
    if state is None:
        return None
    since_round, held = state["since_round"], state["held"]
    if isinstance(since_round, bool) or not isinstance(since_round, int) or since_round < 0:
        raise ValueError(f"state_dict has since_round={since_round!r}: expected a number from 0")
    parameters = {name: one for shard in shards for name, one in shard.parameters.items()}
    if set(held) != set(parameters):
        raise ValueError("state_dict holds other parameters than this model's")
    for name, tensor in held.items():
        like = parameters[name]
        if not isinstance(tensor, Tensor) or (tensor.shape, tensor.dtype) != (
            like.shape,
            like.dtype,
        ):
            raise ValueError(
                f"state_dict holds {name!r} as {getattr(tensor, 'shape', tensor)!r}: expected "
                f"{tuple(like.shape)} of {like.dtype}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"state_dict holds NaN or infinity in {name!r}: expected numbers")
    if not isinstance(state["optimizer"], Mapping):
        raise TypeError("state_dict has no state of a local optimizer: expected one")
    return SavedLocal(since_round, held, state["optimizer"])
