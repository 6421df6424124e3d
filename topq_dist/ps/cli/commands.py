"""The commands of `topq`. Whatever imports torch or gRPC is imported where it is used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from topq_dist._version import __version__
from topq_dist.ps.cli.configs import (
    client_security,
    server_security,
    serving_config,
    training_config,
    usage_errors,
)
from topq_dist.ps.cli.options import (
    DEFAULT_ADDRESS,
    client_options,
    option,
    server_security_options,
    serving_options,
    training_options,
)

_LEVELS = ("debug", "info", "warning", "error")


@click.group(
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__)
@click.pass_context
def topq(context: click.Context) -> None:
    """The parameter server of topq_dist, and advice on whether and how to compress gradients.

    An option's help names the variable it can be given as.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        context.exit(2)


@topq.command(short_help="Run a parameter server.")
@option(
    "--address",
    default=DEFAULT_ADDRESS,
    show_default=True,
    metavar="HOST:PORT",
    help="Where to listen: HOST:PORT, [IPV6]:PORT or unix:PATH; port 0 takes any free one.",
)
@option(
    "--shards",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Servers that share the model, a process each, on this port and the next ones, and so with"
    " --metrics and --http. Workers are given the address that is printed.",
)
@serving_options
@training_options
@server_security_options
@option(
    "--log-level",
    type=click.Choice(_LEVELS),
    default="warning",
    show_default=True,
    help="What is told on stderr.",
)
@option(
    "--log-format",
    type=click.Choice(("text", "json")),
    default="text",
    show_default=True,
    help="Lines of text, or of a JSON object each.",
)
def serve(**given: Any) -> None:
    """Run a parameter server until SIGTERM, which lets it save its state and exit 0.

    One line on stdout says where it listens, and one each where one may look on.
    """
    from topq_dist.ps.cli.shards import Server, run_shards, split
    from topq_dist.ps.protocol.config import check_together
    from topq_dist.ps.server.view_addresses import check_views

    server = Server(
        training=training_config(given),
        serving=serving_config(given),
        security=server_security(given),
        **{name: given[name] for name in ("address", "state_dir", "log_level", "log_format")},
    )
    with usage_errors():
        servers = split(server, given["shards"])
        for one in servers:
            check_together(one.training, one.serving)
            one.security.check(one.address)
            check_views(one.serving)
    if len(servers) > 1:
        run_shards(servers, click.echo)
    else:
        server.run(
            lambda name, where: click.echo(
                f"listening on {where}" if name == "address" else f"{name} at {where}"
            )
        )


@topq.command(short_help="Say how the run of a server is doing.")
@client_options
@option(
    "--token-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A token of this server, alone in a file.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, on one line.")
@click.option("--sha256", is_flag=True, help="Have the server hash its whole state.")
def status(**given: Any) -> None:
    """Say how the run of a server is doing: version, workers, bytes, refused pushes.

    Of several, such as HOST:[50051-50054], one after the other; as JSON in a list.
    """
    from topq_dist.ps.cli.status_text import status_json, status_text
    from topq_dist.ps.client.probe import NoAnswerError, ask_status

    security = client_security(given)
    answers, lost = {}, []
    for address in _addresses(given):
        try:
            with usage_errors():
                answers[address] = ask_status(
                    address,
                    security,
                    timeout_s=given["timeout_s"],
                    state_sha256=given["sha256"],
                )
        except NoAnswerError as error:
            lost.append(str(error))
    if answers:
        click.echo((status_json if given["as_json"] else status_text)(answers))
    if lost:
        raise click.ClickException(", and ".join(lost))


@topq.command(short_help="Exit 0 where a server takes calls, else 1.")
@client_options
@option("--tls-client-ca", type=click.Path(path_type=Path), hidden=True)
def health(**given: Any) -> None:
    """Exit 0 where a server takes calls, else 1: for a container's HEALTHCHECK.

    In the server's own environment it needs no options. It tries a server on all interfaces at
    loopback, so that 127.0.0.1 must be in its certificate, or --tls-server-name be given. Without
    --tls-ca it trusts TOPQ_TLS_CLIENT_CA, or else the certificate itself; under mutual TLS it shows
    the server's certificate, which must then be good for a client as well.
    """
    if given["tls_ca"] is None:
        given["tls_ca"] = given["tls_client_ca"] or given["tls_cert"]
    from topq_dist.ps.client.probe import NoAnswerError, ask_health

    security = client_security(given)
    for address in _addresses(given):
        try:
            with usage_errors():
                answer = ask_health(address, security, timeout_s=given["timeout_s"])
        except NoAnswerError as error:
            raise click.ClickException(str(error)) from error
        if answer != "SERVING":
            raise click.ClickException(f"the server at {address} says {answer}")


def _addresses(given: Mapping[str, Any]) -> list[str]:
    """Return the addresses to ask: those of --address or, in a server's environment, its shards."""
    from topq_dist.ps.security.many_addresses import in_many, next_addresses

    with usage_errors():
        found = in_many(given["address"])
        return found if given["shards"] == 1 else next_addresses(given["address"], given["shards"])
