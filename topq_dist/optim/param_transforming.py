"""The base: an inner optimizer, and the transforms of a subclass before and after its step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias, TypeVar, overload

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from topq_dist.optim.groups import (
    ParamGroup,
    Params,
    check_complete,
    fitted,
    option,
    own_groups,
    with_defaults,
)
from topq_dist.optim.reshaping import as_batch, check_dense
from topq_dist.sparsity import batch_shape, check_param_ndim
from topq_dist.validation import check_number

InnerOptimizer: TypeAlias = type[Optimizer] | functools.partial[Optimizer] | Optimizer

_Loss = TypeVar("_Loss")


class ParamTransformingOptimizer(Optimizer):
    """Transform each parameter in place before and after `InnerOpt.step()` updates it.

    A subclass overrides `_pre_step_transform_`, `_post_step_transform_` or both::

        class SignedGradient(ParamTransformingOptimizer):
            def _pre_step_transform_(self, param, optim_group):
                param.grad.sign_()

    Both get a parameter of shape (N, d0, ...) with its gradient, in the shape that `param_ndim`
    makes of it (see `topq.batch_shape`), and work on each of the N sub-tensors by itself. What
    they write in place reaches the real parameter and gradient, contiguous or not, and
    `flatten(1)` never copies. After the first of them each gradient is multiplied by grad_scale
    unless that is 1, then grad_bias is added unless that is 0, to zeroed elements too.

    `param_groups`, `state` and `defaults` are the inner optimizer's own objects, and the state
    dict is the inner one, its groups carrying the options of the outer; several around one inner
    instance share them. With a closure the gradients are transformed after each evaluation. To
    give its groups an option of its own, a subclass passes it on in `defaults` and checks it in
    `check_group`; one that torch's `required` stands for must then come with every group.

    Args:
        params: parameters, (name, parameter) pairs, or dicts that define parameter groups.
            Not used when InnerOpt is an instance, which has its own.
        InnerOpt: a torch.optim.Optimizer class, a functools.partial of one, or an instance.
        param_ndim: integer or None; each group may have its own.
        grad_scale, grad_bias: finite numbers; each group may have its own.
        defaults: options for all groups. They win over keyword values; a group's own win over both.
        **inner_opt_kwargs: passed to InnerOpt; none may be given with an instance.

    Raises:
        TypeError: for a param_ndim that is no integer, a scale or bias that is no number, an
            InnerOpt or defaults of another kind, missing params or options, or keyword values that
            an InnerOpt instance cannot take.
        ValueError: for a param_ndim greater in magnitude than a parameter's number of dimensions,
            and a scale or bias that is not finite.
            `step` raises either one too, naming the group, before it touches a gradient.

    Departures from rai_toolbox, whose subclasses work here as they are: options are checked in
    `add_param_group`, in `load_state_dict` (a bad state leaves the optimizer as it was) and at each
    step, an infinite scale or bias among them; pickle, copy.deepcopy, empty tensors and
    non-contiguous parameters and gradients work; a sparse gradient is an error that names the
    parameter; transforms get a view of the parameter, or a copy that is written back, never the
    parameter itself; `add_param_group`, `state_dict` and `load_state_dict` go through the inner
    optimizer's own; group dicts and `defaults` given are copied, never written to; keyword values
    beside an InnerOpt instance are an error.
    """

    def __init__(
        self,
        params: Params | None = None,
        InnerOpt: InnerOptimizer = SGD,
        *,
        param_ndim: int | None = -1,
        grad_scale: float = 1.0,
        grad_bias: float = 0.0,
        defaults: Mapping[str, Any] | None = None,
        **inner_opt_kwargs: Any,
    ) -> None:
        options = with_defaults(
            defaults, param_ndim=param_ndim, grad_scale=grad_scale, grad_bias=grad_bias
        )
        if isinstance(InnerOpt, Optimizer):
            if inner_opt_kwargs:
                raise TypeError(
                    f"{', '.join(inner_opt_kwargs)}: expected no options for InnerOpt, "
                    f"which is already an instance of {type(InnerOpt).__name__}"
                )
            groups = InnerOpt.param_groups
            self._check_groups([{**options, **group} for group in groups])
            for group in groups:
                for name, value in options.items():
                    group.setdefault(name, value)
            self.inner_opt = InnerOpt
        else:
            make = InnerOpt.func if isinstance(InnerOpt, functools.partial) else InnerOpt
            if not (isinstance(make, type) and issubclass(make, Optimizer)):
                raise TypeError(
                    f"InnerOpt={InnerOpt!r}: expected a torch.optim.Optimizer class, "
                    "a functools.partial of one, or an instance"
                )
            groups = [{**options, **group} for group in own_groups(params)]
            self._check_groups(groups)
            self.inner_opt = InnerOpt(groups, **inner_opt_kwargs)
        self.inner_opt.defaults.update(options)
        super().__setstate__({})  # gives what Optimizer.__init__ would, less groups of its own

    def _pre_step_transform_(self, param: Tensor, optim_group: ParamGroup) -> None:
        """Change `param.grad`, or `param`, in place before the inner step; does nothing here.

        param: (N, d0, ...), never without a gradient. optim_group: its group, options included.
        """

    def _post_step_transform_(self, param: Tensor, optim_group: ParamGroup) -> None:
        """Change `param` in place after the inner step; does nothing here.

        param: (N, d0, ...); its gradient may be None. optim_group: its group, options included.
        """

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Raise TypeError or ValueError, naming the option, unless the group's options are valid.

        A subclass with options of its own calls super().check_group(group), then checks them.
        """
        check_complete(group)
        param_ndim = check_param_ndim(option(group, "param_ndim"))
        for name, value in _scale_and_bias(group).items():
            check_number(name, value)
        for entry in group.get("params", ()):
            param = entry[1] if isinstance(entry, tuple) else entry
            if isinstance(param, Tensor):
                batch_shape(param.shape, param_ndim)

    # The inner optimizer owns these three. They are asked for, not mirrored, so that whatever
    # replaces them (a load, an unpickling, an assignment) cannot leave the two apart.
    @property
    def param_groups(self) -> list[ParamGroup]:
        return self.inner_opt.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[ParamGroup]) -> None:
        self.inner_opt.param_groups = groups

    @property
    def state(self) -> Any:
        return self.inner_opt.state

    @state.setter
    def state(self, state: Any) -> None:
        self.inner_opt.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        return self.inner_opt.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.inner_opt.defaults = defaults

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Transform the gradients, step the inner optimizer, transform the parameters.

        Returns what the inner optimizer returns: the closure's loss, or None without a closure.
        Where there is no state, every rate is 0 and every gradient zeros, as in the step by which
        torch.distributed.checkpoint looks for state, nothing is transformed. Raises TypeError for a
        sparse gradient, and as the class says for an invalid option.
        """
        self._check_groups(self.param_groups)
        loss: float | None
        if closure is None:
            if self._is_probed():
                return self.inner_opt.step()
            self._apply_pre_step_transform_()
            loss = self.inner_opt.step()
        else:
            loss = self.inner_opt.step(self._then_transform(closure))
        self._apply_post_step_transform_()
        return loss

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a copy of the group to the inner optimizer, once its options are found valid."""
        [group] = own_groups([param_group])
        self._check_groups([{**self.defaults, **group}], first=len(self.param_groups))
        self.inner_opt.add_param_group(group)

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state dict; its groups carry the options of this one."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = self.inner_opt.state_dict()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave; on any error the optimizer stays as it was.

        Raises TypeError or ValueError where a group lacks an option, has an invalid one, or holds
        another number of parameters than the group here.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self._check_groups(fitted(state_dict, self.param_groups))
        before = self.state, self.param_groups
        try:
            self.inner_opt.load_state_dict(state_dict)
            # as torch's does, so that a subclass can complete older groups there
            self.__setstate__({"state": self.state, "param_groups": self.param_groups})
        except BaseException:
            self.state, self.param_groups = before
            raise
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        wrapped = isinstance(self.inner_opt, ParamTransformingOptimizer)
        inner = {} if wrapped else _attributes(self.inner_opt)
        return {**_attributes(self), "inner_attributes": inner}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            if name != "inner_attributes":
                setattr(self, name, value)
        vars(self.inner_opt).update(state.get("inner_attributes", {}))
        super().__setstate__({})

    def __repr__(self) -> str:
        return super().__repr__().replace("(", f"[{type(self.inner_opt).__name__}](", 1)

    def _is_probed(self) -> bool:
        """Return whether a step only looks at what state comes of one, and is to change nothing.

        torch.distributed.checkpoint takes one where there is no state, which SGD never has: at a
        rate of 0, on gradients of zeros. A transform that draws numbers, or changes parameters,
        would leave another run behind.
        """
        if len(self.state) or any(float(group.get("lr", 1.0)) for group in self.param_groups):
            return False
        params = [param for group in self.param_groups for param in group["params"]]
        gradients = [param.grad for param in params if param.grad is not None]
        dense = all(gradient.layout == torch.strided for gradient in gradients)
        return dense and bool(gradients) and not any(bool(g.any()) for g in gradients)

    def _then_transform(self, closure: Callable[[], _Loss]) -> Callable[[], _Loss]:
        def transforming() -> _Loss:
            with torch.enable_grad():
                loss = closure()
            self._apply_pre_step_transform_()
            return loss

        return transforming

    @torch.no_grad()
    def _apply_pre_step_transform_(self) -> None:
        check_dense(self.param_groups)
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                self._transform_gradient_(param, group)
                # read anew, as the transform may have changed them
                scale, bias = map(float, _scale_and_bias(group).values())
                if scale != 1.0:
                    param.grad.mul_(scale)
                if bias != 0.0:
                    param.grad.add_(bias)

    @torch.no_grad()
    def _apply_post_step_transform_(self) -> None:
        transform = self._post_step_transform_
        unchanged = ParamTransformingOptimizer._post_step_transform_
        if getattr(transform, "__func__", None) is unchanged:
            return
        for group in self.param_groups:
            for param in group["params"]:
                with as_batch(param, group, of=type(self).__name__) as batch:
                    transform(batch, optim_group=group)

    def _transform_gradient_(self, param: Tensor, group: ParamGroup) -> None:
        with as_batch(param, group, of=type(self).__name__) as batch:
            self._pre_step_transform_(batch, optim_group=group)

    def _check_groups(self, groups: Iterable[Mapping[str, Any]], first: int = 0) -> None:
        for number, group in enumerate(groups, first):
            try:
                self.check_group(group)
            except (TypeError, ValueError) as error:
                kind = TypeError if isinstance(error, TypeError) else ValueError
                raise kind(f"parameter group {number}: {error}") from error


def _scale_and_bias(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return both of a group's; 1 and 0 where it was saved before every group had them."""
    return {"grad_scale": group.get("grad_scale", 1.0), "grad_bias": group.get("grad_bias", 0.0)}


def _attributes(optimizer: Optimizer) -> dict[str, Any]:
    """Return what a copy needs beside what torch copies, which forgets LBFGS's list for one.

    Hooks stay behind, as with any torch optimizer, and so does the step that an LR scheduler puts
    on the instance: it is bound to this object.
    """
    left = ("state", "param_groups", "defaults", "step", "_opt_called")
    return {
        name: value
        for name, value in vars(optimizer).items()
        if name not in left and not name.startswith("_optimizer_")
    }
