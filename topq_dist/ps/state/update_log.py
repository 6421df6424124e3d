"""The update log: recent updates, for workers that missed rounds or come back."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from topq_dist.ps.protocol.types import (
    START,
    ModelVersion,
    Update,
    UpdateKind,
    point_from_state,
    point_to_state,
)

# what Python keeps of a version and of each of its pushes, the ledger's part included; tiny
# updates would otherwise count as almost nothing
_VERSION_BYTES = 1024
_MEMBER_BYTES = 128


@dataclass(frozen=True, kw_only=True)
class _Made:
    update: Update
    members: tuple[str, ...]

    @property
    def held_bytes(self) -> int:
        counted = _VERSION_BYTES + _MEMBER_BYTES * len(self.members)
        return self.update.payload_bytes + counted


class UpdateLog:
    """The updates that made the latest versions, and whose pushes each of them applied.

    max_bytes: of the updates kept, with what each takes besides its payloads; the oldest are
    dropped beyond it, the last never.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._before = START  # the point that the oldest update starts from
        self._made: deque[_Made] = deque()
        self._held_bytes = 0

    @property
    def oldest_version(self) -> int:
        """The oldest version whose update is kept; one after the last where there is none."""
        return self._before.version + 1

    @property
    def newest(self) -> ModelVersion:
        """The point after the last update."""
        return self._made[-1].update.point if self._made else self._before

    @property
    def held_bytes(self) -> int:
        """Bytes that the updates take, as counted against max_bytes."""
        return self._held_bytes

    def add(self, update: Update, members: tuple[str, ...]) -> None:
        """Keep the update that made the next version of these workers' pushes.

        Its payloads must not change afterwards. Raises ValueError for any but the next version.
        """
        if update.point.version != self.newest.version + 1:
            raise ValueError(
                f"update to version {update.point.version}: expected {self.newest.version + 1}"
            )
        made = _Made(update=update, members=members)
        self._made.append(made)
        self._held_bytes += made.held_bytes
        self._drop_oldest()

    def at(self, version: int) -> tuple[ModelVersion, tuple[str, ...]] | None:
        """Return the point of `version` and whose pushes it applied; None where not kept."""
        place = version - self.oldest_version
        if not 0 <= place < len(self._made):
            return None
        made = self._made[place]
        return made.update.point, made.members

    def updates(self, base: ModelVersion, upto_version: int) -> tuple[Update, ...] | None:
        """Return what brings a worker from `base` to `upto_version`, oldest first.

        They begin at the latest that is FULL, before which nothing matters. None where `base` is
        not on this chain or too long ago, or `upto_version` is before it or not made yet.
        """
        if not self._knows(base) or not base.version <= upto_version <= self.newest.version:
            return None
        start, stop = base.version - self._before.version, upto_version - self._before.version
        updates = [made.update for made in islice(self._made, start, stop)]
        for place in range(len(updates) - 1, 0, -1):
            if updates[place].kind is UpdateKind.FULL:
                return tuple(updates[place:])
        return tuple(updates)

    def state(self, max_bytes: int | None = None) -> tuple[list[memoryview], dict[str, Any]]:
        """Return it for a snapshot: payloads, not copied, and the rest fit for JSON.

        Of more than `max_bytes`, counted as in held_bytes, the oldest are left out.
        """
        kept = deque(self._made)
        before, held_bytes = self._before, self._held_bytes
        while max_bytes is not None and held_bytes > max_bytes and len(kept) > 1:
            left_out = kept.popleft()
            before = left_out.update.point
            held_bytes -= left_out.held_bytes
        payloads = [payload for made in kept for payload in made.update.payloads]
        versions = [
            {
                "kind": made.update.kind.name,
                "chain": made.update.point.chain.hex(),
                "payload_bytes": [payload.nbytes for payload in made.update.payloads],
                "members": list(made.members),
            }
            for made in kept
        ]
        return payloads, {"before": point_to_state(before), "versions": versions}

    def load_state(self, payloads: memoryview, metadata: Mapping[str, Any]) -> None:
        """Replace all of it by what `state` returned, the payloads one behind the other.

        The payloads are copied, so that each can be freed. What is more than max_bytes is dropped.
        Raises ValueError, and changes nothing, for what no `state` returned.
        """
        try:
            before = point_from_state(metadata["before"])
            made, end = _read_versions(payloads, before, metadata["versions"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a history: {error!r}") from error
        if end != payloads.nbytes:
            raise ValueError(f"not a history: {payloads.nbytes} bytes of payloads, not {end}")
        self._before = before
        self._made = deque(made)
        self._held_bytes = sum(one.held_bytes for one in made)
        self._drop_oldest()

    def _knows(self, point: ModelVersion) -> bool:
        if point == self._before:
            return True
        known = self.at(point.version)
        return known is not None and known[0] == point

    def _drop_oldest(self) -> None:
        while self._held_bytes > self._max_bytes and len(self._made) > 1:
            dropped = self._made.popleft()
            self._held_bytes -= dropped.held_bytes
            self._before = dropped.update.point


def _read_versions(
    payloads: memoryview, before: ModelVersion, rows: list[Mapping[str, Any]]
) -> tuple[list[_Made], int]:
    made, end = [], 0
    for version, row in enumerate(rows, start=before.version + 1):
        parts = []
        for length in row["payload_bytes"]:
            if not isinstance(length, int) or not 0 <= length <= payloads.nbytes - end:
                raise ValueError(f"payload of {length!r} bytes in version {version}")
            parts.append(memoryview(bytes(payloads[end : end + length])))
            end += length
        point = point_from_state({"version": version, "chain": row["chain"]})
        update = Update.made(UpdateKind[row["kind"]], point, tuple(parts))
        made.append(_Made(update=update, members=tuple(map(str, row["members"]))))
    return made, end
