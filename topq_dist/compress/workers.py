"""A few kept threads for passes over long vectors, whose loops release Python's lock."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")

_MOST_THREADS = 4

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_pool_threads = 0


def thread_count() -> int:
    """Return how many threads a pass is worth: half of torch.get_num_threads(), 4 at most.

    Passes run at the speed of memory, which few threads exhaust. The other half is still spinning
    after torch's last operation, or carries frames: with both cores of two a pass took a seventh
    less time where all else was quiet, and twice as much where it was not.
    """
    return max(1, min(torch.get_num_threads() // 2, _MOST_THREADS))


def run_all(tasks: Sequence[Callable[[], T]]) -> list[T]:
    """Run the tasks at the same time, the first in the caller's thread; results in their order.

    Tasks must not call run_all: they would wait for the threads that they occupy.
    """
    if len(tasks) == 1:
        return [tasks[0]()]
    futures = [_threads(len(tasks) - 1).submit(task) for task in tasks[1:]]
    try:
        first = tasks[0]()
    finally:
        # a task still writing into kept scratch must not outlive this call
        rest = [future.exception() for future in futures]
    for error in rest:
        if error is not None:
            raise error
    return [first, *(future.result() for future in futures)]


def _threads(count: int) -> ThreadPoolExecutor:
    global _pool, _pool_threads
    with _lock:
        if _pool is None or _pool_threads < count:
            # the executor joins its idle threads at interpreter exit; an outgrown one ends when its
            # last user drops it
            _pool, _pool_threads = ThreadPoolExecutor(count, "topq_dist"), count
        return _pool


def _forget_in_child() -> None:
    # a forked child has the executor but none of its threads
    global _lock, _pool
    _lock, _pool = threading.Lock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
