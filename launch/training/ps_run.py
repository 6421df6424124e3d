"""The run of one worker of a parameter server: how it shows itself, trains, and ends."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from topq_dist import Stats
from topq_dist.ps import ParameterServerOptimizer, RefusedError, ServerLostError
from topq_dist.ps.client.arguments import addresses_of
from topq_dist.ps.client.probe import NoAnswerError, ask_status
from topq_dist.ps.protocol.types import check_worker_name
from topq_dist.ps.security import ClientSecurity, ClientTls, read_token
from training import checkpoint
from training.checkpoint import checkpoint_folder, run_config
from training.data import Data
from training.errors import ServerUnfitError, one_line_errors
from training.processes import end_with_parent
from training.report import Result
from training.run import HISTORY_KEYS, Run
from training.settings import WORKER_PLACE, Connection, Training, Worker

ASK_S = 10.0
# what _save writes and _resume reads
SHARED_KEYS = HISTORY_KEYS | {"model"}
OWN_KEYS = frozenset({"optimizer", "generator"})
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


class PsRun(Run):
    """One worker's training run; its checkpoints are its own, in step with no other's.

    Raises CheckpointError where --checkpoint does not fit, ServerUnfitError where the server
    trains otherwise than --inner-opt and --lr say.
    """

    def __init__(
        self, options: Worker, data: Data, model: nn.Module, optimizer: ParameterServerOptimizer
    ) -> None:
        training = options.training
        check_servers(options.connection, options.name, training)
        folder = training.checkpoint and checkpoint_folder(training.checkpoint, "ps", options.name)
        super().__init__(
            options,
            data,
            model,
            rank=options.rank,
            ranks=options.ranks,
            config=run_config(training, "ps", options.ranks, model),
            folder=folder,
        )
        self._optimizer = optimizer
        self._name = options.name
        if self._start is not None:
            self._resume(self._start)
            return
        # only at the beginning: later, a schedule of the workers may have changed it
        rates = {group["lr"] for group in optimizer.param_groups}
        # a schedule gives all groups the same
        fits = (
            training.lr in rates if training.lr_schedule == "constant" else rates == {training.lr}
        )
        if not fits:
            raise ServerUnfitError(
                f"--lr {training.lr:g}: the server has "
                f"{', '.join(f'{rate:g}' for rate in sorted(rates))}: expected the same"
            )
        if self._folder is not None:
            # before the first push: a worker without a checkpoint has pushed nothing
            self._save(self._folder, 0)

    def finish(self) -> Result:
        """Test the server's own parameters, leave it, and report."""
        with self._optimizer.central():
            result = self._result()
        self._optimizer.close()
        if self._options.result is not None:
            result.write(Path(str(self._options.result).replace(WORKER_PLACE, self._name)))
        else:
            print(f"{self._name}: test accuracy {100 * result.test_accuracy:.2f} %")
            print(f"parameters sha256: {result.parameters_sha256}")
        return result

    def _stats(self, steps: int) -> Stats:
        return self._optimizer.stats()

    def _received(self, stats: Stats) -> int:
        return stats.received_bytes

    def _save(self, folder: Path, step: int) -> None:
        checkpoint.save(
            folder,
            step,
            config=self._config,
            shared={"model": self._module.state_dict(), **self._history()},
            own={"optimizer": self._optimizer.state_dict(), "generator": torch.get_rng_state()},
        )

    def _resume(self, start: Path) -> None:
        shared, own = checkpoint.load(start, 0)
        self._module.load_state_dict(shared["model"])
        self._optimizer.load_state_dict(own["optimizer"])
        torch.set_rng_state(own["generator"])
        self._go_on_from(shared)


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
        for server in addresses_of(connection.servers):
            security.check(server)
    except (RefusedError, ValueError) as error:
        text = _FIELD.sub(lambda match: f"{_SPELLINGS[match[1]]}=", str(error))
        raise ServerUnfitError(text) from error
    return security


def check_servers(connection: Connection, worker: str, training: Training) -> None:
    """Raise ServerUnfitError unless all servers answer `worker` and train by --inner-opt."""
    security = client_security(connection, worker)
    for server in addresses_of(connection.servers):
        try:
            status = ask_status(server, security, timeout_s=ASK_S)
        except NoAnswerError as error:
            raise ServerUnfitError(f"--server {server}: {error}") from error
        if status.inner_opt.lower() != training.inner_opt:
            raise ServerUnfitError(
                f"--inner-opt {training.inner_opt}: the server at {server} trains with "
                f"{status.inner_opt.lower()}: expected the same"
            )


@contextlib.contextmanager
def one_line_worker_errors(program: str, worker: str) -> Iterator[None]:
    """Turn bad input into exit code 2, a lost server or its refusal into 1, without a traceback."""
    with one_line_errors(program):
        try:
            yield
        except (ServerUnfitError, ServerLostError, RefusedError) as error:
            # unlike bad input, this may be one worker's alone: each speaks for itself
            sys.stderr.write(f"{program}: {worker}: {error}\n")
            sys.exit(2 if isinstance(error, ServerUnfitError) else 1)


def end_when_told() -> None:
    """Have this process end on SIGTERM, and with the torchrun that started it, where one has."""
    if os.getpid() == 1:
        # in a container: the kernel keeps a signal from process 1 that it has no handler for
        signal.signal(signal.SIGTERM, lambda _number, _frame: os._exit(128 + signal.SIGTERM))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
