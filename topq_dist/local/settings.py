"""What a user says of local steps, checked before anything is touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from topq_dist.local.outer import OuterSgd
from topq_dist.validation import check_fraction

BufferRule = Literal["first", "own"]
LocalExchangeName = Literal["allgather", "split", "hierarchical"]


@dataclass(frozen=True, kw_only=True)
class LocalSettings:
    """When which parameters are exchanged, and what becomes of them; see LocalTopQ.

    Raises TypeError or ValueError for a value out of place, naming it.
    """

    every: int
    outer: OuterSgd
    fragments: int
    offsets: tuple[int, ...]
    overlap: int
    blend: float | None
    buffers: BufferRule

    def __post_init__(self) -> None:
        if self.buffers not in get_args(BufferRule):
            known = ", ".join(map(repr, get_args(BufferRule)))
            raise ValueError(f"buffers={self.buffers!r}: expected one of {known}")
        if not 0 <= check_whole("overlap", self.overlap) < self.every:
            raise ValueError(
                f"overlap={self.overlap}: expected a number of steps from 0 to every - 1, which "
                f"is {self.every - 1}: a fragment's exchange ends before its next one begins"
            )
        if self.blend is None:
            return
        if check_fraction("blend", self.blend) == 1.0:
            raise ValueError(
                f"blend={self.blend!r}: expected a number in [0, 1): with 1 ranks never meet"
            )
        if not self.overlap:
            raise ValueError(
                f"blend={self.blend!r} with overlap=0: expected None, since no inner step is taken "
                "beside the exchange"
            )

    def due(self, fragment: int, step: int) -> bool:
        """Return whether a round of this fragment begins at the end of a step, counted from 1."""
        return step % self.every == self.offsets[fragment] % self.every

    def text(self) -> str:
        """Return what must be the same on every rank, a line for each kind of setting."""
        when = f"every={self.every} overlap={self.overlap} offsets={self.offsets}"
        return f"{when}\nblend={self.blend} buffers={self.buffers}\n{self.outer}"


def make_settings(
    *,
    every: int,
    outer_lr: float,
    outer_momentum: float,
    nesterov: bool,
    fragments: int,
    offsets: Sequence[int] | None,
    overlap: int,
    blend: float | None,
    buffers: BufferRule,
) -> LocalSettings:
    """Return the settings; raises TypeError or ValueError for one that is out of place."""
    if check_whole("every", every) < 1:
        raise ValueError(f"every={every}: expected a number of inner steps above zero")
    if check_whole("fragments", fragments) < 1:
        raise ValueError(f"fragments={fragments}: expected a number above zero")
    return LocalSettings(
        every=every,
        outer=OuterSgd(lr=outer_lr, momentum=outer_momentum, nesterov=nesterov),
        fragments=fragments,
        offsets=_offsets(every, fragments, offsets),
        overlap=overlap,
        blend=blend,
        buffers=buffers,
    )


def _offsets(every: int, fragments: int, offsets: Sequence[int] | None) -> tuple[int, ...]:
    if offsets is None:
        # the last one ends a period, as the only one would
        return tuple(-(-every * (place + 1) // fragments) for place in range(fragments))
    found = tuple(offsets)
    if len(found) != fragments:
        raise ValueError(f"offsets={found} with fragments={fragments}: expected one for each")
    for offset in found:
        if not 1 <= check_whole("offsets", offset) <= every:
            raise ValueError(f"offsets={found}: expected steps from 1 to every, which is {every}")
    return found


def check_local_exchange(name: LocalExchangeName) -> None:
    """Raise ValueError for an exchange that rounds cannot take."""
    if name not in get_args(LocalExchangeName):
        known = ", ".join(map(repr, get_args(LocalExchangeName)))
        raise ValueError(
            f"exchange={name!r}: expected one of {known}; with q=0 an all-gather sends everything"
        )


def check_whole(name: str, value: Any) -> int:
    """Return `value`, or raise TypeError naming `name` unless it is an integer."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r}: expected an integer, got {type(value).__name__}")
    return value
