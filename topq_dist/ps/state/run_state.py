"""The state of a run: model, ledger and update log, which change together and are saved together.

Not for several threads at once: the coordinator's lock guards it.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from topq_dist.ps.model.flat import FlatModel, copy_of
from topq_dist.ps.model.spec import ModelSpec
from topq_dist.ps.protocol.config import ConfigError, TrainingConfig
from topq_dist.ps.protocol.errors import ExpiredError, InvalidError, NonFiniteError
from topq_dist.ps.protocol.types import (
    START,
    Answer,
    ModelVersion,
    Push,
    Update,
    UpdateKind,
    next_chain,
)
from topq_dist.ps.state.ledger import Ledger
from topq_dist.ps.state.snapshot import Snapshot, check_same_training, training_json
from topq_dist.ps.state.snapshot_file import StateError
from topq_dist.ps.state.state_dir import StateDir
from topq_dist.ps.state.update_log import UpdateLog
from topq_dist.ps.training.central import CentralModel

_HISTORY_BYTES = 4 << 20
# of one answer: each adds to its header, and gRPC's clients take 4 MiB a message
_MOST_UPDATES = 10_000


def new_run() -> str:
    """Return a name for a new run."""
    return secrets.token_hex(8)


class RunState:
    """One run at its present point."""

    def __init__(
        self,
        *,
        run: str,
        training: TrainingConfig,
        point: ModelVersion,
        central: CentralModel,
        ledger: Ledger,
        update_log: UpdateLog,
    ) -> None:
        self.run = run
        self.training = training
        self.point = point
        self.central = central
        self.ledger = ledger
        self.update_log = update_log
        self._full: Update | None = None
        self._copies: dict[str, Tensor] = {}

    @classmethod
    def start(
        cls,
        run: str,
        training: TrainingConfig,
        spec: ModelSpec,
        vectors: Sequence[memoryview],
        *,
        ledger: Ledger,
        history_bytes: int,
    ) -> RunState:
        """Return a run that starts at these raw vectors.

        Raises NonFiniteError or InvalidError for values that no training can start from, and
        InvalidError for a model that the configuration does not go with.
        """
        training = training.begun()
        values = FlatModel(spec)
        values.load_raw(vectors)
        if not all(bool(torch.isfinite(flat).all()) for flat in values.flats):
            raise NonFiniteError("the model holds NaN or infinity: expected finite values")
        try:
            central = CentralModel(training, spec, values)
        except ValueError as error:
            raise InvalidError(f"the server cannot train this model: {error}") from error
        return cls(
            run=run,
            training=training,
            point=START,
            central=central,
            ledger=ledger,
            update_log=UpdateLog(history_bytes),
        )

    @classmethod
    def load(
        cls, state_dir: StateDir, training: TrainingConfig, *, history_bytes: int
    ) -> tuple[RunState, tuple[str, ...]] | None:
        """Return the run of the latest snapshot and whose leases ran then; None without one.

        Raises StateError for a snapshot that is damaged, hostile or of another configuration, and
        ConfigError for an option without effect beside what the run began with.
        """
        snapshot = state_dir.load()
        if snapshot is None:
            return None
        try:
            check_same_training(snapshot.training, training)
            _check_sizes(snapshot)
            training = training.begun(snapshot.training)
            central = CentralModel(training, snapshot.spec, FlatModel(snapshot.spec))
            central.load_state(snapshot.tensors, snapshot.central)
            update_log = UpdateLog(history_bytes)
            update_log.load_state(_joined(snapshot.history_payloads), snapshot.history)
            state = cls(
                run=snapshot.run,
                training=training,
                point=snapshot.point,
                central=central,
                ledger=Ledger.from_json(snapshot.ledger),
                update_log=update_log,
            )
            if not central.is_finite():
                raise ValueError("it holds NaN or infinity, from which no training goes on")
            if update_log.newest != snapshot.point:
                raise ValueError(f"a history up to {update_log.newest} beside {snapshot.point}")
        except StateError:
            raise
        except Exception as error:  # a file with a fitting digest may hold anything
            if isinstance(error, ConfigError) and error.field == "adapt_rate":  # not of the file
                raise
            raise state_dir.unusable(error) from error
        return state, tuple(snapshot.workers)

    def snapshot(self, workers: Iterable[str], *, every: int = 1) -> Snapshot:
        """Return all of it, copied where it changes, with whose leases run.

        every: versions between two snapshots. The history goes along as far as that costs each
        version no more than a model's bytes, or 4 MiB, to write.
        The copies are valid until the next call: they are made in memory that is kept, because
        fresh memory costs several times what the copying does.
        """
        tensors, central = self.central.state(copied=False)
        self._copies = {key: _copied(t, self._copies.get(key)) for key, t in tensors.items()}
        payloads, history = self.update_log.state(every * max(self.spec.raw_bytes, _HISTORY_BYTES))
        return Snapshot(
            run=self.run,
            point=self.point,
            training=training_json(self.training),
            spec=self.spec,
            ledger=self.ledger.to_json(),
            history=history,
            history_payloads=payloads,
            central=central,
            tensors=self._copies,
            workers=sorted(workers),
        )

    @property
    def spec(self) -> ModelSpec:
        """The tensors of the model."""
        return self.central.spec

    def apply(self, pushes: Sequence[Push]) -> None:
        """Make the next version of these pushes, each of which the ledger called next.

        Raises NonFiniteStepError, as CentralModel does. What else raises in here leaves the state
        between two versions, of no use any more.
        """
        kind, payloads = self.central.apply(pushes)
        chained = [(push.worker, push.sequence, push.digest) for push in pushes]
        point = ModelVersion(
            version=self.point.version + 1, chain=next_chain(self.point.chain, chained)
        )
        self.ledger.record(point.version, pushes)
        members = tuple(push.worker for push in pushes)
        self.update_log.add(Update.made(kind, point, payloads), members)
        self.ledger.forget_before(self.update_log.oldest_version)
        self.point = point
        self._full = None

    def on_chain(self, point: ModelVersion) -> bool:
        """Return whether `point` is known to lie on the way to the present one."""
        return point == self.point or self.update_log.updates(point, point.version) is not None

    def fresh(self, push: Push) -> Answer:
        """Return the answer to a push of the version that was just made."""
        answer = self._answer(push.base, self.point, self._members(self.point.version))
        return replace(answer, disagreement=self.central.disagreement)

    def repeat(self, push: Push, version: int) -> Answer:
        """Return the answer to a push that was applied in `version`: the same as then.

        Its updates go no further than then, so that a worker that goes back in time walks the same
        way again. Raises ExpiredError where they are not kept any more, or are more than the first
        answer can have been: the base is the caller's word.
        """
        made = self.update_log.at(version)
        if made is not None:
            if version == self.point.version:
                return self._answer(push.base, *made)
            updates = self._updates(push.base, version)
            if updates is not None and _bytes_of(updates) <= self._most_repeated_bytes():
                return Answer(applied=made[0], members=made[1], updates=updates, durable_version=0)
        raise ExpiredError(
            f"push {push.sequence} of {push.worker!r} was applied in version {version}, and the "
            f"updates from version {push.base.version} on are not kept any more, or too many to be "
            "sent again"
        )

    def stale(self, push: Push) -> Answer:
        """Return the answer to a push that is refused for its base."""
        return self._answer(push.base, None, ())

    def full(self, *, central: bool = False) -> Update:
        """Return the whole model, copied: what workers hold at this point, or `central`'s own."""
        if central:
            payloads = tuple(self.central.central_raw())
            return Update.made(UpdateKind.FULL, self.point, payloads)
        if self._full is None:
            payloads = tuple(self.central.workers_raw())
            self._full = Update.made(UpdateKind.FULL, self.point, payloads)
        return self._full

    def sha256(self) -> str:
        """Return the SHA-256, in hexadecimal, of the model, its optimizer and its chain."""
        digest = hashlib.sha256(self.central.sha256().encode())
        digest.update(f" {self.point.version} {self.point.chain.hex()}".encode())
        return digest.hexdigest()

    def _members(self, version: int) -> tuple[str, ...]:
        made = self.update_log.at(version)
        return () if made is None else made[1]

    def _answer(
        self, base: ModelVersion, applied: ModelVersion | None, members: tuple[str, ...]
    ) -> Answer:
        """Return an answer that ends at the present point."""
        updates = self._updates(base, self.point.version)
        if updates is None or _bytes_of(updates) > self.spec.raw_bytes:
            updates = (self.full(),)
        return Answer(applied=applied, members=members, updates=updates, durable_version=0)

    def _updates(self, base: ModelVersion, version: int) -> tuple[Update, ...] | None:
        """Return what brings a worker from `base` to `version`; None where that is not to be sent.

        It is so across very many versions, which to look through takes time as well.
        """
        if version - base.version > _MOST_UPDATES:
            return None
        return self.update_log.updates(base, version)

    def _most_repeated_bytes(self) -> int:
        lag = self.training.max_staleness if self.training.mode == "async" else 0
        return (lag + 1) * max(self.spec.raw_bytes, self.spec.max_frame_bytes)


def _bytes_of(updates: Sequence[Update]) -> int:
    return sum(update.payload_bytes for update in updates)


def _check_sizes(snapshot: Snapshot) -> None:
    """Raise ValueError unless the parameters are as many as the spec takes memory for."""
    for place, vector in enumerate(snapshot.spec.vectors):
        saved = snapshot.tensors.get(f"model.{place}")
        found = "no" if saved is None else saved.numel()
        if found != vector.numel:
            raise ValueError(f"{found} elements of vector {place}: expected {vector.numel}")


def _copied(tensor: Tensor, kept: Tensor | None) -> Tensor:
    if kept is None or kept.dtype != tensor.dtype or kept.shape != tensor.shape:
        return copy_of(tensor)
    return kept.copy_(tensor)


def _joined(parts: Sequence[memoryview]) -> memoryview:
    return parts[0] if len(parts) == 1 else memoryview(b"".join(parts))
