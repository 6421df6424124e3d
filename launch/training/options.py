"""The command lines of the training scripts, checked and made into frozen options."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, NoReturn, get_args

from training.connection import Connection, add_connection, connection
from training.option_types import count, fraction, natural, positive

Mode = Literal["dense", "topq", "ps"]
Downlink = Literal["exact", "topq", "dense"]
Schedule = Literal["constant", "linear"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a data set is trained with unless the user says otherwise; batch_size is a rank's."""

    inner_opt: str
    lr: float
    lr_schedule: Schedule
    steps: int
    batch_size: int


RECIPES = {
    "digits": Recipe(inner_opt="sgd", lr=0.1, lr_schedule="constant", steps=1000, batch_size=32),
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

    batch_size: samples a rank a step. checkpoint: a folder; each mode writes to one of its own
    in it, every checkpoint_every steps and at the end.
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
class Rank:
    """What train.py is given: one training run in one mode; `result` is where rank 0 reports."""

    training: Training
    mode: Mode
    result: Path | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What compare.py is given: the modes to run one after the other on `ranks` processes.

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


def parse_rank(argv: Sequence[str] | None = None) -> Rank:
    """Parse train.py's command line; on a wrong one, say so in one line and exit with 2."""
    parser = training_parser("train.py", "One rank of a training run; start it with torchrun.")
    parser.add_argument("--dense", action="store_true", help="plain DDP, for comparison")
    parser.add_argument("--result", type=Path, help="write the result to this JSON file")
    given = parser.parse_args(argv)
    return Rank(
        training=training_of(parser, given, q_has_effect=not given.dense),
        mode="dense" if given.dense else "topq",
        result=given.result,
    )


def parse_comparison(argv: Sequence[str] | None = None) -> Comparison:
    """Parse compare.py's command line; on a wrong one, say so in one line and exit with 2."""
    parser = training_parser(
        "train.sh",
        "Train with dense DDP and with top-Q gradients from the same seed, and compare them.",
    )
    parser.add_argument(
        "--mode",
        choices=("ddp", "ps"),
        default="ddp",
        help="top-Q gradients by DDP's hook or by a parameter server (ddp)",
    )
    parser.add_argument("--ranks", type=count, metavar="N", default=2, help="processes (2)")
    parser.add_argument("--dense-only", action="store_true", help="only plain DDP")
    parser.add_argument("--topq-only", action="store_true", help="only top-Q")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path("runs"),
        help="folder for the PNG and JSON files (runs)",
    )
    add_connection(parser, {})
    parser.add_argument(
        "--downlink",
        choices=get_args(Downlink),
        help=f"what the server sends: all that changed, its top-Q part, all ({DEFAULT_DOWNLINK})",
    )
    parser.add_argument(
        "--downlink-q",
        type=fraction,
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
    link = connection(parser, given)
    _check_server_options(parser, given, link)
    return Comparison(
        training=training_of(parser, given, q_has_effect=not given.dense_only),
        modes=modes,
        ranks=given.ranks,
        out=given.out,
        connection=link,
        downlink=given.downlink or DEFAULT_DOWNLINK,
        downlink_q=DEFAULT_DOWNLINK_Q if given.downlink_q is None else given.downlink_q,
    )


def _check_server_options(
    parser: Parser, given: argparse.Namespace, link: Connection | None
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
        if option != "server" and link is not None:
            parser.error(f"{said} with --server: expected it where that server was started")
    if given.downlink_q is not None and given.downlink not in (None, "topq"):
        parser.error(
            f"--downlink-q {given.downlink_q} with --downlink {given.downlink}: expected topq"
        )


def fail(program: str, message: object) -> NoReturn:
    """Exit with 2 after one line on stderr; of torchrun's ranks, only the first one speaks."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        sys.stderr.write(f"{program}: {message}\n")
    sys.exit(2)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(self.prog, message)


def training_parser(program: str, description: str) -> Parser:
    parser = Parser(prog=program, description=description, allow_abbrev=False)

    def by_data(field: str) -> str:
        return ", ".join(f"{name} {getattr(recipe, field)}" for name, recipe in RECIPES.items())

    def add(flag: str, kind: Callable[[str], object], metavar: str, text: str) -> None:
        parser.add_argument(flag, type=kind, metavar=metavar, help=text)

    add("--data", _data_name, "NAME", " | ".join(RECIPES) + " (digits)")
    add("--data-dir", Path, "DIR", "where the files of the data set are")
    add("--q", fraction, "Q", f"share of each gradient that is not sent ({DEFAULT_Q})")
    add("--inner-opt", _optimizer_name, "NAME", f"of torch.optim ({by_data('inner_opt')})")
    add("--lr", positive, "LR", f"learning rate ({by_data('lr')})")
    parser.add_argument(
        "--lr-schedule",
        choices=get_args(Schedule),
        help=f"how --lr goes on: as it is, or down to 0 ({by_data('lr_schedule')})",
    )
    add("--steps", count, "N", f"training steps ({by_data('steps')})")
    add("--batch-size", count, "N", f"samples a rank a step ({by_data('batch_size')})")
    add("--seed", natural, "N", "of the first parameters and the data order (0)")
    add("--checkpoint", Path, "DIR", "write checkpoints to this folder")
    add("--checkpoint-every", count, "N", f"steps between checkpoints ({CHECKPOINT_EVERY})")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in --checkpoint"
    )
    parser.set_defaults(data="digits", seed=0)
    return parser


def training_of(parser: Parser, given: argparse.Namespace, *, q_has_effect: bool) -> Training:
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
        checkpoint=given.checkpoint,
        checkpoint_every=given.checkpoint_every or CHECKPOINT_EVERY,
        resume=given.resume,
    )


def _default_lr(recipe: Recipe, inner_opt: str) -> float:
    if inner_opt == recipe.inner_opt:
        return recipe.lr
    # torch takes 2 s to import, which --help and the defaults need not wait for
    from training.optimizers import default_lr

    return default_lr(inner_opt)


def _data_name(text: str) -> str:
    if text not in RECIPES:
        raise argparse.ArgumentTypeError(f"{text!r}: expected one of {', '.join(RECIPES)}")
    return text


def _optimizer_name(text: str) -> str:
    from training.optimizers import OPTIMIZERS

    name = text.lower()
    if name not in OPTIMIZERS:
        raise argparse.ArgumentTypeError(f"{text!r}: expected one of {', '.join(OPTIMIZERS)}")
    return name
