"""Optimizers that transform gradients only: top-Q sparsification, and its base."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD
from torch.optim.optimizer import required

from topq_dist.dtypes import check_plain, is_plain
from topq_dist.optim.groups import ParamGroup, Params, option, with_defaults
from topq_dist.optim.param_transforming import InnerOptimizer, ParamTransformingOptimizer
from topq_dist.partition_topk import keep_top_
from topq_dist.sparsity import draw_q, k_from_q
from topq_dist.validation import check_fraction

_REQUIRED: Any = required  # shown as <required parameter> in the signature


class GradientTransformerOptimizer(ParamTransformingOptimizer):
    """ParamTransformingOptimizer by the name that subclasses with grad_scale and grad_bias used."""


class TopQGradientOptimizer(GradientTransformerOptimizer):
    """Zero all but the top-Q part of each gradient in place, then let `InnerOpt.step()` use it.

    In each of the sub-tensors that param_ndim makes of a gradient, exactly
    k = round((1 - q) * numel) elements of largest magnitude survive, half rounded to even; which
    of several equal ones is not specified. NaN ranks above infinity. Then come grad_scale and
    grad_bias. Any floating or complex dtype, on any device.

    Args:
        q: in [0, 1]; q=0.9 keeps a tenth. Needed here, in `defaults` or in every group.
        dq: in [0, 1]; where positive, q is drawn anew for each gradient in each step, uniformly
            from [q - dq, q + dq] cut to [0, 1], in group then parameter order.
        param_ndim: what is sparsified by itself. -1: each tensor along the first dimension, so
            that a 1-D parameter is cut into single elements, all of which stay for q < 0.5 and
            none for q >= 0.5. None: the whole tensor. m >= 0: the last m dimensions.
        generator: torch.Generator that dq draws from; public as `generator`.
        params, InnerOpt, grad_scale, grad_bias, defaults, inner_opt_kwargs: as in the bases.

    q, dq, param_ndim, grad_scale and grad_bias can be set for each group, and changed in
    `param_groups` between steps.

    Raises TypeError for a missing q, an option of the wrong type or a generator that is none;
    ValueError for one out of range; when and how is said in the base classes.

    Source: rai_toolbox.optim.TopQGradientOptimizer, to the bit. Departures, beside those of the
    bases: q is required (there 0.001 where torch is new); q=None and dq=None are errors; the
    default generator is still the default one after pickling, another keeps its state;
    `sparsified_elsewhere` and `sparsified_until_step` are new; DTensor, meta and quantized
    parameters are refused.
    """

    def __init__(
        self,
        params: Params | None,
        InnerOpt: InnerOptimizer = SGD,
        *,
        q: float = _REQUIRED,
        dq: float = 0.0,
        param_ndim: int | None = -1,
        grad_scale: float = 1.0,
        grad_bias: float = 0.0,
        defaults: Mapping[str, Any] | None = None,
        generator: torch.Generator = torch.default_generator,
        **inner_opt_kwargs: Any,
    ) -> None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator={generator!r}: expected a torch.Generator")
        self.generator = generator
        self._sparsified_elsewhere: set[Tensor] = set()
        self._sparsified_once: list[Container[Tensor]] = []
        # of the gradient that is being transformed
        self._is_sparsified = False
        super().__init__(
            params,
            InnerOpt,
            param_ndim=param_ndim,
            grad_scale=grad_scale,
            grad_bias=grad_bias,
            defaults=with_defaults(defaults, q=q, dq=dq),
            **inner_opt_kwargs,
        )

    def sparsified_elsewhere(self, params: Iterable[Tensor]) -> None:
        """From now on take the gradients of these parameters as sparsified already.

        For a communication hook that sparsifies before it averages: their gradients are left as
        they come and draw no q; grad_scale and grad_bias still apply. Calls add up. The list is
        of this object alone: a copy, pickled or deep, sparsifies everything again.

        Raises TypeError for anything but an iterable of tensors.
        """
        added = set() if isinstance(params, Tensor) else set(params)
        if isinstance(params, Tensor) or not all(isinstance(param, Tensor) for param in added):
            raise TypeError(f"params={type(params).__name__}: expected an iterable of tensors")
        self._sparsified_elsewhere |= added

    def sparsified_until_step(self, params: Container[Tensor]) -> None:
        """Take the gradients of these parameters as sparsified already, in the next step alone.

        For a communication hook, which says so of each backward pass: as `sparsified_elsewhere`,
        and over with the hook. Gradients that come another way are sparsified here.
        """
        if not any(params is known for known in self._sparsified_once):
            self._sparsified_once.append(params)

    def check_group(self, group: Mapping[str, Any]) -> None:
        super().check_group(group)
        for name in ("q", "dq"):
            check_fraction(name, option(group, name))
        for entry in group.get("params", ()):
            param = entry[1] if isinstance(entry, tuple) else entry
            if isinstance(param, Tensor) and not is_plain(param):
                check_plain(f"a parameter of shape {tuple(param.shape)}", param)

    def _transform_gradient_(self, param: Tensor, group: ParamGroup) -> None:
        self._is_sparsified = param in self._sparsified_elsewhere or any(
            param in params for params in self._sparsified_once
        )
        # what a subclass does after top-Q is done all the same
        if not self._is_sparsified or type(self)._pre_step_transform_ is not _keep_top_q:
            super()._transform_gradient_(param, group)
        self._is_sparsified = False

    def _apply_post_step_transform_(self) -> None:
        super()._apply_post_step_transform_()
        self._sparsified_once.clear()

    def _pre_step_transform_(self, param: Tensor, optim_group: ParamGroup) -> None:
        if param.grad is not None and not self._is_sparsified:
            rows = param.grad.flatten(1)
            q = draw_q(optim_group["q"], optim_group["dq"], self.generator)
            keep_top_(rows, k_from_q(q, rows.shape[1]))

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        for name in _OF_THIS_OBJECT:
            state.pop(name, None)
        if self.generator is torch.default_generator:
            del state["generator"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name, make in _OF_THIS_OBJECT.items():
            vars(self).setdefault(name, make())
        vars(self).setdefault("generator", torch.default_generator)


_keep_top_q = TopQGradientOptimizer._pre_step_transform_
# what a copy begins with
_OF_THIS_OBJECT = {
    "_sparsified_elsewhere": set,
    "_sparsified_once": list,
    "_is_sparsified": bool,
}
