"""The configurations that the options of `topq`'s commands make, and errors that name options."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from topq_dist.ps.protocol.config import GroupRule, ServingConfig, TrainingConfig

if TYPE_CHECKING:  # gRPC is imported once the options are right
    from topq_dist.ps.security.policy import ClientSecurity, ServerSecurity

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
            momentum=given["momentum"],
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
    from topq_dist.ps.security.policy import ServerSecurity
    from topq_dist.ps.security.tls import ServerTls

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
    from topq_dist.ps.security.policy import ClientSecurity
    from topq_dist.ps.security.tls import ClientTls
    from topq_dist.ps.security.tokens import read_token

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
