"""A server's status as text for people, and as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from topq_dist.v1 import parameter_server_pb2 as pb

_UNITS = ("B", "kB", "MB", "GB", "TB")
_COLUMNS = ("worker", "version", "lag", "pushes", "lease", "push", "received", "sent")


def status_text(answers: Mapping[str, pb.StatusResponse]) -> str:
    """Return a few lines of each server, by address: the run, what it moved, and its workers."""
    if len(answers) == 1:
        return _text(next(iter(answers.values())))
    return "\n\n".join(f"server    {where}\n{_text(one)}" for where, one in answers.items())


def status_json(answers: Mapping[str, pb.StatusResponse]) -> str:
    """Return the fields of the status as the contract names them, on one line.

    Of several servers in a list, each with its address.
    """
    if len(answers) == 1:
        return json.dumps(_fields(next(iter(answers.values()))))
    return json.dumps([{"address": where, **_fields(one)} for where, one in answers.items()])


def _text(status: pb.StatusResponse) -> str:
    lines = [
        f"run       {status.run or 'not begun'}, up for {_duration(status.uptime_s)}",
        f"training  {status.inner_opt}, {status.mode}, downlink {status.downlink}",
        *([f"momentum  {status.momentum_text}"] if status.momentum_text else []),
        f"model     {status.numel:,} parameters",
        f"version   {status.point.version}, durable {status.durable_version}",
        *([f"round     {_round(status)}"] if status.round_workers else []),
        f"bytes     {_bytes(status.received_bytes)} received, {_bytes(status.sent_bytes)} sent",
        f"refused   {_counts(status)}",
    ]
    if status.state_sha256:
        lines.append(f"state     sha256 {status.state_sha256}")
    rows = [_worker(worker) for worker in sorted(status.workers, key=lambda one: one.worker)]
    lines += ["", *_table(rows)] if rows else ["workers   none"]
    return "\n".join(_printable(line) for line in lines)


def _fields(status: pb.StatusResponse) -> dict[str, object]:
    return {
        "run": status.run,
        "version": status.point.version,
        "chain": status.point.chain.hex(),
        "durable_version": status.durable_version,
        "mode": status.mode,
        "downlink": status.downlink,
        "inner_opt": status.inner_opt,
        "momentum": status.momentum,
        "momentum_text": status.momentum_text,
        "numel": status.numel,
        "received_bytes": status.received_bytes,
        "sent_bytes": status.sent_bytes,
        "uptime_s": status.uptime_s,
        "refused": dict(sorted(status.refused.items())),
        "state_sha256": status.state_sha256 or None,
        "round_workers": status.round_workers,
        "workers": [
            {field.name: getattr(worker, field.name) for field in worker.DESCRIPTOR.fields}
            for worker in sorted(status.workers, key=lambda one: one.worker)
        ],
    }


def _round(status: pb.StatusResponse) -> str:
    waiting = sum(worker.waiting for worker in status.workers)
    return f"{waiting} of {status.round_workers} pushes are there"


def _worker(worker: pb.WorkerStatus) -> tuple[str, ...]:
    return (
        worker.worker,
        str(worker.version),
        str(worker.lag),
        str(worker.sequence),
        f"{worker.lease_left_s:.0f} s" if worker.lease_left_s > 0 else "gone",
        "waits" if worker.waiting else "-",
        _bytes(worker.received_bytes),
        _bytes(worker.sent_bytes),
    )


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    table = [_COLUMNS, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(_COLUMNS))]
    return [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]


def _counts(status: pb.StatusResponse) -> str:
    counts = [f"{reason} {count}" for reason, count in sorted(status.refused.items()) if count]
    return ", ".join(counts) or "nothing"


def _bytes(number: float) -> str:
    unit = 0
    while number >= 999.95 and unit < len(_UNITS) - 1:
        number /= 1000
        unit += 1
    return f"{number:.1f} {_UNITS[unit]}" if unit else f"{number:.0f} B"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _printable(line: str) -> str:
    # names come from the server: they are not to steer the terminal
    return "".join(letter if letter.isprintable() else "?" for letter in line)
