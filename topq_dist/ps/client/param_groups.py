"""The servers' parameter groups, as a worker's param_groups show them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from topq_dist.ps.protocol.types import GroupView, group_momentum
from topq_dist.validation import check_number

Group = Mapping[str, Any]


class SavedGroups(NamedTuple):
    """Fields of ServerGroups as a worker has saved them.

    told_momentum, told_weight_decay: None in a state of before workers could set it.
    """

    sends_lr: bool
    told_lr: tuple[float, ...]
    sends_momentum: bool
    told_momentum: tuple[float | None, ...] | None
    sends_weight_decay: bool
    told_weight_decay: tuple[float | None, ...] | None

    @classmethod
    def read(cls, state: Mapping[str, Any], count: int) -> SavedGroups:
        """Return those in a worker's state, of so many groups; raises for what are none."""
        if len(state["told_lr"]) != count:
            raise ValueError("state_dict has another number of told_lr than of param_groups")
        return cls(
            sends_lr=bool(state["sends_lr"]),
            told_lr=tuple(check_number("told_lr", lr) for lr in state["told_lr"]),
            sends_momentum=bool(state.get("sends_momentum", False)),
            told_momentum=_told("told_momentum", state),
            sends_weight_decay=bool(state.get("sends_weight_decay", False)),
            told_weight_decay=_told("told_weight_decay", state),
        )


