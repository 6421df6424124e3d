"""Facts, layouts and sparsity of a model whose shards are exchanged, as the pipeline asks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from topq_dist.compress.layout import Layout
from topq_dist.dtypes import local_part
from topq_dist.fsdp.capture import Reduction
from topq_dist.hook.sparsity_policy import PlannedSparsity
from topq_dist.hook.stages import Laid


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
