"""Steps of a torch optimizer that see other parameter groups than its owner does.

Nothing is swapped in and back: `step` runs on a view, an object of the optimizer's class that
shares all of its attributes and shows other groups. So an error within a step, a scheduler, a
checkpoint and whoever reads `param_groups`, closures of the step included, meet the owner's values.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from topq_dist.optim.groups import ParamGroup

# the switches of each optimizer, so that a second one for the same parameters replaces the first
_attached: weakref.WeakKeyDictionary[Optimizer, weakref.WeakSet[StepSwitch]]
_attached = weakref.WeakKeyDictionary()
_MISSING = object()


class StepSwitch(ABC):
    """Shows an optimizer's steps other groups while it is `active`, and lives as long as its owner.

    The optimizer holds it weakly: where the last reference goes, the optimizer is as it was. A copy
    of the optimizer, pickled or deep, is a plain one.

    Args:
        optimizer: the one whose own `step` moves the parameters (see `momentum.stepping`).
        parameters: those that are shown differently. A group that holds others too is shown as two.
    """

    def __init__(self, optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._parameters = frozenset(parameters)
        self._active = False
        # whether `active` holds for one step, and that step has been
        self.for_one_step = self._is_over = False
        self._seen: list[ShownGroup] = []
        self._view_class = _view_class(type(optimizer))
        others = _attached.setdefault(optimizer, weakref.WeakSet())
        for other in list(others):
            if not self._parameters.isdisjoint(other._parameters):
                other.detach()
        others.add(self)
        self._handles = [
            optimizer.register_step_pre_hook(_Before(self)),
            optimizer.register_step_post_hook(_After(self)),
        ]

    @property
    def active(self) -> bool:
        """Whether steps see the other groups; what is set within a step, its closure, counts.

        With `for_one_step` set it holds until the end of the next step: for those who say anew,
        with each gradient, what a step on it is to see.
        """
        return self._active

    @active.setter
    def active(self, active: bool) -> None:
        self._is_over = False
        active = active and bool(self._handles)
        if active != self._active:
            self._active = active
            self._changed_over()

    def detach(self) -> None:
        """Hand the optimizer back for good; a second call does nothing."""
        self.active = False
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @abstractmethod
    def _values(self, group: ParamGroup) -> Mapping[str, Any] | None:
        """Return what a step sees replaced in a group of covered parameters; None: no group."""

    def _changed_over(self) -> None:  # noqa: B027 - most have nothing to do
        """Bring the optimizer's state into line with an `active` that has just changed."""

    def _stepped(self, optimizer: Optimizer) -> None:  # noqa: B027
        """Finish a step that has raised nothing and has been active at its end."""

    def _groups(self, groups: list[ParamGroup]) -> list[ParamGroup]:
        if self._is_over:
            self.active = False
        if not self._active:
            return groups
        seen: list[ParamGroup] = []
        for group in groups:
            mine = [param in self._parameters for param in group["params"]]
            if not any(mine):
                seen.append(group)
                continue
            values = self._values(group)
            if values is not None:
                part = {} if all(mine) else _part(group, mine)
                seen.append(self._show(group, {**values, **part}))
            if not all(mine):
                seen.append(self._show(group, _part(group, [not one for one in mine])))
        return seen

    def _show(self, group: ParamGroup, values: Mapping[str, Any]) -> ParamGroup:
        shown = {**group, **values}
        self._seen.append(ShownGroup(group, frozenset(values), shown.copy(), shown))
        return shown

    def _view_of(self, optimizer: Optimizer, viewed: Any) -> Any:
        """Return what the step runs on; `viewed` is another switch's view, or the optimizer."""
        self._seen = []
        view: Any = object.__new__(self._view_class)
        view.__dict__ = vars(optimizer)
        view.topq_switch, view.topq_viewed = self, viewed
        return view

    def _write_back(self) -> None:
        for seen in self._seen:
            seen.write_back()

    def _after(self, optimizer: Optimizer, view: Any) -> None:
        _write_back(view)
        self._seen = []
        if self._active:
            self._stepped(optimizer)
            self._is_over = self.for_one_step


class ShownGroup(NamedTuple):
    """What a step sees of a group, as it was handed out and as the step leaves it.

    shown: a plain dict, since torch.compile knows no other.
    """

    group: ParamGroup
    replaced: frozenset[str]
    before: ParamGroup
    shown: ParamGroup

    def write_back(self) -> None:
        """Give the group what the step has written to what was not replaced."""
        for name, value in self.shown.items():
            if name not in self.replaced and self.before.get(name, _MISSING) is not value:
                self.group[name] = self.before[name] = value


def _part(group: ParamGroup, mine: list[bool]) -> dict[str, Any]:
    listed = [name for name in ("params", "param_names") if name in group]
    return {name: [e for e, one in zip(group[name], mine, strict=True) if one] for name in listed}


class _View:
    """What every view is an instance of, beside the class of its optimizer.

    topq_switch: whose it is. topq_viewed: another switch's view, or the optimizer.
    """

    __slots__ = ()

    topq_switch: StepSwitch
    topq_viewed: Any


def _write_back(view: Any) -> None:
    # the outermost first: its groups may be those that another switch shows
    while isinstance(view, _View):
        view.topq_switch._write_back()
        view = view.topq_viewed


def _view_class(kind: type[Optimizer]) -> type:
    def show(view: Any) -> list[ParamGroup]:
        # a step that asks again is to read what it has written
        _write_back(view)
        switch: StepSwitch = view.topq_switch
        return switch._groups(view.topq_viewed.param_groups)

    def replace(view: Any, groups: list[ParamGroup]) -> None:
        view.topq_viewed.param_groups = groups

    members = {
        # in slots, since the view has the optimizer's own __dict__
        "__slots__": ("topq_switch", "topq_viewed"),
        "__module__": kind.__module__,
        "param_groups": property(show, replace),
    }
    return type(kind.__name__, (_View, kind), members)


class _StepHook:
    """A hook that knows its switch as long as that lives; a copy knows none."""

    def __init__(self, switch: StepSwitch | None = None) -> None:
        self._switch = None if switch is None else weakref.ref(switch)

    def switch_for(self, optimizer: Optimizer) -> StepSwitch | None:
        """Return the switch, but none within the step of a view: the outer step has asked."""
        if self._switch is None or isinstance(optimizer, _View):
            return None
        return self._switch()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


class _Before(_StepHook):
    def __call__(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        switch = self.switch_for(optimizer)
        # also while it is not active: the closure of the step may make it so
        return (
            None if switch is None else ((switch._view_of(optimizer, args[0]), *args[1:]), kwargs)
        )


class _After(_StepHook):
    def __call__(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        switch = self.switch_for(optimizer)
        if switch is not None:
            switch._after(optimizer, args[0])