class ServerGroups:
    """The groups of each server, as they were when this worker joined.

    told_lr, told_momentum, told_weight_decay: of each group then; None where a group has none that
    workers may set. sends_lr, sends_momentum, sends_weight_decay: whether this worker has ever
    changed one, and so sends all.
    """

    def __init__(self, views: Sequence[Sequence[GroupView]]) -> None:
        self._views = views
        self.told_lr = [view.numbers["lr"] for view in self._all()]
        self.told_momentum = [_momentum(view, _shown(view)) for view in self._all()]
        self.told_weight_decay = [_weight_decay(view, _shown(view)) for view in self._all()]
        self.sends_lr = False
        self.sends_momentum = False
        self.sends_weight_decay = False

    def take_coherence(self) -> list[bool]:
        """Return of each server whether the coherence of pushes says something to it."""
        return [any(view.takes_coherence for view in views) for views in self._views]

    def _all(self) -> list[GroupView]:
        return [view for views in self._views for view in views]

    def param_groups(self, named: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """Return torch's parameter groups, those of one server behind those of the other."""
        return [
            {"params": [named[name] for name in view.names], **_shown(view)} for view in self._all()
        ]

    def defaults(self) -> dict[str, Any]:
        """Return torch's defaults: the momentum or betas that all groups have.

        Schedulers look there for which of the two they may cycle.
        """
        groups = [_shown(view) for view in self._all()]
        return {
            name: groups[0][name]
            for name in ("momentum", "betas")
            if groups and all(name in group for group in groups)
        }

    def filled(self, saved: Sequence[Group]) -> list[dict[str, Any]]:
        """Return saved groups with what they lack: betas were not shown always.

        Raises TypeError or ValueError for what are no groups of these servers.
        """
        views = self._all()
        if not isinstance(saved, Sequence) or len(saved) != len(views):
            raise ValueError(f"param_groups={saved!r}: expected {len(views)} of them")
        return [
            _filled(place, view, group)
            for place, (view, group) in enumerate(zip(views, saved, strict=True))
        ]

    def _momenta_of(self, param_groups: Sequence[Group]) -> list[float | None]:
        """Return the momentum of each of these groups that a worker may set."""
        return [
            _momentum(view, group) for view, group in zip(self._all(), param_groups, strict=True)
        ]

    def _decays_of(self, param_groups: Sequence[Group]) -> list[float | None]:
        """Return the weight decay of each of these groups that a worker may set."""
        groups = zip(self._all(), param_groups, strict=True)
        return [_weight_decay(view, group) for view, group in groups]

    def of_each_server(
        self, param_groups: Sequence[Group]
    ) -> tuple[Sequence[Sequence[GroupView]], list[list[Group]]]:
        """Return of each server its groups as it has told of them, and those of a worker."""
        left = iter(param_groups)
        return self._views, [[next(left) for _ in views] for views in self._views]

    def rates(self, param_groups: Sequence[Group]) -> list[tuple[float, ...]]:
        """Return the lr of each group to send to each server; nothing while none was changed.

        Raises ValueError for an lr that is no finite number of at least zero, or where a number
        of a group that no worker may set is not the server's.
        """
        rates = []
        for place, (group, view) in enumerate(zip(param_groups, self._all(), strict=True)):
            _check_others(place, group, view)
            lr = _check_at_least_0("lr", float(group["lr"]), place)
            self.sends_lr = self.sends_lr or lr != self.told_lr[place]
            rates.append(lr)
        return self._of_each_server(rates if self.sends_lr else [])

    def momenta(self, param_groups: Sequence[Group]) -> list[tuple[float, ...]]:
        """Return the momentum of each group to send likewise; nothing to servers without any.

        Raises ValueError for one that is no finite number in [0, 1).
        """
        momenta = self._momenta_of(param_groups)
        for place, (momentum, told) in enumerate(zip(momenta, self.told_momentum, strict=True)):
            if momentum is not None and not 0 <= momentum < 1:
                name = "betas" if "betas" in param_groups[place] else "momentum"
                raise ValueError(
                    f"{name}={param_groups[place][name]!r} in param_groups[{place}]: expected a "
                    f"finite {'first' if name == 'betas' else 'number'} in [0, 1)"
                )
            self.sends_momentum = self.sends_momentum or momentum != told
        return self._of_each_server(momenta if self.sends_momentum else [])

    def weight_decays(self, param_groups: Sequence[Group]) -> list[tuple[float, ...]]:
        """Return the weight decay of each group to send likewise.

        Raises ValueError for one that is no finite number of at least zero.
        """
        decays = self._decays_of(param_groups)
        for place, (decay, told) in enumerate(zip(decays, self.told_weight_decay, strict=True)):
            if decay is not None:
                _check_at_least_0("weight_decay", decay, place)
            self.sends_weight_decay = self.sends_weight_decay or decay != told
        return self._of_each_server(decays if self.sends_weight_decay else [])

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed worker needs of these, beside torch's own groups."""
        return {
            "sends_lr": self.sends_lr,
            "told_lr": list(self.told_lr),
            "sends_momentum": self.sends_momentum,
            "told_momentum": list(self.told_momentum),
            "sends_weight_decay": self.sends_weight_decay,
            "told_weight_decay": list(self.told_weight_decay),
        }

    def load(self, saved: SavedGroups, param_groups: Sequence[Group]) -> None:
        """Take up what `state_dict` has returned, with the groups that were saved beside it."""
        self.sends_lr, self.told_lr = saved.sends_lr, list(saved.told_lr)
        self.sends_momentum = saved.sends_momentum
        self.told_momentum = list(saved.told_momentum or self._momenta_of(param_groups))
        self.sends_weight_decay = saved.sends_weight_decay
        self.told_weight_decay = list(saved.told_weight_decay or self._decays_of(param_groups))

    def _of_each_server(self, numbers: Sequence[float | None]) -> list[tuple[float, ...]]:
        if not numbers:
            return [() for _ in self._views]
        left = iter(numbers)
        of_servers = [[next(left) for _ in views] for views in self._views]
        return [tuple(one for one in server if one is not None) for server in of_servers]


def _told(key: str, state: Mapping[str, Any]) -> tuple[float | None, ...] | None:
    told = state.get(key)
    if told is None:
        return None
    if len(told) != len(state["told_lr"]):
        raise ValueError(f"state_dict has another number of {key} than of param_groups")
    return tuple(None if one is None else check_number(key, one) for one in told)


def _check_others(place: int, group: Group, view: GroupView) -> None:
    """Raise ValueError where a number that is the server's alone is another one."""
    remedy = f"give it with the server's options; a worker can change {_changeable(view)}"
    mine = {
        "lr": True,
        "momentum": view.takes_momentum and not view.betas,
        "weight_decay": view.takes_weight_decay,
    }
    for name, number in view.numbers.items():
        if not mine.get(name, False) and float(group[name]) != number:
            raise ValueError(
                f"{name}={group[name]!r} in param_groups[{place}]: expected {number}, as the "
                f"server has it; {remedy}"
            )
    if view.betas and tuple(map(float, group["betas"]))[1:] != view.betas[1:]:
        raise ValueError(
            f"betas={group['betas']!r} in param_groups[{place}]: expected {view.betas}, as the "
            f"server has it; {remedy}"
        )


def _check_at_least_0(name: str, number: float, place: int) -> float:
    if not math.isfinite(number) or number < 0:
        raise ValueError(
            f"{name}={number!r} in param_groups[{place}]: expected a finite number of at least 0"
        )
    return number


def _changeable(view: GroupView) -> str:
    names = ["lr"]
    if view.takes_momentum:
        names.append("betas[0]" if view.betas else "momentum")
    if view.takes_weight_decay:
        names.append("weight_decay")
    return f"{' and '.join(names)} alone"


def _momentum(view: GroupView, group: Group) -> float | None:
    return group_momentum(group) if view.takes_momentum else None


def _weight_decay(view: GroupView, group: Group) -> float | None:
    return float(group["weight_decay"]) if view.takes_weight_decay else None


def _filled(place: int, view: GroupView, group: Group) -> dict[str, Any]:
    what = f"param_groups[{place}]"
    if not isinstance(group, Mapping) or not isinstance(group.get("params"), list):
        raise TypeError(f"{what} is {group!r}: expected what state_dict returned")
    filled = {**_shown(view), **group}
    for name in view.numbers:
        number = filled[name]
        # schedulers write into an lr that is one
        is_tensor = isinstance(number, Tensor) and number.dim() == 0
        check_number(f"{name} of {what}", number.item() if is_tensor else number)
    betas = filled["betas"] if view.betas else ()
    if not isinstance(betas, list | tuple) or len(betas) != len(view.betas):
        raise ValueError(f"betas={betas!r} of {what}: expected {len(view.betas)} numbers")
    for beta in betas:
        check_number(f"betas of {what}", beta)
    return filled


def _shown(view: GroupView) -> dict[str, Any]:
    # a map on the wire has no order
    numbers = {name: view.numbers[name] for name in sorted(view.numbers)}
    betas = {"betas": view.betas} if view.betas else {}
    return {"lr": numbers.pop("lr")} | betas | numbers
