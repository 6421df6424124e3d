"""The command lines of the training scripts, checked and made into frozen settings."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn, get_args

from training.errors import fail
from training.settings import (
    CHECKPOINT_EVERY,
    COMPARE,
    DEFAULT_DOWNLINK,
    DEFAULT_DOWNLINK_Q,
    DEFAULT_LINK,
    DEFAULT_Q,
    LINK_BITS_PER_S,
    RECIPES,
    Comparison,
    Connection,
    Downlink,
    Mode,
    Rank,
    Recipe,
    Schedule,
    Training,
    Worker,
    worker_name,
)

_FILES = ("--tls-ca", "--tls-cert", "--tls-key", "--token-file")


def parse_rank(argv: Sequence[str] | None = None) -> Rank:
    """Parse train.py's command line; on a wrong one, say so in one line and exit with 2."""
    parser = _training_parser("train.py", "One rank of a training run; start it with torchrun.")
    parser.add_argument("--dense", action="store_true", help="plain DDP, for comparison")
    parser.add_argument("--result", type=Path, help="write the result to this JSON file")
    given = parser.parse_args(argv)
    return Rank(
        training=_training(parser, given, q_has_effect=not given.dense),
        mode="dense" if given.dense else "topq",
        result=given.result,
    )


def parse_worker(argv: Sequence[str] | None = None) -> Worker:
    """Parse ps_worker.py's command line, most of which a container gives as its environment."""
    parser = _training_parser("ps_worker.py", "One worker of a training run on parameter servers.")
    _add_connection(parser, os.environ)

    def add(flag: str, kind: Callable[[str], object], variable: str, text: str) -> None:
        default = os.environ.get(variable)
        parser.add_argument(flag, type=kind, metavar="N", default=default, help=text)

    add("--rank", _natural, "RANK", "of this worker, from 0 (RANK of the environment)")
    add("--ranks", _count, "WORLD_SIZE", "workers of the run (WORLD_SIZE of the environment)")
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
    connection = _connection(parser, given)
    if connection is None:
        parser.error("--server: expected the HOST:PORT of a parameter server")
    return Worker(
        training=_training(parser, given, q_has_effect=True),
        mode="ps",
        result=given.result,
        rank=given.rank,
        ranks=given.ranks,
        name=given.worker or worker_name(given.rank),
        connection=connection,
    )


def parse_comparison(argv: Sequence[str] | None = None) -> Comparison:
    """Parse compare.py's command line; on a wrong one, say so in one line and exit with 2."""
    parser = _training_parser(
        COMPARE,
        "Train with dense DDP and with top-Q gradients from the same seed, and compare them.",
    )
    parser.add_argument(
        "--mode",
        choices=("ddp", "ps"),
        default="ddp",
        help="top-Q gradients by DDP's hook or by a parameter server (ddp)",
    )
    parser.add_argument("--ranks", type=_count, metavar="N", default=2, help="processes (2)")
    parser.add_argument("--dense-only", action="store_true", help="only plain DDP")
    parser.add_argument("--topq-only", action="store_true", help="only top-Q")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path("runs"),
        help="folder for the PNG and JSON files (runs)",
    )
    _add_connection(parser, {})
    parser.add_argument(
        "--downlink",
        choices=get_args(Downlink),
        help=f"what the server sends: all that changed, its top-Q part, all ({DEFAULT_DOWNLINK})",
    )
    parser.add_argument(
        "--downlink-q",
        type=_fraction,
        metavar="Q",
        help=f"share of the update that --downlink topq does not send ({DEFAULT_DOWNLINK_Q})",
    )
    given = parser.parse_args(argv)
    if given.dense_only and given.topq_only:
        parser.error("--dense-only with --topq-only: expected one of them at most")
    topq: Mode = "ps" if given.mode == "ps" else "topq"
    modes: tuple[Mode, ...] = ("dense", topq)
    if given.dense_only:
        modes = ("dense",)
    if given.topq_only:
        modes = (topq,)
    connection = _connection(parser, given)
    _check_server_options(parser, given, connection)
    if connection is None:
        # servers that run elsewhere have links of their own
        given.link = given.link or DEFAULT_LINK
    return Comparison(
        training=_training(parser, given, q_has_effect=not given.dense_only),
        modes=modes,
        ranks=given.ranks,
        out=given.out,
        connection=connection,
        downlink=given.downlink or DEFAULT_DOWNLINK,
        downlink_q=DEFAULT_DOWNLINK_Q if given.downlink_q is None else given.downlink_q,
    )


