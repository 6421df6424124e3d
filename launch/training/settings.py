"""The settings of a training run, which `options` checks and makes of a command line."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

Mode = Literal["dense", "topq", "ps"]
Downlink = Literal["exact", "topq", "dense"]
Schedule = Literal["constant", "linear"]
LinkName = Literal["none", "100mbit", "1gbit"]

MODE_NAMES: dict[Mode, str] = {"dense": "dense DDP", "topq": "top-Q", "ps": "top-Q PS"}
# None: as fast as this machine moves bytes
LINK_BITS_PER_S: dict[LinkName, float | None] = {"none": None, "100mbit": 1e8, "1gbit": 1e9}
LINK_TITLES: dict[LinkName, str] = {"none": "no", "100mbit": "100 Mbit", "1gbit": "1 Gbit"}
# of train.sh; the ranks that torchrun starts on hosts of their own have a link already
DEFAULT_LINK: LinkName = "100mbit"
# compare.py, as its user knows it
COMPARE = "train.sh"
# in the name of a file, for the name of the worker
WORKER_PLACE = "{worker}"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A data set's settings unless the user says otherwise; batch_size is a rank's."""

    inner_opt: str
    lr: float
    lr_schedule: Schedule
    steps: int
    batch_size: int


RECIPES = {
    "digits": Recipe(inner_opt="sgd", lr=0.1, lr_schedule="constant", steps=200, batch_size=32),
    # at a constant rate, the accuracy of dense itself goes up and down by a point in its last steps
    "fashion-mnist": Recipe(
        inner_opt="sgd", lr=0.1, lr_schedule="linear", steps=1000, batch_size=64
    ),
    # with AdamW, dense gets further in so few steps and top-Q does not: what arrives late and all
    # at once it divides by its own size
    "shakespeare": Recipe(
        inner_opt="sgd", lr=0.3, lr_schedule="constant", steps=1200, batch_size=8
    ),
}
DEFAULT_Q = 0.97
DEFAULT_DOWNLINK: Downlink = "topq"
DEFAULT_DOWNLINK_Q = 0.99
CHECKPOINT_EVERY = 100


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training run, the same on every rank.

    batch_size: samples a rank a step. link: the one that is emulated between the ranks.
    checkpoint: a folder; each mode writes to one of its own in it, every checkpoint_every steps
    and at the end.
    """

    data: str
    data_dir: Path | None
    q: float
    inner_opt: str
    lr: float
    lr_schedule: Schedule
    steps: int
    batch_size: int
    seed: int
    link: LinkName
    checkpoint: Path | None
    checkpoint_every: int
    resume: bool

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a step: a linear schedule ends at zero after the last."""
        return self.lr if self.lr_schedule == "constant" else self.lr * (1 - step / self.steps)

    def arguments(self, mode: Mode) -> list[str]:
        """Return the command line that `parse_rank` reads as these options in `mode`."""
        no_effect = set()
        if mode == "dense":
            no_effect.add("q")
        if self.checkpoint is None:
            no_effect.add("checkpoint_every")
        words = ["--dense"] if mode == "dense" else []
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None or value is False or field.name in no_effect:
                continue
            words.append(f"--{field.name.replace('_', '-')}")
            if value is not True:
                words.append(str(value))
        return words


@dataclass(frozen=True, kw_only=True)
class Connection:
    """Parameter servers and what it takes to speak to them; None where it takes no such file.

    servers: HOST:PORT each. In the name of a file, {worker} stands for the worker's name.
    """

    servers: tuple[str, ...]
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    token_file: str | None = None

    def arguments(self) -> list[str]:
        """Return the command line that `options` reads as this."""
        words = [word for server in self.servers for word in ("--server", server)]
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value is not None:
                words += [f"--{field.name.replace('_', '-')}", value]
        return words

    def file(self, option: str, worker: str) -> Path | None:
        """Return the file that e.g. "tls_ca" names for `worker`, or None."""
        name: str | None = getattr(self, option)
        return None if name is None else Path(name.replace(WORKER_PLACE, worker))


@dataclass(frozen=True, kw_only=True)
class Rank:
    """Settings of train.py: one training run in one mode; `result` is where rank 0 reports."""

    training: Training
    mode: Mode
    result: Path | None


@dataclass(frozen=True, kw_only=True)
class Worker(Rank):
    """Settings of ps_worker.py: a rank that speaks to parameter servers as `name`."""

    rank: int
    ranks: int
    name: str
    connection: Connection


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Settings of compare.py: the modes to run one after the other on `ranks` processes.

    connection: of running parameter servers; None: one is started for the mode "ps", which sends
    by `downlink`, with downlink_q where that is "topq".
    """

    training: Training
    modes: tuple[Mode, ...]
    ranks: int
    out: Path
    connection: Connection | None
    downlink: Downlink
    downlink_q: float


def worker_name(rank: int) -> str:
    """Return how a worker of this rank is called unless it is told otherwise."""
    return f"worker-{rank}"
