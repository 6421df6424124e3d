"""Where running parameter servers are, and how a worker shows them who it is."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

OPTIONS = ("--server", "--tls-ca", "--tls-cert", "--tls-key", "--token-file")
# in the name of a file, for the name of the worker
WORKER_PLACE = "{worker}"


class ServerUnfitError(Exception):
    """A server that cannot be asked, or that trains otherwise than the options say."""


@dataclass(frozen=True, kw_only=True)
class Connection:
    """Parameter servers and what it takes to speak to them; None where it takes no such file.

    servers: HOST:PORT each. In the name of a file, {worker} stands for the worker's name.
    """

    servers: tuple[str, ...]
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    token_file: str | None = None

    def arguments(self) -> list[str]:
        """Return the command line that `connection` reads as this."""
        words = [word for server in self.servers for word in ("--server", server)]
        for option in OPTIONS[1:]:
            value = getattr(self, _name(option))
            if value is not None:
                words += [option, value]
        return words

    def file(self, option: str, worker: str) -> Path | None:
        """Return the file that e.g. "tls_ca" names for `worker`, or None."""
        name: str | None = getattr(self, option)
        return None if name is None else Path(name.replace(WORKER_PLACE, worker))


def add_connection(parser: argparse.ArgumentParser, environment: Mapping[str, str]) -> None:
    """Add the options, which default to TOPQ_SERVER, TOPQ_TLS_CA and so on of `environment`."""
    texts = {
        "--server": ("HOST:PORT", "a running parameter server; again for each of several"),
        "--tls-ca": ("FILE", "certificates that the server's must be signed by"),
        "--tls-cert": ("FILE", "this worker's certificate; {worker} in it becomes its name"),
        "--tls-key": ("FILE", "the key of --tls-cert; {worker} as there"),
        "--token-file": ("FILE", "this worker's token; {worker} as there"),
    }
    for option, (metavar, text) in texts.items():
        given = environment.get(variable(option))
        if option == "--server":
            servers = [server.strip() for server in given.split(",")] if given else None
            # appended to a copy of the default where it is a list: what is said must replace it
            parser.add_argument(option, action="append", metavar=metavar, help=text)
            parser.set_defaults(server_from_environment=servers)
        else:
            parser.add_argument(option, metavar=metavar, default=given, help=text)


def connection(parser: argparse.ArgumentParser, given: argparse.Namespace) -> Connection | None:
    """Return what the options say, or None where they name no server; errors go to `parser`."""
    files = {option: getattr(given, _name(option)) for option in OPTIONS[1:]}
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
    return Connection(servers=tuple(servers), **{_name(o): value for o, value in files.items()})


def variable(option: str) -> str:
    """Return the environment variable that an option can be given by."""
    return "TOPQ_" + _name(option).upper()


def without_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return `environment` without the variables that `topq` and ps_worker.py read."""
    return {name: value for name, value in environment.items() if not name.startswith("TOPQ_")}


def _name(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")
