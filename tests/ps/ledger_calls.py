"""Pushes of a name and a number alone, for tests of the ledger."""

from __future__ import annotations

import hashlib
import json

from topq_dist.ps.protocol.types import START, Push
from topq_dist.ps.state.ledger import Ledger, Next, Repeat


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def push(worker: str, epoch: int, sequence: int, contents: str = "") -> Push:
    return Push(
        worker=worker,
        epoch=epoch,
        sequence=sequence,
        base=START,
        frames=(),
        lr=(),
        digest=digest(contents or f"{worker} {sequence}"),
    )


def check(ledger: Ledger, sent: Push) -> Next | Repeat:
    return ledger.check(sent.worker, sent.epoch, sent.sequence, sent.digest)


def reloaded(ledger: Ledger) -> Ledger:
    return Ledger.from_json(json.loads(json.dumps(ledger.to_json())))
