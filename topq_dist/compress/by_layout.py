"""What is kept for each flat vector while DistributedDataParallel keeps its buckets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from topq_dist.compress.feedback import Layout

T = TypeVar("T")


class ByLayout(Generic[T]):
    """One value a layout, made when first asked for.

    Layouts that share a name never live at once: DDP has made its buckets anew, and what was kept
    for the old ones is dropped.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._kept: dict[Layout, T] = {}

    def of(self, layout: Layout) -> T:
        """Return what is kept for `layout`."""
        if layout not in self._kept:
            names = set(layout.names)
            self._kept = {
                known: value for known, value in self._kept.items() if names.isdisjoint(known.names)
            }
            self._kept[layout] = self._make()
        return self._kept[layout]
