"""The metrics: each one's name, kind, unit, labels and meaning, by the rules of OpenMetrics.

A name ends in its unit, and a counter is shown with `_total` behind that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram", "info"]
Side = Literal["rank", "server"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric.

    name: of the family, without `_total`. unit: the word that the name ends in, or "". side: who
    offers it: a rank (with the hook, or a worker of a parameter server), or a server.
    """

    name: str
    kind: Kind
    text: str
    side: Side
    unit: str = ""
    labels: tuple[str, ...] = ()

    @property
    def shown_name(self) -> str:
        """The name as Prometheus knows it."""
        return self.name + {"counter": "_total", "info": "_info"}.get(self.kind, "")


def _rank(name: str, kind: Kind, text: str, unit: str = "", *labels: str) -> Metric:
    return Metric(name=f"topq_{name}", kind=kind, text=text, side="rank", unit=unit, labels=labels)


def _server(name: str, kind: Kind, text: str, unit: str = "", *labels: str) -> Metric:
    return Metric(
        name=f"topq_server_{name}", kind=kind, text=text, side="server", unit=unit, labels=labels
    )


# of a rank

STEPS = _rank("steps", "counter", "Synchronised backward passes, or steps through a server.")
VOID_STEPS = _rank(
    "void_steps",
    "counter",
    "Of these, those whose gradient held NaN or infinity: nothing was sent or delivered, and "
    "residuals stayed as they were. Since the process began.",
)
SENT_BYTES = _rank(
    "sent_bytes",
    "counter",
    "Handed to collectives by this rank, headers and padding included; or payloads that a server "
    "took.",
    "bytes",
)
RECEIVED_BYTES = _rank(
    "received_bytes", "counter", "Payloads that came from a server; 0 with collectives.", "bytes"
)
WIRE_BYTES = _rank(
    "wire_bytes",
    "counter",
    "What those collectives make this rank put on its link, forwarding included.",
    "bytes",
)
DENSE_BYTES = _rank(
    "dense_bytes",
    "counter",
    "What plain DDP would have handed to its all-reduce in the same steps.",
    "bytes",
)
SELECT_SECONDS = _rank(
    "select_seconds",
    "counter",
    "In compensation and selection, since the process began.",
    "seconds",
)
ENCODE_SECONDS = _rank(
    "encode_seconds", "counter", "In quantizing and encoding, since the process began.", "seconds"
)
WAIT_SECONDS = _rank(
    "wait_seconds",
    "counter",
    "Blocked on peers and links; with a server until the answer is applied.",
    "seconds",
)
DECODE_SECONDS = _rank(
    "decode_seconds",
    "counter",
    "In decoding, averaging and updating residuals, since the process began.",
    "seconds",
)
RESIDUAL_RATIO = _rank(
    "residual_ratio",
    "gauge",
    "Norm of what earlier steps have left unsent, over the norm of the gradient that it is added "
    "to: of every 10th step, and of long tensors a sample of 1/32.",
    "ratio",
)
RESIDUAL_GROWING = _rank(
    "residual_growing_steps",
    "gauge",
    "Steps for which the mean of residual_ratio over 50 steps has been rising without a pause.",
    "steps",
)
OLDEST_UNSENT = _rank(
    "oldest_unsent_steps",
    "gauge",
    "Steps that the coordinate which has waited longest has gone without being sent while it had "
    "something to send; of up to 1,024 coordinates of each bucket or server's vector, always the "
    "same ones.",
    "steps",
)
EXCHANGE = _rank(
    "exchange",
    "info",
    "The exchange in use: auto while it measures, then what it has chosen; server for a worker.",
    "",
    "exchange",
)

# of a server

