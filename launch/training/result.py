"""What a finished training run came to, and the JSON file it is kept in."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from training.options import Mode

MODE_NAMES: dict[Mode, str] = {"dense": "dense DDP", "topq": "top-Q", "ps": "top-Q PS"}


@dataclass(frozen=True, kw_only=True)
class Result:
    """One finished training run, as one rank saw it: rank 0, or any worker of a server.

    losses: that rank's training loss in nats, one a step. sent_bytes: handed to collectives, or
    pushed, by a rank up to and including each step. received_bytes: what an all-reduce returned,
    or a server sent; None where nobody counts it. select_s and wait_s: None for dense.
    """

    mode: Mode
    data: str
    ranks: int
    q: float | None
    inner_opt: str
    lr: float
    batch_size: int
    seed: int
    steps: int
    parameters: int
    parameters_sha256: str
    test_accuracy: float
    test_loss: float
    dense_bytes: int
    select_s: float | None
    wait_s: float | None
    train_s: float
    losses: list[float]
    sent_bytes: list[int]
    received_bytes: list[int] | None

    @classmethod
    def read(cls, path: Path) -> Result:
        """Read what `write` wrote."""
        return cls(**json.loads(path.read_bytes()))

    def write(self, path: Path) -> None:
        """Write to a JSON file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")
