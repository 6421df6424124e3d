"""The ledger: which pushes were applied, so that each is applied exactly once.

A worker's pushes are numbered from 1 without gaps, across all processes that ever took its name.
Each process has an epoch; a newer one fences the older off. Nothing here waits, locks or does I/O:
whoever applies a push calls `check` and `record` under one lock.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Self

from topq_dist.ps.protocol.errors import (
    DigestDiffersError,
    ExpiredError,
    FencedError,
    InvalidError,
    NotJoinedError,
    SequenceGapError,
    TooManyWorkersError,
)
from topq_dist.ps.protocol.types import DIGEST_BYTES, INSTANCE_BYTES, Push, check_worker_name

_APPLIED = struct.Struct(f"<Q{DIGEST_BYTES}s")  # version, digest
_LARGEST = 2**63 - 1
_LARGEST_CLAIM = 2**62  # of a worker that joins: counting on from it stays below _LARGEST
# each is kept for ever, in memory and in every snapshot
MOST_WORKERS = 10_000


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A worker's place: which process holds its name, and the number of its next push.

    first_sequence: of its first push here; above 1 where it had pushed to a server before this one.
    """

    worker: str
    instance: bytes
    epoch: int
    next_sequence: int
    first_sequence: int = 1

    def after(self, sequence: int) -> Entry:
        """Return the entry once this push was applied; `replace` takes four times as long."""
        return Entry(
            worker=self.worker,
            instance=self.instance,
            epoch=self.epoch,
            next_sequence=sequence + 1,
            first_sequence=self.first_sequence,
        )


@dataclass(frozen=True)
class Next:
    """The push is the worker's next: to be applied."""


@dataclass(frozen=True)
class Repeat:
    """The push is in `version` already: to be answered again."""

    version: int


Verdict = Next | Repeat


