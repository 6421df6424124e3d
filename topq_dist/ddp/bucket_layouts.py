"""The layouts of DDP's buckets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from topq_dist.compress.layout import Layout, OutOfRows, memory_order
from topq_dist.hook.sparsity_policy import SparsityPolicy
from topq_dist.hook.stages import Laid


class BucketLayouts:
    """The layouts of DDP's buckets, made when first asked for.

    names: of each parameter that may be in a bucket. seen: those that have been in one.
    """

    def __init__(self, names: Mapping[Tensor, str], sparsity: SparsityPolicy) -> None:
        self._names = names
        self._sparsity = sparsity
        # with the memory's order where it is not that of rows, by place
        self._known: dict[
            tuple[int, ...], tuple[dict[int, tuple[int, ...]], dict[tuple[int, ...], Laid]]
        ] = {}
        self.seen: set[Tensor] = set()

    def of(self, parameters: Sequence[Tensor]) -> Laid:
        """Return the layout of a bucket of these parameters, and what is out of rows for it.

        Raises ValueError for a parameter that has no name.
        """
        # by identity: parameters live as long as the model, and comparing them compares numbers
        key = tuple(map(id, parameters))
        known = self._known.get(key)
        if known is None:
            orders = {place: memory_order(one) for place, one in enumerate(parameters)}
            strides = {place: order for place, order in orders.items() if order is not None}
            known = self._known[key] = strides, {}
            self.seen.update(parameters)
        strides, laid = known
        apart = tuple(
            place
            for place, order in strides.items()
            if self._sparsity.selects_apart(parameters[place], order)
        )
        if apart not in laid:
            laid[apart] = self._laid_out(parameters, strides, apart)
        return laid[apart]

    def _laid_out(
        self,
        parameters: Sequence[Tensor],
        strides: Mapping[int, tuple[int, ...]],
        apart: Sequence[int],
    ) -> Laid:
        strangers = [tuple(one.shape) for one in parameters if one not in self._names]
        if strangers:
            raise ValueError(
                f"a bucket holds parameters of shapes {strangers}, which the hook's model has not: "
                "expected those of the model that its state was made for"
            )
        in_memory = {place: order for place, order in strides.items() if place not in apart}
        layout = Layout(
            names=tuple(self._names[one] for one in parameters),
            shapes=tuple(tuple(one.shape) for one in parameters),
            strides=tuple(map(in_memory.get, range(len(parameters)))) if in_memory else (),
        )
        slices = layout.slices()
        return layout, [OutOfRows(slices[at], layout.shapes[at], strides[at]) for at in apart]
