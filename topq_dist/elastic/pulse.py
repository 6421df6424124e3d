"""Signs of life: each member's own, and who has given none for longer than the lease."""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable, Iterable

import torch.distributed as dist

from topq_dist.elastic.errors import store_lost

_LEFT = -(2**62)


def beats_key(token: str) -> str:
    """Return where a process counts its signs of life."""
    return f"beats/{token}"


class Pulse:
    """A thread that counts this process's beats up in the store, and reads those of others.

    store: a client of its own, since calls of one wait for each other. closed: returns, asked in
    each turn with the store, whether the epoch is over. Clocks are never compared: a lease is over
    when a count has stood still for so long by this process's clock.
    """

    def __init__(self, store: dist.Store, token: str, lease_s: float) -> None:
        self._store = store
        self._token = token
        self._lease_s = lease_s
        self._watched: dict[str, tuple[int, float]] = {}
        self._lost: frozenset[str] = frozenset()
        self._ask: Callable[[dist.Store], None] = _ask_nothing
        self._error: Exception | None = None
        self._changed = threading.Lock()
        self._ended = threading.Event()
        store.add(beats_key(token), 1)
        self._thread = threading.Thread(target=self._run, name="topq-pulse", daemon=True)
        self._thread.start()
        # a thread that is in the store when Python ends would abort it
        atexit.register(self.end)

    def watch(self, tokens: Iterable[str], ask: Callable[[dist.Store], None] | None = None) -> None:
        """Watch these processes besides those watched; `ask` is called in every turn from now."""
        with self._changed:
            for token in tokens:
                self._watched.setdefault(token, (0, time.monotonic()))
            if ask is not None:
                self._ask = ask

    def forget(self, tokens: Iterable[str]) -> None:
        """Watch these processes no longer."""
        with self._changed:
            for token in tokens:
                self._watched.pop(token, None)

    def lost(self) -> frozenset[str]:
        """Return who among the watched is lost; raises ConnectionError where the store is."""
        if self._error is not None:
            raise store_lost() from self._error
        return self._lost

    def end(self) -> None:
        """Say that this process leaves, and stop."""
        if self._ended.is_set():
            return
        self._ended.set()
        atexit.unregister(self.end)
        self._thread.join()
        try:
            self._store.add(beats_key(self._token), _LEFT)
        except RuntimeError:
            # who cannot say it will be missed
            return

    def _run(self) -> None:
        last_s = time.monotonic()
        pause_s = min(self._lease_s / 8, 1.0)
        while not self._ended.wait(pause_s):
            now_s = time.monotonic()
            # a process that stood still itself has not seen the others' beats
            stood_still = now_s - last_s > self._lease_s / 2
            last_s = now_s
            try:
                self._turn(stood_still=stood_still)
            except Exception as error:  # noqa: BLE001 - told to whoever asks
                self._error = error
                return

    def _turn(self, *, stood_still: bool) -> None:
        self._store.add(beats_key(self._token), 1)
        with self._changed:
            watched = dict(self._watched)
            ask = self._ask
        seen = {token: self._store.add(beats_key(token), 0) for token in watched}
        now_s = time.monotonic()
        with self._changed:
            for token, count in seen.items():
                before, since_s = self._watched.get(token, (count, now_s))
                if token in self._watched and (count != before or stood_still):
                    self._watched[token] = (count, now_s)
                elif token in self._watched:
                    self._watched[token] = (before, since_s)
            self._lost = frozenset(
                token
                for token, (count, since_s) in self._watched.items()
                if count < 0 or now_s - since_s > self._lease_s
            )
        ask(self._store)


def _ask_nothing(_: dist.Store) -> None:
    """Ask the store for nothing besides."""
