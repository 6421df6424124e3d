"""What is kept for each flat vector while DistributedDataParallel keeps its buckets."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from topq_dist.compress.feedback import Layout

T = TypeVar("T")

# one for all, which can be pickled: something is made once a bucket, and hardly ever again
_MAKING = threading.Lock()


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
        kept = self._kept
        if layout in kept:
            return kept[layout]
        with _MAKING:
            if layout not in self._kept:
                names = set(layout.names)
                kept = {
                    known: value
                    for known, value in self._kept.items()
                    if names.isdisjoint(known.names)
                }
                # replaced, never changed: other threads may be reading it
                self._kept = kept | {layout: self._make()}
            return self._kept[layout]
