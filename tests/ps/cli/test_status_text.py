"""A status as people read it."""

from __future__ import annotations

import json

from topq_dist.ps.cli.status_text import status_json, status_text
from topq_dist.v1 import parameter_server_pb2 as pb


def test_aligns_and_names_units() -> None:
    workers = [
        pb.WorkerStatus(worker="worker-10", version=9, lag=12345, lease_left_s=0, sequence=7),
        pb.WorkerStatus(
            worker="a",
            version=12354,
            lease_left_s=59.6,
            waiting=True,
            received_bytes=1_234_567_890_123,
            sent_bytes=999_960,
        ),
    ]
    status = pb.StatusResponse(
        run="r\x1b[2J",
        point=pb.Point(version=12354),
        uptime_s=3723,
        received_bytes=999,
        refused={"stale": 2, "invalid": 1, "non_finite": 0},
        workers=workers,
        round_workers=2,
    )
    lines = status_text({"a:1": status}).splitlines()
    assert lines[0] == "run       r?[2J, up for 1 h 02 min"
    assert "round     1 of 2 pushes are there" in lines
    assert "bytes     999 B received, 0 B sent" in lines
    assert "refused   invalid 1, stale 2" in lines
    assert lines[-3:] == [
        "worker     version    lag  pushes  lease   push  received    sent",
        "a            12354      0       0   60 s  waits    1.2 TB  1.0 MB",
        "worker-10        9  12345       7   gone      -       0 B     0 B",
    ]
    assert json.loads(status_json({"a:1": status}))["workers"][0]["worker"] == "a"


def test_speaks_of_rounds_only_where_there_are_some() -> None:
    assert "round" not in status_text({"a:1": pb.StatusResponse(mode="async")})


def test_several_servers_are_told_apart() -> None:
    answers = {"a:1": pb.StatusResponse(mode="async"), "a:2": pb.StatusResponse(mode="sync")}
    assert status_text(answers).count("server    a:") == 2
    told = json.loads(status_json(answers))
    assert [(one["address"], one["mode"]) for one in told] == [("a:1", "async"), ("a:2", "sync")]
