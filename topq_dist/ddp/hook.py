"""The DistributedDataParallel communication hook: compress, exchange, average.

One bucket's way: `topq_hook` compresses it and starts its all-gather, and the backward pass goes
on while the frames travel; in the hook of the last bucket, when there is nothing left to
overlap with, the frames are decoded, bucket by bucket, into the averaged gradient. All of it
happens on the thread of the backward pass, so every rank issues its collectives in one order.
"""

# no `from __future__ import annotations` here: DistributedDataParallel reads the hook's annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from topq_dist.compress.compressor import Compressed, FlatCompressor
from topq_dist.compress.feedback import Layout
from topq_dist.ddp.checks import check_model, trainable_names
from topq_dist.ddp.density import Density, FixedDensity, PairedDensity, Scope
from topq_dist.ddp.exchange import AllGather, Exchange, Job, Link, Pending
from topq_dist.ddp.messages import ExchangeError, SettingsDifferError, agree, digest
from topq_dist.optim import TopQGradientOptimizer
from topq_dist.telemetry import Meter, Stats

_STATE_VERSION = 1


class _InFlight(NamedTuple):
    bucket: Tensor
    pending: Pending
    future: Future[Tensor]


class TopQState:
    """State of `topq_hook` for one DistributedDataParallel model.

    Knobs, in the order in which one tunes them:
        optimizer: a TopQGradientOptimizer whose groups' q, dq and param_ndim are read live, and
            which then leaves the hook's parameters unsparsified. None: one `q` holds for all.
        q: fraction of each gradient that is not sent, in [0, 1]; only without an optimizer.
            `state.q = ...` changes it between steps, on every rank alike.
        error_feedback: keep what was not sent and add it to the next gradient.
        value_format: how the kept values travel; None is the gradient's own dtype, lossless.
        scope: keep the top-Q part of each "parameter", or of each "bucket" (fewer and larger
            selections; what is kept then depends on DDP's bucketing). Only without an optimizer.

    A collective: every rank of the model's process group makes its state at the same point.
    Raises TypeError or ValueError on bad input, and ExchangeError on every rank where ranks
    disagree on settings or model; nothing is touched before that.
    """

    def __init__(
        self,
        ddp_model: DistributedDataParallel,
        optimizer: TopQGradientOptimizer | None = None,
        *,
        q: float | None = None,
        error_feedback: bool = True,
        value_format: str | None = None,
        scope: Scope = "parameter",
    ) -> None:
        check_model(ddp_model)
        self._names = trainable_names(ddp_model)
        self._density = _density(self._names, optimizer, q=q, scope=scope)
        self._compressor = FlatCompressor(value_format=value_format, error_feedback=error_feedback)
        self._meter = Meter()
        self._link = Link(
            group=ddp_model.process_group,
            device=next(iter(self._names)).device,
            meter=self._meter,
        )
        self._exchange: Exchange = AllGather(self._link)
        self._in_flight: list[_InFlight] = []
        self._failure: Exception | None = None
        self._settings_digest = 0
        agree(self._describe(), group=self._link.group, device=self._link.device)
        if optimizer is not None:
            optimizer.sparsified_elsewhere(self._names)

    @property
    def q(self) -> float:
        """The q of every parameter; AttributeError where an optimizer's groups hold it."""
        return self._fixed_density().q

    @q.setter
    def q(self, value: float) -> None:
        self._fixed_density().q = value

    def _fixed_density(self) -> FixedDensity:
        if not isinstance(self._density, FixedDensity):
            raise AttributeError("q lives in the optimizer's groups: use group['q']")
        return self._density

    def stats(self) -> Stats:
        """Return this rank's totals so far."""
        return self._meter.stats

    def state_dict(self) -> dict[str, Any]:
        """Return what this rank needs to resume: residuals by parameter name, settings, totals.

        Tensors, numbers and strings only, so that torch.load(weights_only=True) reads it back.
        Each rank's is its own: save one a rank.
        """
        return {
            **self._identity(),
            "residuals": self._compressor.residuals.state_dict(),
            "density": self._density.state_dict(),
            "stats": vars(self._meter.stats).copy(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from what the same rank's `state_dict` returned.

        Raises ValueError, and changes nothing, where it is another model's, rank's or world
        size's.
        """
        for key, expected in self._identity().items():
            if state.get(key) != expected:
                raise ValueError(f"state has {key}={state.get(key)!r}: expected {expected}")
        shapes = {name: tuple(parameter.shape) for parameter, name in self._names.items()}
        for name, residual in state["residuals"].items():
            if tuple(residual.shape) != shapes.get(name):
                raise ValueError(
                    f"state has a residual of {name!r} with shape {tuple(residual.shape)}: "
                    f"expected {shapes.get(name, 'no such parameter in this model')}"
                )
        stats = Stats(**state["stats"])
        self._density.load_state_dict(state["density"])
        self._compressor.residuals.load_state_dict(state["residuals"])
        self._meter.stats = stats

    def _identity(self) -> dict[str, int]:
        return {
            "version": _STATE_VERSION,
            "world_size": self._link.group.size(),
            "rank": self._link.group.rank(),
        }

    def _settings(self) -> str:
        return f"{self._density.settings()}\n{self._compressor.settings()}"

    def _describe(self) -> str:
        model = [f"{name} {tuple(p.shape)} {p.dtype}" for p, name in self._names.items()]
        return "\n".join([self._settings(), *model])

    def _launch(self, bucket: dist.GradBucket) -> Future[Tensor]:
        """Start on one bucket; the last bucket's call finishes them all."""
        if bucket.index() == 0:
            self._begin_step()
        buffer, layout, parameters = bucket.buffer(), self._layout(bucket), bucket.parameters()
        job = Job(
            bucket=buffer,
            layout=layout,
            settings_digest=self._settings_digest,
            compress=lambda parts: self._compress(buffer, layout, parameters, parts),
        )
        pending = self._exchange.launch(job)
        self._meter.add(dense_bytes=buffer.nbytes)
        if self._in_flight:
            self._in_flight[-1].pending.advance()
        future: Future[Tensor] = Future()
        self._in_flight.append(_InFlight(buffer, pending, future))
        if bucket.is_last():
            self._finish_step()
        return future

    def _begin_step(self) -> None:
        # what an aborted backward pass left behind is of no use to anyone
        self._in_flight.clear()
        self._failure = None
        try:
            self._density.begin_step()
            self._settings_digest = digest(self._settings())
        except (TypeError, ValueError) as failure:
            self._failure = failure

    def _layout(self, bucket: dist.GradBucket) -> Layout:
        parameters = bucket.parameters()
        return Layout(
            names=tuple(self._names[parameter] for parameter in parameters),
            shapes=tuple(tuple(parameter.shape) for parameter in parameters),
        )

    def _compress(
        self, buffer: Tensor, layout: Layout, parameters: list[Tensor], parts: int
    ) -> Compressed | None:
        if self._failure is not None:
            return None
        try:
            with self._meter.timed("select_s"):
                cuts = self._density.cuts(parameters)
                return self._compressor.compress(buffer, layout, cuts, parts=parts)
        except Exception as failure:  # noqa: BLE001 - raised once the other ranks have been told
            self._failure = failure
            return None

    def _finish_step(self) -> None:
        in_flight, self._in_flight = self._in_flight, []
        try:
            in_flight[-1].pending.advance()
            finite = [pending.receive() for _, pending, _ in in_flight]
        except SettingsDifferError:
            # every rank is here, having read the same digests, and may ask for the particulars
            agree(self._settings(), group=self._link.group, device=self._link.device)
            raise
        except ExchangeError as error:
            raise self._failure or error from None
        if self._failure is not None:
            raise self._failure
        for bucket, pending, future in in_flight:
            if all(finite):
                pending.deliver()
            else:
                bucket.fill_(torch.nan)
            future.set_result(bucket)
        self._meter.add(steps=1)


def topq_hook(state: TopQState, bucket: dist.GradBucket) -> Future[Tensor]:
    """Return a future of the bucket's average over the ranks, of which each sent its top-Q part.

    A DistributedDataParallel communication hook, for `model.register_comm_hook(state, topq_hook)`
    where `register_topq_hook` is too little. The result is written into the bucket's own buffer.

    Raises ExchangeError, on every rank, where ranks disagree on the settings or one has failed.
    """
    return state._launch(bucket)


def register_topq_hook(
    ddp_model: DistributedDataParallel,
    optimizer: TopQGradientOptimizer | None = None,
    *,
    q: float | None = None,
    error_feedback: bool = True,
    value_format: str | None = None,
    scope: Scope = "parameter",
) -> TopQState:
    """Make `ddp_model` exchange only the top-Q part of its gradients, and return the hook's state.

    Takes TopQState's knobs and raises what it raises, before anything is touched; a model takes
    one communication hook, once. A collective: call it on every rank.
    """
    state = TopQState(
        ddp_model,
        optimizer,
        q=q,
        error_feedback=error_feedback,
        value_format=value_format,
        scope=scope,
    )
    ddp_model.register_comm_hook(state, topq_hook)
    return state


def _density(
    names: Mapping[Tensor, str],
    optimizer: TopQGradientOptimizer | None,
    *,
    q: float | None,
    scope: Scope,
) -> Density:
    if optimizer is None:
        if q is None:
            raise ValueError("q=None: expected a number in [0, 1], or a TopQGradientOptimizer")
        return FixedDensity(q, scope)
    if not isinstance(optimizer, TopQGradientOptimizer):
        raise TypeError(
            f"optimizer={type(optimizer).__name__}: expected a TopQGradientOptimizer to read q "
            "from, or None with q=... for any other optimizer"
        )
    if q is not None:
        raise ValueError(f"q={q!r} with an optimizer: expected None, since its groups hold q")
    if scope != "parameter":
        raise ValueError(f"scope={scope!r} with an optimizer: expected 'parameter'")
    return PairedDensity(optimizer, names)