RUN = _server("run", "info", "The run that the server keeps.", "", "run", "mode", "downlink")
VERSION = _server("version", "gauge", "The model's version: how many steps it has taken.")
DURABLE_VERSION = _server("durable_version", "gauge", "The newest version that is in a snapshot.")
PARAMETERS = _server("parameters", "gauge", "Elements of the model.")
WORKERS = _server("workers", "gauge", "Workers whose lease runs.")
ROUND_DURATION = _server(
    "round_duration_seconds",
    "histogram",
    "From the arrival of a version's first push until the version is made.",
    "seconds",
)
SLOW_ROUNDS = _server(
    "slow_rounds",
    "counter",
    "Rounds that took over three times the median of up to 101 before them, and over 0.25 s.",
)
STEP_SECONDS = _server(
    "step_seconds",
    "counter",
    "In making versions: averaging, the inner optimizer, and the update for the workers.",
    "seconds",
)
DECODE_PUSH_SECONDS = _server(
    "decode_seconds", "counter", "In decoding and checking pushes, over all threads.", "seconds"
)
PUSHES = _server(
    "pushes",
    "counter",
    "Pushes by what became of them: applied, repeated (answered again), stale (too late), "
    "unbelieved_replay, non_finite.",
    "",
    "outcome",
)
REFUSED = _server("refused", "counter", "Refused pushes and calls, by reason.", "", "reason")
BYTES_UP = _server("received_bytes", "counter", "Frames of pushes that came in.", "bytes")
BYTES_DOWN = _server("sent_bytes", "counter", "Payloads of answers that went out.", "bytes")
DENSE_UP = _server(
    "received_dense_bytes", "counter", "What these pushes would be, sent whole.", "bytes"
)
DENSE_DOWN = _server(
    "sent_dense_bytes", "counter", "What these answers would be, sent whole.", "bytes"
)
SNAPSHOT_DURATION = _server(
    "snapshot_duration_seconds",
    "histogram",
    "From the copy of the state until the file is durable.",
    "seconds",
)
SNAPSHOT_SIZE = _server("snapshot_size_bytes", "gauge", "The newest snapshot's file.", "bytes")
SNAPSHOT_UNSAVED = _server(
    "unsaved_seconds",
    "gauge",
    "Since the oldest version was made that is in no snapshot; 0 where all are.",
    "seconds",
)
SNAPSHOT_OVERDUE = _server(
    "snapshot_overdue_seconds",
    "gauge",
    "Since a snapshot became due that has not been written; 0 where none is.",
    "seconds",
)
WORKER_LAG = _server(
    "worker_lag_versions", "gauge", "Versions that a worker is behind.", "versions", "worker"
)
WORKER_LEASE = _server(
    "worker_lease_seconds", "gauge", "Left of a worker's lease; 0: gone.", "seconds", "worker"
)
WORKER_WAITS = _server(
    "worker_wait_seconds",
    "counter",
    "That a worker's pushes have waited here for others, until they were decided.",
    "seconds",
    "worker",
)
WORKER_LATE = _server(
    "worker_late",
    "counter",
    "Versions made without a worker whose lease ran (sync), or its pushes refused as too old "
    "(async).",
    "",
    "worker",
)
WORKER_LATE_STREAKS = _server(
    "worker_late_streaks",
    "counter",
    "Times that a worker was late twice in a row, however many more followed.",
    "",
    "worker",
)
WORKER_LOSS = _server("worker_loss", "gauge", "The loss that a worker last reported.", "", "worker")
WORKER_RESIDUAL = _server(
    "worker_residual_ratio",
    "gauge",
    "topq_residual_ratio as a worker last reported it.",
    "ratio",
    "worker",
)
WORKER_GROWING = _server(
    "worker_residual_growing_steps",
    "gauge",
    "topq_residual_growing_steps as a worker last reported it.",
    "steps",
    "worker",
)
WORKER_UNSENT = _server(
    "worker_oldest_unsent_steps",
    "gauge",
    "topq_oldest_unsent_steps as a worker last reported it.",
    "steps",
    "worker",
)

METRICS: tuple[Metric, ...] = tuple(
    one for one in list(globals().values()) if isinstance(one, Metric)
)
