"""What a worker, or whoever starts workers, must know of servers that are running already."""

from __future__ import annotations

import re

from topq_dist.ps.asking import NoAnswerError, ask_status
from topq_dist.ps.protocol import RefusedError, check_worker_name
from topq_dist.ps.security import ClientSecurity, ClientTls, read_token
from training.connection import Connection, ServerUnfitError
from training.options import Training

ASK_S = 10.0
# where an error names a field, the user knows it as:
_SPELLINGS = {
    "address": "--server",
    "ca": "--tls-ca",
    "certificate": "--tls-cert",
    "key": "--tls-key",
    "token_file": "--token-file",
    "worker": "--worker",
}
_FIELD = re.compile(rf"\b({'|'.join(_SPELLINGS)})=")


def client_security(connection: Connection, worker: str) -> ClientSecurity:
    """Return how `worker` shows itself to the servers.

    Raises ServerUnfitError for a worker's name, an address or files that cannot be.
    """
    ca, token = connection.file("tls_ca", worker), connection.file("token_file", worker)
    try:
        tls = None
        if ca is not None:
            tls = ClientTls(
                ca=ca,
                certificate=connection.file("tls_cert", worker),
                key=connection.file("tls_key", worker),
            )
            tls.credentials()
        security = ClientSecurity(tls=tls, token=None if token is None else read_token(token))
        check_worker_name(worker)
        for server in connection.servers:
            security.check(server)
    except (RefusedError, ValueError) as error:
        text = _FIELD.sub(lambda match: f"{_SPELLINGS[match[1]]}=", str(error))
        raise ServerUnfitError(text) from error
    return security


def check_servers(connection: Connection, worker: str, training: Training) -> None:
    """Raise ServerUnfitError unless all servers answer `worker` and train by --inner-opt."""
    security = client_security(connection, worker)
    for server in connection.servers:
        try:
            status = ask_status(server, security, timeout_s=ASK_S)
        except NoAnswerError as error:
            raise ServerUnfitError(f"--server {server}: {error}") from error
        if status.inner_opt.lower() != training.inner_opt:
            raise ServerUnfitError(
                f"--inner-opt {training.inner_opt}: the server at {server} trains with "
                f"{status.inner_opt.lower()}: expected the same"
            )
