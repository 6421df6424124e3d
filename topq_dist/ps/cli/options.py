"""The options of `topq`'s commands."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import click

from topq_dist.ps.cli.option_types import (
    FilePath,
    Parsed,
    Seconds,
    parse_group,
    parse_named,
    parse_size,
)
from topq_dist.ps.protocol.config import ServingConfig, TrainingConfig, option_of

DEFAULT_ADDRESS = "127.0.0.1:50051"
DEFAULT_TIMEOUT_S = 10.0

Command = TypeVar("Command", bound=Callable[..., Any])
_FILE = FilePath()
_PARSERS = {
    "options": Parsed("NAME=VALUE", parse_named),
    "groups": Parsed("PATTERN:NAME=VALUE,...", parse_group),
}


def option(name: str, **rest: Any) -> Callable[[Command], Command]:
    """Return click's option `name`, which TOPQ_NAME of the environment gives as well."""
    variable = "TOPQ_" + name.removeprefix("--").replace("-", "_").upper()
    return click.option(name, envvar=variable, show_envvar=True, **rest)


def _options_of(config: type) -> dict[str, Callable[[Command], Command]]:
    """Return the options that a configuration's fields say of themselves, by field."""
    kinds = get_type_hints(config)
    made = {}
    for one in dataclasses.fields(config):
        said, text = one.metadata, one.metadata["text"]
        rest: dict[str, Any] = {"type": _type_of(kinds[one.name]), "metavar": said["metavar"]}
        if one.name in _PARSERS:
            rest |= {"type": _PARSERS[one.name], "multiple": True}
        elif one.default is dataclasses.MISSING:
            rest["required"] = True
        elif said["derives"]:
            rest["type"] = click.IntRange(min=1)
            text += "" if said["option"] else f"  [default: {one.default}]"
        else:
            rest |= {"default": one.default, "show_default": one.default is not None}
        if said["metavar"] == "BYTES":
            rest["type"] = Parsed("BYTES", parse_size)
        made[one.name] = option(option_of(config, one.name), help=text, **rest)
    return made


def _type_of(kind: Any) -> Any:
    """Return click's type for a field's: a choice for Literal, None aside."""
    some = [one for one in get_args(kind) if one is not type(None)]
    if get_origin(kind) is Literal:
        return click.Choice(get_args(kind))
    return _type_of(some[0]) if some and get_origin(kind) in (Union, UnionType) else kind


def _all(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for one in reversed(options):
            command = one(command)
        return command

    return decorate


_TRAINING = _options_of(TrainingConfig)
training_options = _all(
    _TRAINING.pop("inner_opt"),
    option("--lr", type=float, help="Its learning rate; torch's default where left out."),
    *_TRAINING.values(),
)

serving_options = _all(
    option(
        "--state-dir",
        required=True,
        type=_FILE,
        metavar="DIR",
        help="Where the run lives; a server on the same folder goes on with it.",
    ),
    *_options_of(ServingConfig).values(),
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
        help="Where the server listens; of several as topq serve --shards says it.",
    ),
    option("--shards", type=click.IntRange(min=1), default=1, hidden=True),
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
        type=Seconds(),
        default=DEFAULT_TIMEOUT_S,
        show_default=True,
        help="Wait no longer for the answer.",
    ),
)
