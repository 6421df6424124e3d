"""Metrics over HTTP, as Prometheus asks for them, and in the trackers of training runs."""

from __future__ import annotations

import socket
import threading
import urllib.error
from contextlib import ExitStack
from typing import Any

import pytest
from http_get import got
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parsed

from topq_dist.telemetry import (
    Histogram,
    Meter,
    Reading,
    Stats,
    serve_metrics,
    to_mlflow,
    to_tensorboard,
    to_wandb,
)
from topq_dist.telemetry.catalog import (
    EXCHANGE,
    METRICS,
    RESIDUAL_RATIO,
    ROUND_DURATION,
    WORKER_LAG,
)
from topq_dist.telemetry.readings import UnsentReading, rank_readings

_OPENMETRICS = "application/openmetrics-text; version=1.0.0"


class Source:
    """A rank that has done three steps, and a server's histogram beside it."""

    def __init__(self) -> None:
        self.observed = 0
        self.meter = Meter(Stats(steps=3, sent_bytes=40, dense_bytes=4000, wait_s=0.5))
        self.rounds = Histogram((0.1, 1.0))
        for seconds in (0.05, 0.1, 0.5, 7.0):
            self.rounds.observe(seconds)

    def observe(self) -> None:
        self.observed += 1

    def readings(self) -> list[Reading]:
        return [
            *rank_readings(self.meter, UnsentReading(residual_ratio=2.5), "split"),
            self.rounds.reading(ROUND_DURATION),
            Reading(WORKER_LAG, 4.0, ('a"b',)),
        ]


def scraped(address: tuple[str, int], accept: str = _OPENMETRICS) -> str:
    host, port = address
    return got(f"http://{host}:{port}/metrics", Accept=accept)


def test_a_scrape_is_openmetrics_of_the_source() -> None:
    source = Source()
    with serve_metrics(source) as server:
        assert server.address[0] == "127.0.0.1"
        families = {
            one.name: one
            for one in parsed(scraped(server.address))  # type: ignore[no-untyped-call]
        }
        plain = scraped(server.address, "text/plain")
    assert source.observed == 1
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in families.values()
        for sample in family.samples
    }
    assert samples["topq_steps_total",] == 3
    assert samples["topq_sent_bytes_total",] == 40
    assert samples["topq_wait_seconds_total",] == 0.5
    assert samples["topq_residual_ratio",] == 2.5
    assert ("topq_oldest_unsent_steps",) not in samples
    assert samples["topq_exchange_info", "split"] == 1
    assert samples["topq_server_worker_lag_versions", 'a"b'] == 4
    assert samples["topq_server_round_duration_seconds_count",] == 4
    assert samples["topq_server_round_duration_seconds_sum",] == pytest.approx(7.65)
    assert samples["topq_server_round_duration_seconds_bucket", "0.1"] == 2
    assert samples["topq_server_round_duration_seconds_bucket", "1.0"] == 3
    units = {family.name: family.unit for family in families.values()}
    assert units == {one.name: one.unit for one in METRICS if one.name in units}
    assert "topq_steps_total 3.0" in plain


def test_a_closed_server_leaves_its_port() -> None:
    server = serve_metrics(Source())
    server.close()
    server.close()
    with serve_metrics(Source(), *server.address):
        pass


def test_silent_connections_are_few_and_end_with_the_server() -> None:
    before = threading.active_count()
    with ExitStack() as stack:
        server = stack.enter_context(serve_metrics(Source()))
        silent = [
            stack.enter_context(socket.create_connection(server.address, 10)) for _ in range(100)
        ]
        hung_up_on = silent[64:]
        assert [one.recv(1) for one in hung_up_on] == [b""] * len(hung_up_on)
        assert threading.active_count() - before <= 65
        server.close()
        assert [one.recv(1) for one in silent[:64]] == [b""] * 64


@pytest.mark.parametrize(
    ("path", "host", "code"),
    [
        ("/metrics", "evil.example", 421),
        ("/metrics", "127.0.0.1.evil.example:80", 421),
        ("/", "localhost", 404),
        ("/metrics/x", "localhost", 404),
        ("/metrics?x=1", "localhost:80", 200),
    ],
)
def test_only_metrics_are_there_under_names_of_loopback(path: str, host: str, code: int) -> None:
    # as a page of another name would have a browser ask, once the name leads here
    with serve_metrics(Source()) as server:
        url = "http://{}:{}{}".format(*server.address, path)
        if code == 200:
            assert "topq_steps_total 3.0" in got(url, Host=host)
            return
        with pytest.raises(urllib.error.HTTPError) as refused:
            got(url, Host=host)
        with refused.value as answer:
            assert answer.code == code
            assert b"topq_" not in answer.read()


def test_a_resolver_that_knows_nobody_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(name: str) -> Any:
        raise AssertionError(f"asked who {name} is")

    monkeypatch.setattr(socket, "gethostbyaddr", ask)
    serve_metrics(Source()).close()


@pytest.mark.parametrize("source", [None, {}, Meter()])
def test_another_source_is_refused(source: Any) -> None:
    with pytest.raises(TypeError, match=r"source is a .*: expected a TopQState"):
        serve_metrics(source)


def test_trackers_are_given_the_same_numbers() -> None:
    source = Source()
    written: dict[str, dict[str, float]] = {"tensorboard": {}, "wandb": {}, "mlflow": {}}

    class Tracker:
        def add_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> None:
            assert global_step == 7
            written["tensorboard"][tag] = scalar_value

        def log(self, data: dict[str, Any], step: int | None = None) -> None:
            assert step == 7
            written["wandb"] = data

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            assert step == 7
            written["mlflow"] = metrics

    tracker = Tracker()
    to_tensorboard(source, tracker, step=7)
    to_wandb(source, tracker, step=7)
    to_mlflow(source, tracker, step=7)
    assert written["tensorboard"] == written["wandb"] == written["mlflow"]
    numbers = written["wandb"]
    assert numbers["topq_steps"] == 3
    assert numbers['topq_server_worker_lag_versions/a"b'] == 4
    assert numbers["topq_server_round_duration_seconds/count"] == 4
    assert EXCHANGE.name not in numbers
    assert numbers[RESIDUAL_RATIO.name] == 2.5


def test_what_a_resumed_run_had_selected_before_is_not_selecting_now() -> None:
    meter = Meter()
    meter.add(select_s=5.0)
    meter.encode_s += 2.0
    assert meter.selecting_s == 3.0
    meter.stats = Stats(select_s=100.0)
    assert meter.selecting_s == 0.0
    meter.add(select_s=4.0)
    meter.encode_s += 1.0
    assert (meter.selecting_s, meter.stats.select_s) == (3.0, 104.0)