def _check_server_options(
    parser: _Parser, given: argparse.Namespace, connection: Connection | None
) -> None:
    if given.mode == "ps" and given.dense_only:
        parser.error("--dense-only with --mode ps: expected one of them at most")
    for option in ("server", "downlink", "downlink_q"):
        value = getattr(given, option)
        if value is None:
            continue
        said = f"--{option.replace('_', '-')} {value[0] if option == 'server' else value}"
        if given.mode != "ps":
            parser.error(f"{said} without --mode ps: expected both of them")
        if option != "server" and connection is not None:
            parser.error(f"{said} with --server: expected it where that server was started")
    if given.downlink_q is not None and given.downlink not in (None, "topq"):
        parser.error(
            f"--downlink-q {given.downlink_q} with --downlink {given.downlink}: expected topq"
        )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(self.prog, message)


def _training_parser(program: str, description: str) -> _Parser:
    parser = _Parser(prog=program, description=description, allow_abbrev=False)

    def by_data(field: str) -> str:
        return ", ".join(f"{name} {getattr(recipe, field)}" for name, recipe in RECIPES.items())

    def add(flag: str, kind: Callable[[str], object], metavar: str, text: str) -> None:
        parser.add_argument(flag, type=kind, metavar=metavar, help=text)

    add("--data", _data_name, "NAME", " | ".join(RECIPES) + " (digits)")
    add("--data-dir", Path, "DIR", "where the files of the data set are")
    add("--q", _fraction, "Q", f"share of each gradient that is not sent ({DEFAULT_Q})")
    add("--inner-opt", _optimizer_name, "NAME", f"of torch.optim ({by_data('inner_opt')})")
    add("--lr", _positive, "LR", f"learning rate ({by_data('lr')})")
    parser.add_argument(
        "--lr-schedule",
        choices=get_args(Schedule),
        help=f"how --lr goes on: as it is, or down to 0 ({by_data('lr_schedule')})",
    )
    add("--steps", _count, "N", f"training steps ({by_data('steps')})")
    add("--batch-size", _count, "N", f"samples a rank a step ({by_data('batch_size')})")
    parser.add_argument(
        "--link",
        choices=LINK_BITS_PER_S,
        help="emulated between the ranks: each exchange waits as long as its bytes take there"
        + (f" ({DEFAULT_LINK}, or none with --server)" if program == COMPARE else " (none)"),
    )
    add("--seed", _natural, "N", "of the first parameters and the data order (0)")
    add("--checkpoint", Path, "DIR", "write checkpoints to this folder")
    add("--checkpoint-every", _count, "N", f"steps between checkpoints ({CHECKPOINT_EVERY})")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in --checkpoint"
    )
    parser.set_defaults(data="digits", seed=0)
    return parser


