"""Prometheus from the system's packages, for tests: started, asked, ended."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from http_get import got

MONITORING = Path(__file__).parents[2] / "deploy" / "monitoring"
_START_S = 30.0


def tool(name: str) -> str:
    """Return the path of "prometheus" or "promtool", or skip the test where there is none."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} on this machine: apt-get install prometheus")
    return found


class Prometheus:
    """A Prometheus that listens at `url`."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, path: str, **query: str) -> Any:
        """Return the data of an answer of its API; raises OSError where it refuses."""
        text = got(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(query)}")
        return json.loads(text)["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the samples of an expression now."""
        found: list[dict[str, Any]] = self.ask("query", query=expression)["result"]
        return found

    def spans(self, expression: str, start_s: float, end_s: float) -> list[tuple[Any, int]]:
        """Return the labels of each series between two times, and how often it began."""
        found = self.ask(
            "query_range", query=expression, start=str(start_s), end=str(end_s), step="0.2"
        )
        spans = []
        for series in found["result"]:
            at_s = [float(at) for at, _ in series["values"]]
            began = 1 + sum(after - before > 2 for before, after in pairwise(at_s))
            spans.append((series["metric"], began))
        return spans

    def firing(self) -> list[str]:
        """Return the names of the alerts that fire, one for each alert, sorted."""
        alerts = self.ask("alerts")["alerts"]
        return sorted(one["labels"]["alertname"] for one in alerts if one["state"] == "firing")

    def wait_until(self, condition: Callable[[], bool], what: str, within_s: float = 60.0) -> None:
        """Wait for something; fails the test, saying what, where it does not come."""
        end_s = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < end_s, what
            time.sleep(0.2)


@contextmanager
def prometheus(
    folder: Path, rules: str, targets: Mapping[str, Sequence[str]]
) -> Iterator[Prometheus]:
    """Run Prometheus on these rules and targets, by job; it asks and looks every half second."""
    (folder / "alerts.yml").write_text(rules)
    config = {
        "global": {"scrape_interval": "500ms", "evaluation_interval": "500ms"},
        "rule_files": ["alerts.yml"],
        "scrape_configs": [
            {
                "job_name": job,
                "scrape_timeout": "500ms",
                "static_configs": [{"targets": list(hosts)}],
            }
            for job, hosts in targets.items()
        ],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))  # which is YAML as well
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [
                tool("prometheus"),
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
        try:
            found = Prometheus(f"http://127.0.0.1:{port}")
            found.wait_until(lambda: _is_ready(found), (folder / "log").read_text(), _START_S)
            yield found
        finally:
            process.terminate()
            process.wait(30)


def _is_ready(server: Prometheus) -> bool:
    try:
        return "Ready" in got(f"{server.url}/-/ready")
    except OSError:
        return False
