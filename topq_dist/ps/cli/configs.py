"""The configurations that the options of `topq`'s commands make, and errors that name options."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from topq_dist.ps.protocol.config import ServingConfig, TrainingConfig, option_of

if TYPE_CHECKING:  # gRPC is imported once the options are right
    from topq_dist.ps.security.policy import ClientSecurity, ServerSecurity

# Where an error names a field, the user knows it as:
_SPELLINGS = {
    "address": "--address",
    "tokens": "--tokens",
    "token_file": "--token-file",
    "certificate": "--tls-cert",
    "key": "--tls-key",
    "client_ca": "--tls-client-ca",
    "ca": "--tls-ca",
    "state_dir": "--state-dir",
}
for _config in (TrainingConfig, ServingConfig):
    _SPELLINGS |= {one.name: option_of(_config, one.name) for one in fields(_config)}
_FIELD = re.compile(rf"(?<![\w-])({'|'.join(_SPELLINGS)})=")


def training_config(given: Mapping[str, Any]) -> TrainingConfig:
    """Return what the options say of the training; raises click.UsageError."""
    _refuse_idle(TrainingConfig, given)
    values = _values_of(TrainingConfig, given)
    options: dict[str, Any] = {}
    for name, value in values.pop("options"):
        if name in options:
            raise click.UsageError(f"--inner-option {name}: expected it once")
        options[name] = value
    if given["lr"] is not None:
        if "lr" in options:
            raise click.UsageError("--lr and --inner-option lr: expected one of them")
        options["lr"] = given["lr"]
    with usage_errors():
        return TrainingConfig(**values, options=options)


def serving_config(given: Mapping[str, Any]) -> ServingConfig:
    """Return what the options say of the serving; raises click.UsageError."""
    _refuse_idle(ServingConfig, given)
    values = _values_of(ServingConfig, given)
    workers = {name: values.pop(name) for name in ("start_workers", "min_workers", "max_workers")}
    start, least, most = workers.values()
    if start is not None:
        for other in ("min_workers", "max_workers"):
            if workers[other] is not None:
                raise click.UsageError(f"--workers and {_SPELLINGS[other]}: expected one of them")
        values |= {"start_workers": start, "max_workers": start}
    if least is not None:
        values |= {"start_workers": least, "min_workers": least}
    if most is not None:
        values["max_workers"] = most
    with usage_errors():
        return ServingConfig(**values)


def _values_of(config: type, given: Mapping[str, Any]) -> dict[str, Any]:
    return {one.name: given[_parameter(config, one.name)] for one in fields(config)}


def _parameter(config: type, name: str) -> str:
    """Return what click calls the option of a field."""
    return option_of(config, name).removeprefix("--").replace("-", "_")


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


def _refuse_idle(config: type, given: Mapping[str, Any]) -> None:
    """Refuse what is given, be it the default, beside a switch with which it has no effect."""
    context = click.get_current_context()
    for one in fields(config):
        source = context.get_parameter_source(_parameter(config, one.name))
        switch, needed = one.metadata["only_with"] or ("", "")
        if not switch or given[switch] == needed or source in (ParameterSource.DEFAULT, None):
            continue
        raise click.UsageError(
            f"{option_of(config, one.name)}: no effect with --{switch} {given[switch]},"
            f" expected --{switch} {needed}"
        )
