"""The server process: one coordinator behind gRPC, until it is told to stop."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import resource
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from types import FrameType
from typing import Any

import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from topq_dist.compress.codec.frame import decode_frame, encode_frame
from topq_dist.compress.codec.values import quantize
from topq_dist.ps.protocol.config import ServingConfig, TrainingConfig
from topq_dist.ps.protocol.types import STREAM_WINDOW_BYTES
from topq_dist.ps.security.address import Address
from topq_dist.ps.security.policy import ServerSecurity
from topq_dist.ps.server.clock import RunningClock
from topq_dist.ps.server.coordinator import Coordinator
from topq_dist.ps.server.interceptor import AuthInterceptor
from topq_dist.ps.server.run_log import RunLog
from topq_dist.ps.server.service import ParameterServerService
from topq_dist.ps.server.view_addresses import check_views
from topq_dist.ps.server.views import Views
from topq_dist.ps.state.state_dir import StateDir
from topq_dist.v1 import parameter_server_pb2 as pb
from topq_dist.v1 import parameter_server_pb2_grpc as pb_grpc

_log = logging.getLogger(__name__)
SERVICE_NAME = pb.DESCRIPTOR.services_by_name["ParameterServer"].full_name
_GRACE_S = 5.0
_M_ARENA_MAX = -8  # of glibc's malloc.h
_ARENAS = 4
# beside two steps a worker: joins, fetches, renewals, status and health
_SPARE_CALLS = 16
_BURST_CALLS = 256
_LEAST_IDLE_S = 30.0
# connections, and files: a soft limit of 1024 is usual, and as many idle strangers lock all out
_MOST_FILES = 1 << 16
_FEW_FILES = 4096


def server_options(lease_s: float = ServingConfig.lease_s) -> list[tuple[str, Any]]:
    """Return the gRPC options of a server whose workers are heard of three times in `lease_s`."""
    return [
        # or two servers could share a port without a word
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", 4 << 20),
        # of a header, which may go on and on; 16 MiB until a client has agreed to our settings
        ("grpc.absolute_max_metadata_size", 64 << 10),
        ("grpc.http2.settings_timeout", 5_000),
        # of connections that say nothing, at first or later; a worker's lease is renewed on its own
        ("grpc.server_handshake_timeout_ms", 10_000),
        ("grpc.max_connection_idle_ms", int(1000 * max(lease_s, _LEAST_IDLE_S))),
        # its estimates grow the windows of all streams at once, and with them the memory
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", STREAM_WINDOW_BYTES),
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ]


class _Health(health.HealthServicer):  # type: ignore[misc]
    """Answers whoever asks, but tells nobody of changes: a stranger's call would last."""

    def Watch(self, request: Any, context: grpc.ServicerContext, *_: Any) -> None:  # noqa: N802
        """Say that this is not done; a client then takes the server for healthy."""
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "Watch: ask Check now and then instead")


