"""The worker's torch optimizer: step() pushes the gradient, and the parameters come back."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

from topq_dist.compress.compressor import TopKCompressor
from topq_dist.compress.defaults import (
    DEFAULT_BOUND,
    DEFAULT_Q,
    DEFAULT_VALUE_FORMAT,
    usual_bound,
    usual_value_format,
)
from topq_dist.compress.planned_segments import PlannedSegments, widest_format
from topq_dist.compress.sparsify.segments import Scope
from topq_dist.profiling import labelled
from topq_dist.ps.client.all_servers import AllServers
from topq_dist.ps.client.arguments import addresses_of, by_gradient, checked_worker
from topq_dist.ps.client.ctrl_c import ctrl_c_later
from topq_dist.ps.client.followed_rates import FollowedRates
from topq_dist.ps.client.left_out import FrozenParameters, module_of, warn_of_buffers
from topq_dist.ps.client.local_steps import make_local_steps
from topq_dist.ps.client.looked_on import LookedOn
from topq_dist.ps.client.param_groups import ServerGroups
from topq_dist.ps.client.server_client import ServerClient
from topq_dist.ps.client.shard import Shard, coherence_of, frames_of, shard_by_size
from topq_dist.ps.client.state_elsewhere import StateElsewhere
from topq_dist.ps.client.step_under_way import StepUnderWay
from topq_dist.ps.client.worker_state import (
    Resumed,
    read_state,
    shard_state,
)
from topq_dist.ps.protocol.errors import RefusedError, ServerLostError
from topq_dist.ps.protocol.types import NewPush
from topq_dist.ps.security.policy import ClientSecurity
from topq_dist.ps.security.tls import ClientTls
from topq_dist.q_policies import QPolicy
from topq_dist.telemetry.readings import Reading
from topq_dist.telemetry.stats import Meter, Stats
from topq_dist.validation import check_number

_log = logging.getLogger(__name__)
# a failed `with` block is left without waiting long for a server that may be why it failed
_HASTY_CLOSE_S = 5.0


class ParameterServerOptimizer(torch.optim.Optimizer):
    """An optimizer whose inner optimizer runs in one or more parameter servers.

    named_parameters: model.named_parameters(). Those that need no gradient now stay out, as buffers
        do; a warning names buffers of the model, and a parameter that needs a gradient later.
    servers: "HOST:PORT" or several of them, in a list or as one text ("HOST:[50051-50054]",
        "topq-[0-3].topq:50051"), over which the parameters are split by size (see shard_by_size):
        every worker names the same ones in the same words.

    Knobs, in the order in which one tunes them:
        q: fraction of each gradient that is not sent, in [0, 1], or a policy (QSchedule, QByTensor,
            QByLoss), whose steps are this worker's own. `optimizer.q = ...` changes it.
        worker: this worker's name in the run, unique and the same whenever it is started again.
            None: "rank-" and RANK where torchrun set that, else the host's name and process id.
        error_feedback: keep what was not sent and add it to the next gradient. Without it, a
            gradient that comes too late for its version is lost.
        value_format: how kept values travel: "fp32", "fp16", "bf16", "int8", "int4", "int2",
            "fp64", or entropy-coded "ec1", "ec2", "ecfp16", "ecbf16"; None is the gradient's own
            dtype, lossless, and what is used where none is said and q is 0, or error_feedback
            False.
        bound: clip what is sent to so many times the mean magnitude of what is sent of the same
            parameter (of a dtype with scope "bucket"), and keep what is clipped; None does not.
            What is half sent or more is never clipped. Only with error_feedback.
        scope: keep the top-Q part of each "parameter", or ("bucket") of all of a dtype together.
        every, local_optimizer: take steps of `local_optimizer`, a torch optimizer of the same
            parameters, on this worker alone, and after `every` of them send what they have taken
            off the parameters in place of a gradient (local steps): the servers' optimizer is then
            the outer one, SGD at lr 1 the mean of the changes. None: every step is the servers'.
        residual_decay: what a residual is multiplied by with each push, in [0, 1]. Below 1 only
            with error_feedback.
        keep_rate: what is not sent is applied later at the rate of the step it came from, and not
            at that of the step that sends it, which a schedule may have lowered, within the bounds
            of the hook's; where the servers' steps do without momentum ("feedback"), and not with
            `local_optimizer`, nor without error_feedback.
        timeout_s: how long a server may be silent before step() raises ServerLostError, which names
            it, and how long a transfer may take. Waiting for other workers is not silence; a server
            says every 5 s that it waits.
        tls, token: how to show oneself to the servers; None: in the clear, without one.

    Joins at once: the first worker's values become the run's, and all others take them. The groups
    are the servers' (those of one behind those of the other, in the order of addresses), and read
    only but for lr, weight_decay, and momentum or betas[0]: once a worker has changed an lr, it
    sends all of them with each step, and likewise the others. Where the workers of a version send
    different ones, the median counts, and a warning says so.

    A parameter whose gradient is None stays as it is, and its optimizer state, where no worker of
    the version has one; where others have, it counts as zeros. Its residual stays in either case.

    A step that raised is not over. The next step() finishes it, with the gradient that it began
    with; it calls no closure and looks at no newer gradient. Only where a server refuses what was
    sent (InvalidError, TooLargeError) it is over there: its gradient goes with the next one, or
    after NonFiniteError is forgotten, with the residual. Local steps that end in NaN or infinity
    are dropped before anything is sent: the parameters are those of the last round again, step()
    raises NonFiniteError, and the next one begins a round.

    Raises TypeError or ValueError on bad input, ServerLostError for a server that does not answer,
    and RefusedError (ModelDiffersError and others) for one that does not take this worker.
    """

    # GradScaler then calls step() on overflow too, so that the round is not held up
    _step_supports_amp_scaling = True

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        servers: str | Sequence[str],
        *,
        q: float | QPolicy = DEFAULT_Q,
        worker: str | None = None,
        error_feedback: bool = True,
        value_format: str | None = DEFAULT_VALUE_FORMAT,
        bound: float | None = DEFAULT_BOUND,
        scope: Scope = "parameter",
        every: int = 1,
        local_optimizer: torch.optim.Optimizer | None = None,
        residual_decay: float = 1.0,
        keep_rate: bool = True,
        timeout_s: float = 120.0,
        tls: ClientTls | None = None,
        token: str | None = None,
    ) -> None:
        self._worker = checked_worker(worker)
        if check_number("timeout_s", timeout_s) <= 0:
            raise ValueError(f"timeout_s={timeout_s!r}: expected a number of seconds above zero")
        if not isinstance(keep_rate, bool):
            raise TypeError(f"keep_rate={keep_rate!r}: expected True or False")
        module = module_of(named_parameters)
        named, frozen = by_gradient(named_parameters)
        self._frozen = FrozenParameters(frozen)
        self._names = list(named)
        self._local = make_local_steps(local_optimizer, every, named.values())
        value_format = usual_value_format(value_format, q=q, error_feedback=error_feedback)
        shapes = {name: tuple(parameter.shape) for name, parameter in named.items()}
        dtypes = [parameter.dtype for parameter in named.values()]
        self._planned = PlannedSegments(q, scope, shapes, value_format or widest_format(dtypes))
        addresses = addresses_of(servers)
        sizes_bytes = {name: parameter.nbytes for name, parameter in named.items()}
        security = ClientSecurity(tls=tls, token=token)
        self._shards = [
            Shard(
                {name: named[name] for name in names},
                TopKCompressor(
                    value_format=value_format,
                    error_feedback=error_feedback,
                    bound=usual_bound(bound, error_feedback=error_feedback),
                    residual_decay=residual_decay,
                ),
            )
            for names in shard_by_size(sizes_bytes, addresses).values()
        ]
        self._clients = [
            ServerClient(
                shard.model,
                address=address,
                worker=self._worker,
                timeout_s=timeout_s,
                security=security,
            )
            for shard, address in zip(self._shards, sorted(addresses), strict=True)
        ]
        self._meter = Meter()
        self._looked_on = LookedOn(self._clients)
        self._step = StepUnderWay()
        self._closed = False
        self._resumed = Resumed()
        self._servers = AllServers(
            self._shards, self._clients, self._meter, steps_alone=self._local is not None
        )
        try:
            self._servers.call(ServerClient.start)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        self._servers.absorb()
        self._groups = ServerGroups([client.groups for client in self._clients])
        follows = keep_rate and error_feedback and self._local is None
        self._followed = FollowedRates(self._shards, self._groups, enabled=follows)
        self._complete = False
        super().__init__(self._groups.param_groups(named), self._groups.defaults())
        self.state = StateElsewhere()
        self._complete = True
        warn_of_buffers(module)

    @property
    def q(self) -> float | QPolicy:
        """q as given, or set since."""
        return self._planned.q

    @q.setter
    def q(self, value: float | QPolicy) -> None:
        self._planned.q = value

    @property
    def worker(self) -> str:
        """This worker's name."""
        return self._worker

    def stats(self) -> Stats:
        """Return this worker's totals so far: payload bytes, without gRPC's own."""
        return self._meter.stats

    def observe(self) -> None:
        """Measure from the next step on what waits in the residuals; a second call does nothing.

        What `telemetry.serve_metrics` and the like call, and what a server with --metrics or --http
        asks for; docs/metrics.md says what it costs.
        """
        self._looked_on.observe()

    def readings(self) -> list[Reading]:
        """Return what this worker's metrics stand at now; from any thread."""
        return self._looked_on.readings(self._meter)

    def report(self, *, loss: float | Tensor) -> None:
        """Have the servers show this loss from the next step on, where somebody looks on there.

        loss: a number, or a tensor of one element, which is only read where a server asks. What
        step() is given as a closure is reported by itself.
        """
        if isinstance(loss, Tensor) and loss.numel() != 1:
            raise ValueError(f"loss has {loss.numel()} elements: expected one")
        self._looked_on.report(loss)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Push the gradients and take the parameters that come back; returns the closure's loss.

        With `local_optimizer` it steps that, and pushes after `every` steps alone. Waits for the
        other workers where the servers do. Raises NonFiniteError, naming the first parameter, for a
        gradient with NaN or infinity, before anything is sent; ServerLostError and RefusedError,
        after which step() finishes what it began, and RuntimeError once closed.
        """
        self._check_not_closed()
        loss = None
        try:
            if self._step.open:
                _log.warning("finishing the step that was broken off, with its own gradient")
                self._take_up()
                if self._local is not None:
                    self._local.end_round()
            elif self._local is not None:
                if not self._local.due:
                    scale, overflow = self._loss_scale()
                    loss = self._local.step(closure, scale=scale, overflow=overflow)
                    self._looked_on.report_returned(loss)
                if not self._local.due:
                    self._meter.add(steps=1, dense_bytes=self._raw_bytes())
                    return loss
                with self._local.dropping_what_is_not_finite(self._shards):
                    self._begin(1.0, overflow=False)
                self._local.end_round()
            else:
                if closure is not None:
                    with torch.enable_grad():
                        loss = closure()
                    self._looked_on.report_returned(loss)
                scale, overflow = self._loss_scale()
                self._begin(scale, overflow=overflow)
            watched = self._step.updates
            with self._meter.timed("wait_s"):
                self._step.hand_on_pushes()
                # while the frames travel
                self._servers.call(ServerClient.finish, meanwhile=self._step.update_residuals)
        finally:
            if self._step.open:
                self._take_in()
        self._looked_on.applied(watched)
        self._meter.add(steps=1, dense_bytes=self._raw_bytes())
        return loss

    def _take_in(self) -> None:
        """Take in what the servers brought, all or a part, and what of the step was left to do."""
        with ctrl_c_later(), self._meter.timed("wait_s"):
            # gradients may be others by the next step
            self._step.update_residuals()
            began_s = time.perf_counter()
            self._servers.absorb()
            self._meter.decode_s += time.perf_counter() - began_s
            self._step.undecided = self._servers.under_way
            if not self._step.open:
                for shard in self._shards:
                    shard.rates.accept()

    def _raw_bytes(self) -> int:
        return sum(shard.raw_bytes for shard in self._shards)

    def _loss_scale(self) -> tuple[float, bool]:
        """Return what a GradScaler has multiplied the loss by, and whether there was overflow."""
        found_inf = getattr(self, "found_inf", None)
        grad_scale = getattr(self, "grad_scale", None)
        overflow = found_inf is not None and bool(found_inf.item())
        return 1.0 if grad_scale is None else float(grad_scale), overflow

    def _begin(self, scale: float, *, overflow: bool) -> None:
        """Make the next push for each server."""
        rates = self._groups.rates(self.param_groups)
        momenta = self._groups.momenta(self.param_groups)
        decays = self._groups.weight_decays(self.param_groups)
        elsewhere = self._take_up()
        self._frozen.warn_of_freed()
        absent = [
            shard.absent() if client.takes_no_gradient and self._local is None else []
            for shard, client in zip(self._shards, self._clients, strict=True)
        ]
        if self._looked_on.asked:
            self.observe()
        with ctrl_c_later(), self._followed.at_rates_of(self.param_groups, elsewhere):
            with self._meter.timed("select_s"), labelled("select and encode"), self._changes():
                made = [
                    []
                    if overflow or shard in elsewhere
                    else shard.compress(
                        self._planned,
                        scale=scale,
                        measures_coherence=wanted,
                        absent=missing,
                    )
                    for shard, wanted, missing in zip(
                        self._shards, self._groups.take_coherence(), absent, strict=True
                    )
                ]
            self._meter.encode_s += sum(part.encode_s for parts in made for part in parts)
            self._meter.void_steps += overflow
            self._looked_on.compressed([part.update for parts in made for part in parts])
            pushes = [
                NewPush(
                    frames=frames_of(compressed),
                    lr=rates[place],
                    momentum=momenta[place],
                    coherence=coherence_of(compressed),
                    weight_decay=decays[place],
                    no_gradient=shard.spec.no_gradient(absent[place]) if compressed else b"",
                    counted_at=tuple(shard.rates.counted_at(shard.names)),
                )
                for place, (shard, compressed) in enumerate(zip(self._shards, made, strict=True))
            ]
            # only now: an error above leaves no server with a push that the others lack
            self._step.make(
                zip(self._clients, pushes, strict=True),
                [
                    (shard.compressor.residuals, part.update)
                    for shard, compressed in zip(self._shards, made, strict=True)
                    for part in compressed
                ],
            )
            if any(made):
                self._planned.step += 1

    def _changes(self) -> AbstractContextManager[None]:
        if self._local is None:
            return nullcontext()
        return self._local.changes_as_gradients(self._shards)

    def fetch_central(self) -> dict[str, Tensor]:
        """Return the servers' own parameters by name: new CPU tensors, for evaluation and export.

        With the servers' downlink "topq" they are ahead of what the model here holds. Raises
        ServerLostError, RefusedError, and RuntimeError once closed.
        """
        self._check_not_closed()
        self._take_up()
        found = self._servers.fetch_central()
        return {name: found[name] for name in self._names}

    @contextmanager
    def central(self) -> Iterator[None]:
        """Have the servers' own parameters in the model within the block; see `fetch_central`."""
        values = self.fetch_central()
        own = [
            {name: one.detach().clone() for name, one in shard.parameters.items()}
            for shard in self._shards
            if self._local is not None
        ]
        try:
            for shard in self._shards:
                shard.write(values)
            yield
        finally:
            for shard in self._shards:
                shard.write_back()
            for shard, before in zip(self._shards, own, strict=False):
                shard.write(before)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raise RuntimeError: the servers' groups are made when they start."""
        if getattr(self, "_complete", False):
            raise RuntimeError(
                "add_param_group: the servers hold the groups, so give them theirs when they start "
                "(topq serve --group), and all parameters to the constructor"
            )
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return what this worker needs to resume, beside the model's own state_dict.

        Tensors, numbers and strings only, so that torch.load(weights_only=True) reads it back.
        """
        # where a step was broken off
        self._step.hand_on_pushes()
        self._step.update_residuals()
        state = super().state_dict()
        state["topq"] = {
            "worker": self._worker,
            "open": self._step.open,
            **self._groups.state_dict(),
            "stats": vars(self._meter.stats).copy(),
            "density": self._planned.state_dict(),
            "servers": [
                shard_state(shard, client, held)
                for shard, client, held in zip(
                    self._shards, self._clients, self._resumed.sha256(self._shards), strict=True
                )
            ],
        }
        if self._local is not None:
            state["topq"]["local"] = self._local.state_dict(self._resumed.held(self._shards))
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resume from what the same worker's `state_dict` returned; load the model as well.

        Either may be loaded first. The next step goes on from there, and through the steps that
        the worker had taken since, on the same path. Where it cannot (the servers have forgotten
        them, or this time the gradients differ), a warning says so, and it goes on from where the
        servers are.

        Raises ValueError or TypeError, and changes nothing, for what is no such state or another
        worker's or model's; WrongRunError for another run's.
        """
        saved = read_state(state_dict, self._worker, self._shards)
        if (saved.local is None) != (self._local is None):
            has, expected = ("no", "one with") if saved.local is None else ("a", "one without")
            raise ValueError(
                f"state_dict has {has} local optimizer: expected {expected} it, as this one is"
            )
        step = self._planned.step_in(saved.density) if saved.density else 0
        for client, one in zip(self._clients, saved.shards, strict=True):
            client.check_run(one.run)
        groups = self._groups.filled(state_dict["param_groups"])
        sizes, here = ([len(one["params"]) for one in of] for of in (groups, self.param_groups))
        if sizes != here:
            raise ValueError(f"param_groups has {sizes} parameters: expected {here}")
        if self._local is not None and saved.local is not None:
            # first of all that is changed: what of it fits, its optimizer alone knows
            self._local.load(saved.local)
        super().load_state_dict({"state": {}, "param_groups": groups})
        self.state = StateElsewhere()
        for client, shard, one in zip(self._clients, self._shards, saved.shards, strict=True):
            client.resume(one.point, one.pushes)
            shard.compressor.residuals.load_state_dict(one.residuals)
        self._step = StepUnderWay(undecided=saved.open or self._servers.under_way)
        self._followed.load(saved.shards)
        self._groups.load(saved.groups, groups)
        self._meter.stats = saved.stats
        self._resumed = Resumed(saved.shards, saved.local)
        self._planned.step = step

    def _take_up(self) -> list[Shard]:
        """See Resumed.take_up."""
        elsewhere = self._resumed.take_up(self._shards, self._clients)
        with ctrl_c_later():
            if elsewhere:
                self._servers.absorb()
            # only now: what raised above is tried again
            self._resumed = Resumed()
        return elsewhere

    def close(self, *, timeout_s: float | None = None) -> None:
        """Give this worker's places up, once all it pushed is durable at the servers.

        A step that is not over is given up. Raises ServerLostError for a server that is lost after
        `timeout_s`, None: the constructor's. To close again does nothing.
        """
        if self._closed:
            return
        self._closed = True
        self._servers.close(timeout_s)

    def _check_not_closed(self) -> None:
        if self._closed:
            raise RuntimeError("this optimizer is closed: its places at the servers are given up")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close(timeout_s=_HASTY_CLOSE_S)
        except (ServerLostError, RefusedError) as lost:
            _log.warning("%s", lost)

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            "a ParameterServerOptimizer holds connections and cannot be copied or pickled: save "
            "state_dict() instead"
        )
