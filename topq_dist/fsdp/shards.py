"""The shards that a rank holds: which parameters and modules they are of, and their layouts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import groupby
from operator import itemgetter

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from topq_dist.compress.layout import Layout
from topq_dist.dtypes import local_part
from topq_dist.fsdp.capture import Reduction
from topq_dist.fsdp.torch_side import own_parameters, sharded_modules
from topq_dist.hook.sparsity_policy import PlannedSparsity
from topq_dist.hook.stages import Laid


def sharded_names(root: FSDPModule) -> dict[Tensor, str]:
    """Return the name of each parameter that fully_shard has sharded, those frozen included.

    What torch.compile and checkpoint_wrapper add to names is left out, so that a state fits the
    model with them or without.
    """
    added = ("_orig_mod.", "_checkpoint_wrapped_module.")
    names: dict[Tensor, str] = {}
    for name, parameter in root.named_parameters():  # type: ignore[attr-defined]
        if isinstance(parameter, DTensor):
            for prefix in added:
                name = name.replace(prefix, "")
            names[parameter] = name
    return names


class ShardedModules:
    """The modules that fully_shard was applied to, each with the parameters of its own."""

    def __init__(self, root: FSDPModule, names: Mapping[Tensor, str]) -> None:
        self._own = {
            module: [one for one in own_parameters(module) if one in names]
            for module in sharded_modules(root)
        }

    def all(self) -> list[tuple[FSDPModule, list[Tensor]]]:
        """Return each module with its parameters."""
        return list(self._own.items())

    def trainable(self) -> list[tuple[FSDPModule, list[Tensor]]]:
        """Return modules with those of their parameters that train, and are not empty here.

        Where all are empty, one of them: such a rank must go along with the others.
        """
        found = [
            (module, one) for module, held in self._own.items() for one in held if one.requires_grad
        ]
        filled = [(module, one) for module, one in found if local_part(one).numel()] or found[:1]
        return [
            (module, [one for _, one in group])
            for module, group in groupby(filled, key=itemgetter(0))
        ]


class ShardFacts:
    """Which parameters have no gradient in the step that has begun, on all replicas alike.

    may_be_unused: whether there are such.
    """

    def __init__(self, names: Mapping[Tensor, str]) -> None:
        self._names = names
        self._without: list[str] = []
        self._applied = ""
        self.may_be_unused = False

    def note(self, reductions: Sequence[Reduction]) -> None:
        """Take note of how many gradients a parameter has had: none, or one each time applied."""
        counts = Counter(one for reduction in reductions for one in reduction.parameters)
        self._without = [
            name for one, name in self._names.items() if one.requires_grad and not counts.get(one)
        ]
        self.may_be_unused = bool(self._without)
        several = {self._names[one]: count for one, count in counts.items() if count > 1}
        self._applied = ", ".join(f"{name} {count}" for name, count in sorted(several.items()))

    def group(self) -> None:
        """Return None: the ranks are those that the hook was registered with."""

    def begin_step(self) -> None:
        """Do nothing: `note` has said what there is."""

    def settings(self) -> str:
        """Return what must be the same on every rank in the step that has begun."""
        without = ", ".join(self._without) or "none"
        return f"parameters without a gradient: {without}\nwith several: {self._applied or 'none'}"

    def end_step(self, exchanged: Collection[Tensor]) -> None:
        """Do nothing."""


class ShardLayouts:
    """The layouts of this rank's shards, one behind the other without padding."""

    def __init__(self, names: Mapping[Tensor, str]) -> None:
        self._names = names
        self._known: dict[tuple[int, ...], Laid] = {}
        self.seen: set[Tensor] = set()

    def known(self) -> list[Layout]:
        """Return all that there have been."""
        return [layout for layout, _ in self._known.values()]

    def of(self, parameters: Sequence[Tensor]) -> Laid:
        """Return the layout of these parameters' shards; nothing of it is out of rows."""
        key = tuple(map(id, parameters))
        if key not in self._known:
            layout = Layout(
                names=tuple(self._names[one] for one in parameters),
                shapes=tuple(tuple(local_part(one).shape) for one in parameters),
            )
            self._known[key] = layout, ()
            self.seen.update(parameters)
        return self._known[key]


class ShardSparsity(PlannedSparsity):
    """One q for the shard of every parameter; at least one element of each is sent."""

    def _shape_of(self, parameter: Tensor) -> tuple[int, ...]:
        return tuple(local_part(parameter).shape)


def shard_device(parameter: Tensor) -> torch.device:
    """Return the device on which a parameter is trained: that of its mesh, this process's own."""
    assert isinstance(parameter, DTensor)  # noqa: S101 - for mypy: the names hold no others
    kind = parameter.device_mesh.device_type
    if kind == "cpu":
        return torch.device(kind)
    return torch.device(kind, torch.accelerator.current_device_index())


def shard_group(parameter: Tensor) -> dist.ProcessGroup:
    """Return the ranks among which a parameter is sharded."""
    assert isinstance(parameter, DTensor)  # noqa: S101 - for mypy: the names hold no others
    return parameter.device_mesh.get_group()