class Ledger:
    """All that was applied of each worker, and in which version.

    Digests are remembered from the version on that `forget_before` was last told, so that a repeat
    can be told from another push under the same number.
    """

    def __init__(self) -> None:
        self._version = 0
        self._entries: dict[str, Entry] = {}
        # of each worker the packed (version, digest) of its latest pushes, without gaps
        self._applied: dict[str, bytearray] = {}

    @property
    def version(self) -> int:
        """The version that `record` was last told of; 0 at the start."""
        return self._version

    @property
    def workers(self) -> tuple[str, ...]:
        """All workers that ever joined, in the order of names."""
        return tuple(sorted(self._entries))

    @property
    def worker_count(self) -> int:
        """The number of workers that ever joined."""
        return len(self._entries)

    def make_room(self, present: Collection[str]) -> None:
        """Forget those that never pushed here, but for `present`, where no more workers can join.

        Others cannot be forgotten: what they pushed could be applied again.
        """
        if len(self._entries) >= MOST_WORKERS:
            for worker in list(self._entries.keys() - set(present)):
                entry = self._entries[worker]
                if entry.next_sequence == entry.first_sequence:
                    del self._entries[worker], self._applied[worker]

    def entry(self, worker: str) -> Entry:
        """Return the worker's place; raises NotJoinedError where it has none."""
        entry = self._entries.get(worker)
        if entry is None:
            raise NotJoinedError(f"worker {worker!r} has not joined this run: join first")
        return entry

    def next_sequence(self, worker: str) -> int:
        """Return the number of the worker's next push; raises NotJoinedError."""
        return self.entry(worker).next_sequence

    def join(self, worker: str, instance: bytes, epoch: int, next_sequence: int) -> Entry:
        """Give `worker`'s name to the process `instance` (16 bytes) and return its place.

        epoch: 0 where the process has not joined yet, else what it was told. The process that has
        the name keeps its epoch however often it joins. A new one is given the next epoch; one
        that was given a later epoch than the ledger knows (the ledger was restored from before)
        keeps it.
        next_sequence: what a worker that the ledger does not know goes on from; 0 stands for 1. A
        known one goes on from the ledger's number.

        Raises InvalidError, FencedError where a newer process has the name, and
        TooManyWorkersError for a name too many.
        """
        check_worker_name(worker)
        if not isinstance(instance, bytes) or len(instance) != INSTANCE_BYTES:
            raise InvalidError(f"instance={instance!r}: expected {INSTANCE_BYTES} bytes")
        known = self._entries.get(worker)
        largest_epoch = _LARGEST_CLAIM if known is None else max(_LARGEST_CLAIM, known.epoch)
        _check_count("epoch", epoch, 0, largest_epoch)
        if known is None:
            _check_count("next_sequence", next_sequence, 0, _LARGEST_CLAIM)
            if len(self._entries) >= MOST_WORKERS:
                raise TooManyWorkersError(
                    f"worker {worker!r} is one too many in a run that has had {MOST_WORKERS}: "
                    "expected workers that keep their names when they are started again"
                )
            entry = Entry(
                worker=worker,
                instance=instance,
                epoch=max(epoch, 1),
                next_sequence=max(next_sequence, 1),
                first_sequence=max(next_sequence, 1),
            )
            self._applied[worker] = bytearray()
        elif epoch > known.epoch:
            entry = replace(known, instance=instance, epoch=epoch)
        elif instance == known.instance:
            return known
        elif epoch == 0:
            entry = replace(known, instance=instance, epoch=known.epoch + 1)
        else:
            raise _fenced(known, epoch)
        self._entries[worker] = entry
        return entry

    def check(self, worker: str, epoch: int, sequence: int, digest: bytes) -> Verdict:
        """Say whether the push is to be applied or was before; changes nothing.

        Raises NotJoinedError (also for an epoch that this ledger never gave: the process must join
        again), FencedError, SequenceGapError, DigestDiffersError, ExpiredError where the number
        was used before what is remembered, and InvalidError for what can be no push.
        """
        _check_count("sequence", sequence, 1)
        if not isinstance(digest, bytes) or len(digest) != DIGEST_BYTES:
            raise InvalidError(f"digest={digest!r}: expected {DIGEST_BYTES} bytes")
        entry = self.entry(worker)
        if epoch < entry.epoch:
            raise _fenced(entry, epoch)
        if epoch > entry.epoch:
            raise NotJoinedError(
                f"worker {worker!r} says epoch {epoch}, and is known here in epoch {entry.epoch}: "
                "join again"
            )
        expected = entry.next_sequence
        if sequence > expected:
            raise SequenceGapError(
                f"worker {worker!r} sent push {sequence}: expected push {expected}"
            )
        if sequence == expected:
            return Next()
        applied = self._applied[worker]
        oldest = expected - len(applied) // _APPLIED.size
        if sequence < oldest:
            raise ExpiredError(
                f"worker {worker!r} repeated push {sequence}, which was applied too long ago to be "
                f"answered again: pushes are remembered from {oldest} on"
            )
        version, known = _APPLIED.unpack_from(applied, (sequence - oldest) * _APPLIED.size)
        if digest != known:
            raise DigestDiffersError(
                f"worker {worker!r} sent push {sequence} with other contents than those that were "
                f"applied in version {version}: expected the same bytes, or push {expected}"
            )
        return Repeat(version)

    def record(self, version: int, pushes: Sequence[Push]) -> None:
        """Keep that `pushes`, each of which `check` called Next, were applied in `version`.

        Raises ValueError, and changes nothing, where a version would be skipped or made twice, or
        a push is not its worker's next in its present epoch.
        """
        if version != self._version + 1:
            raise ValueError(f"version={version!r}: expected {self._version + 1}")
        if not pushes:
            raise ValueError(f"pushes is empty: expected what version {version} applied")
        if len({push.worker for push in pushes}) < len(pushes):
            raise ValueError(f"version {version} has two pushes of one worker: expected one")
        for push in pushes:
            entry = self._entries.get(push.worker)
            place = None if entry is None else (entry.epoch, entry.next_sequence)
            if place != (push.epoch, push.sequence) or len(push.digest) != DIGEST_BYTES:
                raise ValueError(
                    f"push {push.sequence} of {push.worker!r} in epoch {push.epoch}: expected "
                    f"(epoch, sequence) to be {place}"
                )
        for push in pushes:
            self._applied[push.worker] += _APPLIED.pack(version, push.digest)
            self._entries[push.worker] = self._entries[push.worker].after(push.sequence)
        self._version = version

    def forget_before(self, version: int) -> None:
        """Forget the digests of pushes applied before `version`; their numbers stay used."""
        for applied in self._applied.values():
            end = 0
            while end < len(applied) and _APPLIED.unpack_from(applied, end)[0] < version:
                end += _APPLIED.size
            del applied[:end]

    def to_json(self) -> dict[str, Any]:
        """Return all of it as a tree that JSON can hold, none of it shared with the ledger."""
        workers = {
            worker: {
                "instance": entry.instance.hex(),
                "epoch": entry.epoch,
                "next_sequence": entry.next_sequence,
                "applied": self._applied[worker].hex(),
            }
            | ({"first_sequence": entry.first_sequence} if entry.first_sequence > 1 else {})
            for worker, entry in sorted(self._entries.items())
        }
        return {"version": self._version, "workers": workers}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Self:
        """Return the ledger that `to_json` wrote; raises ValueError for what it cannot have."""
        ledger = cls()
        try:
            ledger._version = _check_count("version", tree["version"], 0)
            for worker, row in tree["workers"].items():
                entry = Entry(
                    worker=check_worker_name(worker),
                    instance=bytes.fromhex(row["instance"]),
                    epoch=_check_count("epoch", row["epoch"], 1),
                    next_sequence=_check_count("next_sequence", row["next_sequence"], 1),
                    # states of before it was kept have none
                    first_sequence=_check_count("first_sequence", row.get("first_sequence", 1), 1),
                )
                applied = bytearray.fromhex(row["applied"])
                _check_row(entry, applied, ledger._version)
                ledger._entries[worker] = entry
                ledger._applied[worker] = applied
        except (AttributeError, InvalidError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a ledger: {error!r}") from error
        return ledger


def _check_row(entry: Entry, applied: bytearray, version: int) -> None:
    if len(entry.instance) != INSTANCE_BYTES:
        raise ValueError(f"instance of {entry.worker!r}: expected {INSTANCE_BYTES} bytes")
    count = entry.next_sequence - entry.first_sequence
    if len(applied) % _APPLIED.size or len(applied) // _APPLIED.size > count:
        raise ValueError(
            f"{len(applied)} bytes of applied pushes of {entry.worker!r}: expected "
            f"{_APPLIED.size} each, for numbers from {entry.first_sequence} on before "
            f"{entry.next_sequence}"
        )
    versions = [made for made, _ in _APPLIED.iter_unpack(applied)]
    if any(made >= later for made, later in pairwise([*versions, version + 1])):
        raise ValueError(f"versions of {entry.worker!r} do not ascend to {version} at most")


def _check_count(name: str, value: int, least: int, largest: int = _LARGEST) -> int:
    right = isinstance(value, int) and not isinstance(value, bool)
    if not right or not least <= value <= largest:
        raise InvalidError(f"{name}={value!r}: expected a whole number from {least} to {largest}")
    return value


def _fenced(entry: Entry, epoch: int) -> FencedError:
    return FencedError(
        f"worker {entry.worker!r} in epoch {epoch}: a newer process has taken this name, in epoch "
        f"{entry.epoch}"
    )
