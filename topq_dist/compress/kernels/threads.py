"""A few standing threads for passes over long vectors, whose loops release Python's lock.

Not an executor: an interrupt in the midst of its submit can leave one of its locks taken, and the
process then never ends. Here nothing that interrupts a caller loses a task or runs one twice.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Generic, TypeVar

import torch

T = TypeVar("T")

_MOST_THREADS = 4
# a wake-up is lost where an interrupt falls just behind it, and noticed after this
_LOST_WAKE_UP_S = 0.05


class _Task(Generic[T]):
    """A call for whichever thread takes it first, and what has come of it."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._unclaimed = threading.Lock()
        self._finished = threading.Lock()
        self._finished.acquire()
        self.done = False
        self.error: BaseException | None = None
        self.results: list[T] = []

    def run(self) -> None:
        """Make the call, unless another thread has taken it."""
        if not self._unclaimed.acquire(blocking=False):
            return
        try:
            self.results.append(self._call())
        except BaseException as error:  # noqa: BLE001 - raised where the result is wanted
            self.error = error
        self.done = True
        self._finished.release()

    def wait(self) -> None:
        while not self.done:
            self._finished.acquire(timeout=_LOST_WAKE_UP_S)


_waiting: SimpleQueue[_Task[object]] = SimpleQueue()
_threads: list[threading.Thread] = []


def thread_count() -> int:
    """Return how many threads a pass is worth: half of torch.get_num_threads(), 4 at most.

    Passes run at the speed of memory, which few threads exhaust. The other half is still spinning
    after torch's last operation, or carries frames: with both cores of two a pass took a seventh
    less time where all else was quiet, and twice as much where it was not.
    """
    return max(1, min(torch.get_num_threads() // 2, _MOST_THREADS))


def run_all(tasks: Sequence[Callable[[], T]]) -> list[T]:
    """Run the tasks at the same time, the first in the caller's thread; results in their order.

    Where one raises, or the caller is interrupted, that is raised once all of them have ended: none
    still writes into scratch then. Tasks must not call run_all: they would wait for the
    threads that they occupy.
    """
    if len(tasks) == 1:
        return [tasks[0]()]
    _start_threads(len(tasks) - 1)
    if not _threads:
        return [task() for task in tasks]
    others = [_Task(task) for task in tasks[1:]]
    interrupted = True
    try:
        _hand_out(others)
        first = tasks[0]()
        interrupted = False
    finally:
        _wait_for(others, interrupted=interrupted)
    for other in others:
        if other.error is not None:
            raise other.error
    return [first, *(other.results[0] for other in others)]


def _start_threads(count: int) -> None:
    """Have so many threads, or fewer where the system has no more to give."""
    while len(_threads) < count:
        name = f"topq_dist_{len(_threads)}"
        thread = threading.Thread(target=_work, args=(_waiting,), name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError:
            return
        _threads.append(thread)


def _hand_out(tasks: Sequence[_Task[T]]) -> None:
    for task in tasks:
        _waiting.put(task)  # type: ignore[arg-type] # its result is nobody else's


def _wait_for(tasks: Sequence[_Task[T]], *, interrupted: bool) -> None:
    """Wait for all, and only then raise what has interrupted it; tasks take milliseconds."""
    interrupt: BaseException | None = None
    while True:
        try:
            if interrupted:
                # which of them had been handed out is not known, and none runs twice
                _hand_out(tasks)
            for task in tasks:
                task.wait()
            break
        except BaseException as raised:  # noqa: BLE001 - raised below
            interrupt, interrupted = raised, True
    if interrupt is not None:
        raise interrupt


def _work(waiting: SimpleQueue[_Task[object]]) -> None:
    while True:
        waiting.get().run()


def _forget_in_child() -> None:
    # a forked child has none of the threads
    global _waiting
    _waiting = SimpleQueue()
    _threads.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