class ParameterServer:
    """A server that listens as soon as it is made; `stop` ends it in good order.

    interceptors: grpc.ServerInterceptor, the first outermost.

    Raises ValueError for a configuration, an address or TLS files that do not work, StateError for
    a state directory that is in use or damaged, OSError for an address that cannot be had.
    """

    def __init__(
        self,
        training: TrainingConfig,
        serving: ServingConfig,
        *,
        state_dir: str | os.PathLike[str],
        address: str,
        security: ServerSecurity | None = None,
        interceptors: Sequence[grpc.ServerInterceptor] = (),
    ) -> None:
        security = security or ServerSecurity()
        security.check(address)
        authenticator = security.authenticator()
        check_views(serving)
        self._state_dir = StateDir(state_dir)
        self._coordinator: Coordinator | None = None
        self._interceptor: AuthInterceptor | None = None
        self._views: Views | None = None
        try:
            calls = 2 * serving.max_workers + _SPARE_CALLS
            clock = RunningClock()
            self._coordinator = Coordinator(training, serving, self._state_dir, clock=clock)
            clock.after_long_pause = self._coordinator.renew_leases
            self._interceptor = AuthInterceptor(
                authenticator=authenticator,
                count_refused=self._coordinator.totals.refuse,
                calls=calls,
                clock=clock,
            )
            self._server = grpc.server(
                futures.ThreadPoolExecutor(calls, thread_name_prefix="call"),
                options=server_options(serving.lease_s),
                # a burst of calls that are sent away at once takes nobody's place
                maximum_concurrent_rpcs=calls + _BURST_CALLS,
                interceptors=[*interceptors, self._interceptor],
            )
            service = ParameterServerService(self._coordinator, authenticator=authenticator)
            pb_grpc.add_ParameterServerServicer_to_server(service, self._server)
            self._health = _Health()
            health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
            names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)
            self.address: Address = security.bind(self._server, address)
            self._views = Views(self._coordinator)
            self._server.start()
        except BaseException:
            if self._coordinator is not None:
                self._coordinator.drain()
            self._close()
            raise
        self._set_health(health_pb2.HealthCheckResponse.SERVING)

    @property
    def coordinator(self) -> Coordinator:
        """The coordinator, which runs the training."""
        if self._coordinator is None:
            raise RuntimeError("the server was not started")
        return self._coordinator

    def stop(self) -> None:
        """Say "not serving", send away who waits, save, and end; answers under way may finish."""
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        try:
            self.coordinator.drain()
        finally:
            self._server.stop(_GRACE_S).wait()
            self._close()

    @property
    def views(self) -> Mapping[str, str]:
        """The URLs at which one may look on, by option: "metrics", "http"."""
        return {} if self._views is None else self._views.urls

    def _close(self) -> None:
        if self._views is not None:
            self._views.close()
        if self._interceptor is not None:
            self._interceptor.close()
        self._state_dir.close()

    def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus.ValueType) -> None:
        for service in ("", SERVICE_NAME):
            self._health.set(service, status)


def _raise_file_limit() -> None:
    """Take as many descriptors as the system allows, and say where they are few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(soft, _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES))
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most < _FEW_FILES:
        _log.warning(
            "%d open files at most: as many idle connections lock everybody out, so raise the hard"
            " limit (ulimit -Hn)",
            most,
        )


def _keep_few_arenas() -> None:
    """Have glibc keep freed memory in a few places, not for each of the threads anew."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, _ARENAS)


def _load_loops() -> None:
    """Have the loops of the codec loaded, or compiled: the first push would wait for it."""
    numel = 1024
    indices = torch.arange(0, numel, numel // 16)
    frame = encode_frame(numel, indices, quantize(torch.ones(indices.numel())))
    decode_frame(frame, numel=numel).add_to(torch.zeros(numel))


def serve(
    training: TrainingConfig,
    serving: ServingConfig,
    *,
    state_dir: str | os.PathLike[str],
    address: str,
    security: ServerSecurity | None = None,
    on_listening: Callable[[Address], None] | None = None,
    on_view: Callable[[str, str], None] | None = None,
) -> None:
    """Run a server until SIGTERM or SIGINT, then drain, save and return.

    on_listening: called once, with the address and its true port. on_view: then, with each option
    of looking on ("metrics", "http") and its URL. For the main thread. Raises what ParameterServer
    does, and RuntimeError where the server had to stop because a version could not be made, or
    another server has taken its state directory over.
    """
    _raise_file_limit()
    _keep_few_arenas()
    _load_loops()
    stop = threading.Event()

    def on_signal(number: int, _frame: FrameType | None) -> None:
        stop.set()

    handlers = {
        number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        server = ParameterServer(
            training, serving, state_dir=state_dir, address=address, security=security
        )
        now = server.coordinator.status()
        where = f"run {now.run} at version {now.point.version}"
        version = {"version": now.point.version, "run": now.run}
        _log.info("listening on %s, %s", server.address, where, extra=version)
        # torch alone has some 100,000 objects that stay, and each full collection would visit them
        gc.collect()
        gc.freeze()
        if on_listening is not None:
            on_listening(server.address)
        if on_view is not None:
            for option, url in server.views.items():
                on_view(option, url)
        run_log = RunLog(server.coordinator)
        while not stop.wait(1.0) and not server.coordinator.failed:
            run_log.look()
        _log.info("ending at version %d", server.coordinator.status().point.version)
        server.stop()
        if server.coordinator.failed:
            raise RuntimeError("it cannot go on: the log says why")
    finally:
        # what is never collected, extensions call leaked, line upon line, as the process ends
        gc.unfreeze()
        for number, handler in handlers.items():
            signal.signal(number, handler)
