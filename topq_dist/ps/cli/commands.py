"""The commands of `topq`. Whatever imports torch or gRPC is imported where it is used."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

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
from topq_dist.telemetry.logs import formatter

_log = logging.getLogger(__name__)
_LEVELS = ("debug", "info", "warning", "error")


@click.group(
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__)
@click.pass_context
def topq(context: click.Context) -> None:
    """The parameter server of topq_dist. An option's help names the variable it can be given as."""
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
    from topq_dist.ps.server.view_addresses import check_views

    training, serving = training_config(given), serving_config(given)
    security = server_security(given)
    with usage_errors():
        security.check(given["address"])
        check_views(serving)
    told = logging.StreamHandler()
    told.setFormatter(formatter(given["log_format"], "topq serve"))
    logging.basicConfig(level=given["log_level"].upper(), handlers=[told])
    with _exit_on_sigterm():
        from topq_dist.ps.server.process import serve as run
        from topq_dist.ps.state.snapshot_file import StateError

        try:
            with usage_errors():
                run(
                    training,
                    serving,
                    state_dir=given["state_dir"],
                    address=given["address"],
                    security=security,
                    on_listening=lambda address: click.echo(f"listening on {address}"),
                    **({} if serving.metrics is serving.http is None else {"on_view": _tell_of}),
                )
        except (StateError, OSError, RuntimeError) as error:
            _log.debug("where it failed:", exc_info=True)
            raise click.ClickException(str(error)) from error


def _tell_of(view: str, url: str) -> None:
    click.echo(f"{view} at {url}")


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Take SIGTERM as an order to exit 0, until the server has a better answer to it.

    The kernel would withhold it from the first process of a container, which has no handler.
    """

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(0)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
    """Say how the run of a server is doing: version, workers, bytes, refused pushes."""
    from topq_dist.ps.cli.status_text import status_json, status_text
    from topq_dist.ps.client.probe import NoAnswerError, ask_status

    security = client_security(given)
    try:
        with usage_errors():
            answer = ask_status(
                given["address"],
                security,
                timeout_s=given["timeout_s"],
                state_sha256=given["sha256"],
            )
    except NoAnswerError as error:
        raise click.ClickException(str(error)) from error
    click.echo(status_json(answer) if given["as_json"] else status_text(answer))


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
    try:
        with usage_errors():
            answer = ask_health(given["address"], security, timeout_s=given["timeout_s"])
    except NoAnswerError as error:
        raise click.ClickException(str(error)) from error
    if answer != "SERVING":
        raise click.ClickException(f"the server at {given['address']} says {answer}")
