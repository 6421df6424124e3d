"""The transforms of several optimizers, one after another, around the step of one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor
from torch.optim import SGD

from topq_dist.optim.gradient_transforming import TopQGradientOptimizer
from topq_dist.optim.groups import ParamGroup, Params
from topq_dist.optim.param_transforming import InnerOptimizer, ParamTransformingOptimizer

# a class of these, or a functools.partial of one
TransformingOptimizer: TypeAlias = Callable[..., ParamTransformingOptimizer]


class ChainedParamTransformingOptimizer(ParamTransformingOptimizer):
    """Transform each parameter by several optimizers in turn, around one `InnerOpt.step()`::

        ChainedParamTransformingOptimizer(
            functools.partial(TopQGradientOptimizer, q=0.9),
            functools.partial(ClampedGradient, limit=1.0),
            params=model.parameters(), InnerOpt=torch.optim.AdamW, param_ndim=None, lr=1e-3,
        )

    All share one inner optimizer, whose groups carry every option; where two have one of the same
    name it is one option, with the value of the first. param_ndim, grad_scale and grad_bias are
    the chain's own, and a gradient is scaled once, after the last transform.

    Args:
        *transforming_optimizers: classes of ParamTransformingOptimizer, or functools.partials of
            such. `_pre_step_transform_` and `_post_step_transform_` of all run from left to right.
        params, InnerOpt, param_ndim, grad_scale, grad_bias, defaults, inner_opt_kwargs: as in
            ParamTransformingOptimizer.

    Raises TypeError for another kind of transforming optimizer, and as the base class and those
    given do. Source and departures: as for the base class.
    """

    def __init__(
        self,
        *transforming_optimizers: TransformingOptimizer,
        params: Params | None = None,
        InnerOpt: InnerOptimizer = SGD,
        param_ndim: int | None = -1,
        grad_scale: float = 1,
        grad_bias: float = 0,
        defaults: Mapping[str, Any] | None = None,
        **inner_opt_kwargs: Any,
    ) -> None:
        for make in transforming_optimizers:
            _check_makes_one(make)
        self._chain: tuple[ParamTransformingOptimizer, ...] = ()
        super().__init__(
            params,
            InnerOpt,
            param_ndim=param_ndim,
            grad_scale=grad_scale,
            grad_bias=grad_bias,
            defaults=defaults,
            **inner_opt_kwargs,
        )
        self._chain = tuple(
            make(params, InnerOpt=self.inner_opt, defaults=self.defaults)
            for make in transforming_optimizers
        )

    @property
    def sparsifies(self) -> bool:
        """Whether a TopQGradientOptimizer is among those chained."""
        return any(
            isinstance(one, TopQGradientOptimizer)
            or (isinstance(one, ChainedParamTransformingOptimizer) and one.sparsifies)
            for one in self._chain
        )

    def check_group(self, group: Mapping[str, Any]) -> None:
        super().check_group(group)
        for optimizer in self._chain:
            optimizer.check_group(group)

    def _pre_step_transform_(self, param: Tensor, optim_group: ParamGroup) -> None:
        for optimizer in self._chain:
            optimizer._pre_step_transform_(param, optim_group=optim_group)

    def _post_step_transform_(self, param: Tensor, optim_group: ParamGroup) -> None:
        for optimizer in self._chain:
            optimizer._post_step_transform_(param, optim_group=optim_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for optimizer in self._chain:
            optimizer.__setstate__({"state": self.state, "param_groups": self.param_groups})

    def __repr__(self) -> str:
        names = " ○ ".join(type(optimizer).__name__ for optimizer in reversed(self._chain))
        return super().__repr__().replace(type(self).__name__, names or type(self).__name__, 1)


def _check_makes_one(make: Any) -> None:
    kind = make.func if isinstance(make, functools.partial) else make
    if not (isinstance(kind, type) and issubclass(kind, ParamTransformingOptimizer)):
        raise TypeError(
            f"transforming optimizer {make!r}: expected a class of ParamTransformingOptimizer, "
            "or a functools.partial of one"
        )
