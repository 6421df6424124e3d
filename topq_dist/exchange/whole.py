"""Another exchange, but an all-reduce in the steps that leave nothing out."""

from __future__ import annotations

from collections.abc import Callable

from topq_dist.exchange.base import Exchange, SwitchingExchange
from topq_dist.exchange.dense import Dense


class AllReduceWhole(SwitchingExchange):
    """Frames that hold everything are more bytes than everything, and add up in another order.

    So steps of which `sends_all` says that nothing is left out or rounded are `dense`'s, which
    shares the compressor. A step goes by what was so in the one before it: ranks that disagree have
    then compared their settings in the same exchange. Behind steps of `exchange` those of `dense`
    flush the residual in equal shares anew.

    all_reduces_next: whether the next step is the all-reduce's.
    """

    def __init__(self, exchange: Exchange, dense: Dense, sends_all: Callable[[], bool]) -> None:
        self._exchange = exchange
        self._dense = dense
        self._sends_all = sends_all
        self._current = exchange
        self.all_reduces_next = sends_all()

    @property
    def sparse(self) -> bool:  # type: ignore[override]
        return self._current.sparse

    @property
    def chosen(self) -> str | None:  # type: ignore[override]
        return self._exchange.chosen

    @property
    def dense_steps(self) -> int:  # type: ignore[override]
        return self._current.dense_steps

    def begin_step(self) -> None:
        self._current = self._dense if self.all_reduces_next else self._exchange
        self.all_reduces_next = self._sends_all()
        if self._current is not self._dense:
            # what this step leaves is flushed from the beginning, as after a resume
            self._dense.resume(None, 0)
        self._current.begin_step()

    def settings(self) -> str:
        return f"all_reduces_next={self.all_reduces_next}\n{self._exchange.settings()}"

    def can_choose(self, chosen: str | None) -> bool:
        return self._exchange.can_choose(chosen)

    def check_chosen(self, chosen: str | None) -> None:
        self._exchange.check_chosen(chosen)

    def resume(self, chosen: str | None, dense_steps: int) -> None:
        self._exchange.resume(chosen, dense_steps)
        self._dense.resume(None, dense_steps)
        self.all_reduces_next = self._sends_all()
