"""The command line of ps_worker.py; a container can give most of it as its environment."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from training.connection import Connection, add_connection, connection
from training.option_types import count, natural
from training.options import Rank, training_of, training_parser


@dataclass(frozen=True, kw_only=True)
class Worker(Rank):
    """What ps_worker.py is given: a rank that speaks to parameter servers as `name`."""

    rank: int
    ranks: int
    name: str
    connection: Connection


def parse_worker(argv: Sequence[str] | None = None) -> Worker:
    """Parse ps_worker.py's command line; on a wrong one, say so in one line and exit with 2."""
    parser = training_parser("ps_worker.py", "One worker of a training run on parameter servers.")
    add_connection(parser, os.environ)

    def add(flag: str, kind: Callable[[str], object], variable: str, text: str) -> None:
        default = os.environ.get(variable)
        parser.add_argument(flag, type=kind, metavar="N", default=default, help=text)

    add("--rank", natural, "RANK", "of this worker, from 0 (RANK of the environment)")
    add("--ranks", count, "WORLD_SIZE", "workers of the run (WORLD_SIZE of the environment)")
    parser.add_argument(
        "--worker",
        metavar="NAME",
        default=os.environ.get("TOPQ_WORKER"),
        help="this worker's name in the run (worker-RANK)",
    )
    parser.add_argument("--result", type=Path, help="write the result to this JSON file")
    given = parser.parse_args(argv)
    for flag in ("rank", "ranks"):
        if getattr(given, flag) is None:
            variable = {"rank": "RANK", "ranks": "WORLD_SIZE"}[flag]
            parser.error(f"--{flag}: expected a number, there or as {variable} of the environment")
    if given.rank >= given.ranks:
        parser.error(f"--rank {given.rank} of --ranks {given.ranks}: expected a smaller one")
    link = connection(parser, given)
    if link is None:
        parser.error("--server: expected the HOST:PORT of a parameter server")
    return Worker(
        training=training_of(parser, given, q_has_effect=True),
        mode="ps",
        result=given.result,
        rank=given.rank,
        ranks=given.ranks,
        name=given.worker or worker_name(given.rank),
        connection=link,
    )


def worker_name(rank: int) -> str:
    """Return how a worker of this rank is called unless it is told otherwise."""
    return f"worker-{rank}"
