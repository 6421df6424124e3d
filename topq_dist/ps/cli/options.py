"""The options of `topq`'s commands."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from topq_dist.ps.cli.option_types import Parsed, parse_group, parse_named, parse_size
from topq_dist.ps.protocol.config import Downlink, Mode, Momentum, ServingConfig, TrainingConfig

DEFAULT_ADDRESS = "127.0.0.1:50051"
DEFAULT_TIMEOUT_S = 10.0

Command = TypeVar("Command", bound=Callable[..., Any])
_FILE = click.Path(path_type=Path)


def option(name: str, **rest: Any) -> Callable[[Command], Command]:
    """Return click's option `name`, which TOPQ_NAME of the environment gives as well."""
    variable = "TOPQ_" + name.removeprefix("--").replace("-", "_").upper()
    return click.option(name, envvar=variable, show_envvar=True, **rest)


def _field(name: str, config: type, field: str, **rest: Any) -> Callable[[Command], Command]:
    default = next(one.default for one in dataclasses.fields(config) if one.name == field)
    return option(name, default=default, show_default=default is not None, **rest)


def _all(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for one in reversed(options):
            command = one(command)
        return command

    return decorate


training_options = _all(
    option(
        "--inner-opt",
        required=True,
        metavar="NAME",
        help="The inner optimizer: a class of torch.optim, in any case.",
    ),
    option("--lr", type=float, help="Its learning rate; torch's default where left out."),
    option(
        "--inner-option",
        multiple=True,
        type=Parsed("NAME=VALUE", parse_named),
        help="A keyword argument of it, such as betas=(0.9,0.95); again for each. In the variable"
        " parted by ';'.",
    ),
    option(
        "--group",
        multiple=True,
        type=Parsed("PATTERN:NAME=VALUE,...", parse_group),
        help="Other arguments for the tensors whose names match, such as '*.bias:weight_decay=0';"
        " the first that matches counts. In the variable parted by ';'.",
    ),
    _field(
        "--momentum",
        TrainingConfig,
        "momentum",
        type=click.Choice(get_args(Momentum)),
        help="feedback: taken out of the inner optimizer while pushes are sparse, since workers'"
        " error feedback acts as one. optimizer: left in it.  [default: as the run began, feedback"
        " for a new one]",
    ),
    _field(
        "--mode",
        TrainingConfig,
        "mode",
        type=click.Choice(get_args(Mode)),
        help="sync: a version averages a push of each live worker. async: each is applied as it"
        " comes.",
    ),
    _field(
        "--max-staleness",
        TrainingConfig,
        "max_staleness",
        type=int,
        help="async: versions that a push may lag behind.",
    ),
    _field(
        "--downlink",
        TrainingConfig,
        "downlink",
        type=click.Choice(get_args(Downlink)),
        help="What workers are sent: what changed, the top-Q part of what they lack, or all.",
    ),
    _field(
        "--downlink-q",
        TrainingConfig,
        "q",
        type=float,
        help="topq: the part of what workers lack that is left for later.",
    ),
    _field(
        "--downlink-value-format",
        TrainingConfig,
        "value_format",
        metavar="FORMAT",
        help="topq: how its values travel; as the tensors' own where left out.",
    ),
)

serving_options = _all(
    option(
        "--state-dir",
        required=True,
        type=_FILE,
        metavar="DIR",
        help="Where the run lives; a server on the same folder goes on with it.",
    ),
    option(
        "--workers",
        type=click.IntRange(min=1),
        help="The first version waits for so many, and no more can join; later ones go on with"
        " those that are alive.",
    ),
    option(
        "--min-workers",
        type=click.IntRange(min=1),
        help="No version is made of fewer live workers.  [default: 1]",
    ),
    option(
        "--max-workers",
        type=click.IntRange(min=1),
        help=f"No more can join.  [default: {ServingConfig().max_workers}]",
    ),
    _field(
        "--lease-s",
        ServingConfig,
        "lease_s",
        type=float,
        help="A worker not heard of for so long is gone.",
    ),
    _field(
        "--round-timeout-s",
        ServingConfig,
        "round_timeout_s",
        type=float,
        help="sync: a round closes so long after its first push; left out, it waits for all.",
    ),
    _field(
        "--snapshot-every",
        ServingConfig,
        "snapshot_every",
        type=int,
        help="Versions between snapshots; 1 makes each durable before it is answered.",
    ),
    _field(
        "--history-bytes",
        ServingConfig,
        "history_bytes",
        type=Parsed("BYTES", parse_size),
        help="Recent updates kept for workers that catch up; 64MB and 64MiB are understood.",
    ),
    _field(
        "--max-model-bytes",
        ServingConfig,
        "max_model_bytes",
        type=Parsed("BYTES", parse_size),
        help="The largest model that a worker may bring.",
    ),
)

server_security_options = _all(
    option("--tls-cert", type=_FILE, metavar="FILE", help="Certificate chain of this server, PEM."),
    option("--tls-key", type=_FILE, metavar="FILE", help="Its key, which others may not read."),
    option(
        "--tls-client-ca",
        type=_FILE,
        metavar="FILE",
        help="Mutual TLS: clients must show a certificate signed by one of these.",
    ),
    option(
        "--tokens",
        type=_FILE,
        metavar="FILE",
        help="Lines 'worker token': who may speak as which worker. Read again when it changes.",
    ),
    option(
        "--insecure",
        is_flag=True,
        help="Listen beyond loopback in the clear: everybody on the network may read and alter"
        " the training.",
    ),
)


client_options = _all(
    option(
        "--address",
        default=DEFAULT_ADDRESS,
        show_default=True,
        metavar="HOST:PORT",
        help="Where the server listens.",
    ),
    option(
        "--tls-ca",
        type=_FILE,
        metavar="FILE",
        help="Speak TLS; the server's certificate must be signed by one of these.",
    ),
    option("--tls-cert", type=_FILE, metavar="FILE", help="Mutual TLS: a certificate to show."),
    option("--tls-key", type=_FILE, metavar="FILE", help="Its key."),
    option(
        "--tls-server-name",
        metavar="NAME",
        help="Expect this name in the server's certificate, not the host of --address.",
    ),
    option(
        "--timeout-s",
        type=click.FloatRange(min=0, min_open=True),
        default=DEFAULT_TIMEOUT_S,
        show_default=True,
        help="Wait no longer for the answer.",
    ),
)