def _training(parser: _Parser, given: argparse.Namespace, *, q_has_effect: bool) -> Training:
    recipe = RECIPES[given.data]
    if given.q is not None and not q_has_effect:
        parser.error(f"--q {given.q} without top-Q: expected no --q, since dense sends everything")
    if given.data == "digits" and given.data_dir is not None:
        parser.error(
            f"--data-dir {given.data_dir} with --data digits: expected no --data-dir, "
            "since digits come with scikit-learn"
        )
    if given.checkpoint is None and given.resume:
        parser.error("--resume without --checkpoint: expected the folder to resume from")
    if given.checkpoint is None and given.checkpoint_every is not None:
        parser.error(
            f"--checkpoint-every {given.checkpoint_every} without --checkpoint: "
            "expected the folder to write to"
        )
    inner_opt = given.inner_opt or recipe.inner_opt
    return Training(
        data=given.data,
        data_dir=given.data_dir,
        q=DEFAULT_Q if given.q is None else given.q,
        inner_opt=inner_opt,
        lr=_default_lr(recipe, inner_opt) if given.lr is None else given.lr,
        lr_schedule=given.lr_schedule or recipe.lr_schedule,
        steps=given.steps or recipe.steps,
        batch_size=given.batch_size or recipe.batch_size,
        seed=given.seed,
        link=given.link or "none",
        checkpoint=given.checkpoint,
        checkpoint_every=given.checkpoint_every or CHECKPOINT_EVERY,
        resume=given.resume,
    )


def _default_lr(recipe: Recipe, inner_opt: str) -> float:
    if inner_opt == recipe.inner_opt:
        return recipe.lr
    # torch takes 2 s to import, which --help and the defaults need not wait for
    from training.models import default_lr

    return default_lr(inner_opt)


def _add_connection(parser: _Parser, environment: Mapping[str, str]) -> None:
    """Add the options, which default to TOPQ_SERVER, TOPQ_TLS_CA and so on of `environment`."""
    servers = environment.get("TOPQ_SERVER")
    # appended to a copy of the default where it is a list: what is said must replace it
    parser.add_argument(
        "--server",
        action="append",
        metavar="HOST:PORT",
        help="a running parameter server; again for each of several",
    )
    parser.set_defaults(
        server_from_environment=[s.strip() for s in servers.split(",")] if servers else None
    )
    texts = (
        "certificates that the server's must be signed by",
        "this worker's certificate; {worker} in it becomes its name",
        "the key of --tls-cert; {worker} as there",
        "this worker's token; {worker} as there",
    )
    for option, text in zip(_FILES, texts, strict=True):
        default = environment.get(f"TOPQ_{_field(option).upper()}")
        parser.add_argument(option, metavar="FILE", default=default, help=text)


def _connection(parser: _Parser, given: argparse.Namespace) -> Connection | None:
    files = {option: getattr(given, _field(option)) for option in _FILES}
    servers = given.server or given.server_from_environment
    if not servers:
        for option, value in files.items():
            if value is not None:
                parser.error(f"{option} {value} without --server: expected the server it is for")
        return None
    if (given.tls_cert is None) != (given.tls_key is None):
        parser.error("--tls-cert and --tls-key: expected both of them or none")
    if given.tls_cert is not None and given.tls_ca is None:
        parser.error(f"--tls-cert {given.tls_cert} without --tls-ca: expected both of them")
    return Connection(servers=tuple(servers), **{_field(o): value for o, value in files.items()})


def _field(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")


def _data_name(text: str) -> str:
    if text not in RECIPES:
        raise argparse.ArgumentTypeError(f"{text!r}: expected one of {', '.join(RECIPES)}")
    return text


def _optimizer_name(text: str) -> str:
    from training.models import OPTIMIZERS

    name = text.lower()
    if name not in OPTIMIZERS:
        raise argparse.ArgumentTypeError(f"{text!r}: expected one of {', '.join(OPTIMIZERS)}")
    return name


def _fraction(text: str) -> float:
    number = _number(text)
    if not 0.0 <= number <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number in [0, 1]")
    return number


def _positive(text: str) -> float:
    number = _number(text)
    if not 0.0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0")
    return number


def _count(text: str) -> int:
    return _integer(text, at_least=1)


def _natural(text: str) -> int:
    return _integer(text, at_least=0)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _integer(text: str, *, at_least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = at_least - 1
    # torch's generators and numpy's sizes take no more than 63 bits
    if not at_least <= number < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer of at least {at_least}")
    return number
