"""All servers of a worker: called at once, and what they bring taken in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from torch import Tensor

from topq_dist.ps.client.server_client import ServerClient
from topq_dist.ps.client.shard import Shard
from topq_dist.telemetry.stats import Meter

# between looks at calls that are to end
_LOOK_S = 0.1


class AllServers:
    """The client of each shard's server, called on threads of their own.

    steps_alone: between pushes the parameters are this worker's own.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        clients: Sequence[ServerClient],
        meter: Meter,
        *,
        steps_alone: bool,
    ) -> None:
        self._shards = shards
        self._clients = clients
        self._meter = meter
        self._steps_alone = steps_alone
        self._threads = ThreadPoolExecutor(len(clients), thread_name_prefix="ps")

    @property
    def under_way(self) -> bool:
        """Whether some server has still to decide on a push."""
        return any(client.pushes.pending is not None for client in self._clients)

    def call(
        self, call: Callable[[ServerClient], Any], *, meanwhile: Callable[[], None] | None = None
    ) -> list[Any]:
        """Call at all servers; raises the first error once all are done.

        Ctrl-C breaks the calls off: they may wait for other workers without a limit.
        """
        if len(self._clients) == 1 and meanwhile is None:
            return [call(self._clients[0])]
        calls = [self._threads.submit(call, client) for client in self._clients]
        try:
            if meanwhile is not None:
                meanwhile()
            wait(calls)
        except BaseException:
            self._cancel(calls)
            raise
        errors = [error for made in calls if (error := made.exception()) is not None]
        for other in errors[1:]:
            errors[0].add_note(f"and {other}")
        if errors:
            raise errors[0]
        return [made.result() for made in calls]

    def _cancel(self, calls: Sequence[Future[Any]]) -> None:
        """Return once these calls have ended, which may be tried again later."""
        while wait(calls, _LOOK_S).not_done:
            for client in self._clients:
                client.cancel_calls()
        for client in self._clients:
            client.allow_calls()

    def absorb(self) -> None:
        """Take in what the clients brought."""
        for client, shard in zip(self._clients, self._shards, strict=True):
            outcome = client.collect()
            if outcome.forked or outcome.overflowed:
                shard.clear_residuals()
            for push in outcome.taken_back:
                shard.restore_residual(push)
            if outcome.refused:
                shard.rates.take_back(shard.compressor.residual_decay)
            if not self._steps_alone:
                shard.write_back(outcome.changed)
            elif outcome.changed is None or outcome.changed:
                # everywhere: their steps may write where autograd counts no writes
                shard.write_back()
            self._meter.add(
                sent_bytes=outcome.sent_bytes,
                wire_bytes=outcome.sent_bytes,
                received_bytes=outcome.received_bytes,
            )

    def fetch_central(self) -> dict[str, Tensor]:
        """Return the servers' own parameters by name."""
        try:
            models = self.call(ServerClient.fetch_central)
        finally:
            self.absorb()
        return {name: tensor for model in models for name, tensor in model.tensors().items()}

    def close(self, timeout_s: float | None) -> None:
        """Give all places up; see ServerClient.close."""
        try:
            self.call(lambda client: client.close(timeout_s))
        finally:
            self._threads.shutdown()
