"""The base: an inner optimizer, and the transforms of a subclass before and after its step."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeVar, overload

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from topq_dist.optim.groups import (
    ParamGroup,
    Params,
    fitted,
    option,
    own_groups,
    with_defaults,
)
from topq_dist.topq import batch_shape, check_param_ndim

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
    `flatten(1)` never copies.

    `param_groups`, `state` and `defaults` are the inner optimizer's own objects, and the state
    dict is the inner one, its groups carrying the options of the outer. With a closure the
    gradients are transformed after each evaluation. To give its groups an option of its own, a
    subclass passes it on in `defaults` and checks it in `check_group`.

    Args:
        params: parameters, (name, parameter) pairs, or dicts that define parameter groups.
            Not used when InnerOpt is an instance, which has its own.
        InnerOpt: a torch.optim.Optimizer class, a functools.partial of one, or an instance.
        param_ndim: integer or None; each group may have its own.
        defaults: options for all groups. They win over keyword values; a group's own win over both.
        **inner_opt_kwargs: passed to InnerOpt; none may be given with an instance.

    Raises:
        TypeError: for a param_ndim that is no integer, an InnerOpt or defaults of another kind,
            missing params, or keyword values that an InnerOpt instance cannot take.
        ValueError: for a param_ndim greater in magnitude than a parameter's number of dimensions.
            `step` raises either one too, naming the group, before it touches a gradient.

    Departures from rai_toolbox: options are checked in `add_param_group`, in `load_state_dict`
    (a bad state leaves the optimizer as it was) and at each step; pickle, copy.deepcopy, empty
    tensors and non-contiguous parameters and gradients work; a sparse gradient is an error that
    names the parameter; `add_param_group`, `state_dict` and `load_state_dict` go through the
    inner optimizer's own; group dicts and `defaults` given are copied, never written to; keyword
    values beside an InnerOpt instance are an error.
    """

    def __init__(
        self,
        params: Params | None = None,
        InnerOpt: InnerOptimizer = SGD,
        *,
        param_ndim: int | None = -1,
        defaults: Mapping[str, Any] | None = None,
        **inner_opt_kwargs: Any,
    ) -> None:
        options = with_defaults(defaults, param_ndim=param_ndim)
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
        param_ndim = check_param_ndim(option(group, "param_ndim"))
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
        Raises TypeError for a sparse gradient, and as the class says for an invalid option.
        """
        self._check_groups(self.param_groups)
        loss: float | None
        if closure is None:
            self._transform_gradients_()
            loss = self.inner_opt.step()
        else:
            loss = self.inner_opt.step(self._then_transform(closure))
        if type(self)._post_step_transform_ is not ParamTransformingOptimizer._post_step_transform_:
            for group in self.param_groups:
                for param in group["params"]:
                    with self._as_batch(param, group) as batch:
                        self._post_step_transform_(batch, group)
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

    def _then_transform(self, closure: Callable[[], _Loss]) -> Callable[[], _Loss]:
        def transforming() -> _Loss:
            with torch.enable_grad():
                loss = closure()
            self._transform_gradients_()
            return loss

        return transforming

    @torch.no_grad()
    def _transform_gradients_(self) -> None:
        for number, group in enumerate(self.param_groups):
            for index, param in enumerate(group["params"]):
                _check_dense(param, number, index, group)
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._transform_gradient_(param, group)

    def _transform_gradient_(self, param: Tensor, group: ParamGroup) -> None:
        if self._is_transformed_here(param):
            with self._as_batch(param, group) as batch:
                self._pre_step_transform_(batch, group)

    def _is_transformed_here(self, param: Tensor) -> bool:
        return True

    @contextmanager
    def _as_batch(self, param: Tensor, group: ParamGroup) -> Iterator[Tensor]:
        """Yield the parameter and its gradient as (N, d0, ...) for work in place."""
        shape = batch_shape(param.shape, group["param_ndim"])
        batch = _reshaped(param, shape)
        gradient = None
        if param.grad is not None:
            gradient = batch.grad = _reshaped(param.grad, shape)
        yield batch
        if not _share_memory(batch.grad, gradient):
            raise ValueError(
                f"a transform of {type(self).__name__} replaced param.grad: "
                "expected the gradient to be changed in place"
            )
        _write_back(batch, param)
        if gradient is not None and param.grad is not None:
            _write_back(gradient, param.grad)

    def _check_groups(self, groups: Iterable[Mapping[str, Any]], first: int = 0) -> None:
        for number, group in enumerate(groups, first):
            try:
                self.check_group(group)
            except (TypeError, ValueError) as error:
                kind = TypeError if isinstance(error, TypeError) else ValueError
                raise kind(f"parameter group {number}: {error}") from error


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


def _check_dense(param: Tensor, number: int, index: int, group: ParamGroup) -> None:
    if param.grad is not None and param.grad.layout is not torch.strided:
        name = f" ({group['param_names'][index]})" if "param_names" in group else ""
        raise TypeError(
            f"parameter {index} of group {number}{name} has a gradient of layout "
            f"{param.grad.layout}: expected a dense gradient"
        )


def _reshaped(tensor: Tensor, batch: tuple[int, ...]) -> Tensor:
    """Return a view of this shape where the strides allow, else a contiguous copy."""
    rows = tensor.detach().reshape(batch[0], math.prod(batch[1:]))
    return rows.view(batch)


def _share_memory(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _write_back(batch: Tensor, whole: Tensor) -> None:
    if not _share_memory(batch, whole):
        whole.copy_(batch.view(whole.shape))
