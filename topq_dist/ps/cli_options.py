"""The options of `topq`'s commands, and the configurations that they make."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import click
from click.core import ParameterSource

from topq_dist.ps.config import Downlink, GroupRule, Mode, ServingConfig, TrainingConfig
from topq_dist.ps.option_types import Parsed, parse_group, parse_named, parse_size

if TYPE_CHECKING:
    from topq_dist.ps.security import ClientSecurity, ServerSecurity

DEFAULT_ADDRESS = "127.0.0.1:50051"
DEFAULT_TIMEOUT_S = 10.0

Command = TypeVar("Command", bound=Callable[..., Any])
_FILE = click.Path(path_type=Path)
# Where an error names a field, the user knows it as:
_SPELLINGS = {
    "certificate": "--tls-cert",
    "key": "--tls-key",
    "client_ca": "--tls-client-ca",
    "ca": "--tls-ca",
    "q": "--downlink-q",
    "value_format": "--downlink-value-format",
    "groups": "--group",
    "options": "--inner-option",
}
_PLAIN = (
    "address tokens token_file inner_opt mode max_staleness downlink start_workers min_workers"
    " max_workers lease_s round_timeout_s snapshot_every history_bytes max_model_bytes state_dir"
)
_SPELLINGS |= {name: f"--{name.replace('_', '-')}" for name in _PLAIN.split()}
_FIELD = re.compile(rf"(?<![\w-])({'|'.join(_SPELLINGS)})=")


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


def training_config(given: Mapping[str, Any]) -> TrainingConfig:
    """Return what the options say of the training; raises click.UsageError."""
    _refuse_idle("mode", "async", given["mode"], "max_staleness")
    _refuse_idle("downlink", "topq", given["downlink"], "downlink_q", "downlink_value_format")
    options: dict[str, Any] = {}
    for name, value in given["inner_option"]:
        if name in options:
            raise click.UsageError(f"--inner-option {name}: expected it once")
        options[name] = value
    if given["lr"] is not None:
        if "lr" in options:
            raise click.UsageError("--lr and --inner-option lr: expected one of them")
        options["lr"] = given["lr"]
    groups: tuple[GroupRule, ...] = given["group"]
    with usage_errors():
        return TrainingConfig(
            inner_opt=given["inner_opt"],
            options=options,
            groups=groups,
            mode=given["mode"],
            max_staleness=given["max_staleness"],
            downlink=given["downlink"],
            q=given["downlink_q"],
            value_format=given["downlink_value_format"],
        )


def serving_config(given: Mapping[str, Any]) -> ServingConfig:
    """Return what the options say of the serving; raises click.UsageError."""
    _refuse_idle("mode", "sync", given["mode"], "round_timeout_s")
    workers: dict[str, int] = {}
    if given["workers"] is not None:
        for other in ("min_workers", "max_workers"):
            if given[other] is not None:
                raise click.UsageError(f"--workers and {_SPELLINGS[other]}: expected one of them")
        workers = {"start_workers": given["workers"], "max_workers": given["workers"]}
    if given["min_workers"] is not None:
        workers |= {"start_workers": given["min_workers"], "min_workers": given["min_workers"]}
    if given["max_workers"] is not None:
        workers["max_workers"] = given["max_workers"]
    with usage_errors():
        return ServingConfig(
            **workers,
            lease_s=given["lease_s"],
            round_timeout_s=given["round_timeout_s"],
            snapshot_every=given["snapshot_every"],
            history_bytes=given["history_bytes"],
            max_model_bytes=given["max_model_bytes"],
        )


def server_security(given: Mapping[str, Any]) -> ServerSecurity:
    """Return what the options say of the server's security; raises click.UsageError."""
    from topq_dist.ps.security import ServerSecurity, ServerTls

    certificate, key, client_ca = given["tls_cert"], given["tls_key"], given["tls_client_ca"]
    if (certificate is None) != (key is None):
        raise click.UsageError("--tls-cert and --tls-key: expected both or neither")
    if client_ca is not None and certificate is None:
        raise click.UsageError("--tls-client-ca: expected --tls-cert and --tls-key with it")
    tls = None
    if certificate is not None:
        tls = ServerTls(certificate=certificate, key=key, client_ca=client_ca)
    return ServerSecurity(tls=tls, tokens=given["tokens"], insecure=given["insecure"])


def client_security(given: Mapping[str, Any]) -> ClientSecurity:
    """Return what the options say of a client's security; raises click.UsageError."""
    from topq_dist.ps.security import ClientSecurity, ClientTls, read_token

    ca, certificate, key = given["tls_ca"], given["tls_cert"], given["tls_key"]
    if (certificate is None) != (key is None):
        raise click.UsageError("--tls-cert and --tls-key: expected both or neither")
    if ca is None and (certificate is not None or given["tls_server_name"] is not None):
        raise click.UsageError("--tls-cert and --tls-server-name: expected --tls-ca with them")
    tls = None
    if ca is not None:
        tls = ClientTls(
            ca=ca, certificate=certificate, key=key, server_name=given["tls_server_name"]
        )
    token_file = given.get("token_file")
    with usage_errors():
        return ClientSecurity(tls=tls, token=None if token_file is None else read_token(token_file))


@contextmanager
def usage_errors() -> Iterator[None]:
    """Turn a ValueError that names a field into an error that names the option."""
    try:
        yield
    except ValueError as error:
        text = _FIELD.sub(lambda match: f"{_SPELLINGS[match[1]]}=", str(error))
        raise click.UsageError(text) from error


def _refuse_idle(switch: str, needed: str, value: str, *names: str) -> None:
    context = click.get_current_context()
    for name in names:
        given = context.get_parameter_source(name) not in (ParameterSource.DEFAULT, None)
        if value != needed and given:
            raise click.UsageError(
                f"--{name.replace('_', '-')}: no effect with --{switch} {value},"
                f" expected --{switch} {needed}"
            )
