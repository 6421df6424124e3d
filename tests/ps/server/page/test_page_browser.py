"""The status page in headless Chromium: 64 workers, a phone, the dark, the keyboard, a restart.

TOPQ_SCREENSHOTS=FOLDER keeps what it looks like.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ps.bench import Bench, Make, push_of
from ps.server.page.browser import Tab, chromium

from topq_dist.ps.protocol.types import ModelVersion
from topq_dist.ps.server.page.http_server import PageServer
from topq_dist.ps.server.requests import WorkerId
from topq_dist.ps.server.run_counters import WorkerReport

WORKERS = 64
LOAD_S = 1.0
# for a load that other tests do not slow down
MOST_LOADS = 40
VERSION = "() => document.querySelector('.tile dd').firstChild.data === '{}'"
PILL = "() => document.querySelector('.pill').classList.contains('{}')"
PHONE = {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark", "has_touch": True}


class Job:
    """A run of 64 workers that steps when it is told to, and its page."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.callers = [bench.join(f"worker-{number:02d}") for number in range(WORKERS)]
        self.page = PageServer(bench.server, "127.0.0.1", 0)
        self.sequences = dict.fromkeys(self.callers, 1)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.page.address[1]}/"

    def step(self, times: int = 1) -> None:
        counters = self.bench.server.counters
        for _ in range(times):
            base = self.bench.point
            pendings = []
            for number, caller in enumerate(self.callers):
                loss = 2.3 * math.exp(-base.version / 40) + 0.05 * math.sin(number + base.version)
                ratio = 3.5 - 3 * math.exp(-base.version / 9) + number / 100
                report = WorkerReport(loss=loss, residual_ratio=ratio, oldest_unsent_steps=60)
                counters.take_report(caller.worker, report)
                self.bench.clock.pass_s(0.01 * ((number * base.version) % 3))
                pendings.append(self.bench.submit(self._push(caller, base)))
            for caller, pending in zip(self.callers, pendings, strict=True):
                self.bench.answer(pending)
                self.sequences[caller] += 1

    def _push(self, caller: WorkerId, base: ModelVersion) -> Any:
        frame_bytes = 4200 + (base.version * 37) % 90
        return replace(push_of(caller, self.sequences[caller], base), frame_bytes=frame_bytes)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture
def job(make: Make) -> Iterator[Job]:
    job = Job(make(start_workers=WORKERS, max_workers=WORKERS, snapshot_every=20, lease_s=60.0))
    job.step(30)
    yield job
    job.page.close()


def keep(tab: Tab, name: str, *, full: bool = False) -> None:
    folder = os.environ.get("TOPQ_SCREENSHOTS")
    if folder:
        tab.shot(Path(folder) / f"{name}.png", full=full)


def soonest_s(browser: Any, job: Job, tabs: list[Tab]) -> float:
    """Return the shortest load of these tabs, and of more of them where all took too long."""
    soonest = min(one.loaded_s() for one in tabs)
    for _ in range(MOST_LOADS):
        if soonest < LOAD_S:
            break
        tab = Tab(browser, job.url, viewport={"width": 1280, "height": 900})
        soonest = min(soonest, tab.loaded_s())
        tab.close()
    return soonest


def test_it_is_there_within_a_second_and_follows_by_itself(browser: Any, job: Job) -> None:
    tabs = [Tab(browser, job.url, viewport={"width": 1280, "height": 900}) for _ in range(3)]
    tab = tabs[0]
    assert soonest_s(browser, job, tabs) < LOAD_S
    assert tab.page.locator("#workers tbody tr").count() == WORKERS
    assert tab.page.locator("canvas").count() == 4
    assert not tab.overflows()
    tab.page.evaluate("() => { window.sameDocument = true }")
    job.step(5)
    tab.wait_until(VERSION.format(35))
    assert "version 35" in tab.text(".chart .where")
    assert "64 of 64" in tab.text(".tiles")
    keep(tab, "status_page")
    job.bench.clock.pass_s(100)  # all leases end
    tab.wait_until("() => document.querySelectorAll('tr.gone').length === 64")
    assert tab.page.evaluate("() => window.sameDocument")
    for one in tabs:
        assert one.said == []
        assert one.hosts == {job.url.split("/")[2]}
        one.close()


def test_it_reads_on_a_phone_in_the_dark(browser: Any, job: Job) -> None:
    tab = Tab(browser, job.url, device_scale_factor=2, **PHONE)
    assert not tab.overflows()
    paper = tab.page.evaluate("() => getComputedStyle(document.documentElement).backgroundColor")
    assert max(map(int, paper.strip("rgb()").split(","))) < 40
    sizes = tab.page.evaluate(
        "() => [...document.querySelectorAll('td, th, dd, dt, p, figcaption')]"
        ".map((one) => parseFloat(getComputedStyle(one).fontSize))"
    )
    assert min(sizes) >= 12
    keep(tab, "status_page_phone")
    assert tab.said == []
    tab.close()


def test_it_asks_once_at_a_time_however_often_one_comes_back(browser: Any, job: Job) -> None:
    tab = Tab(browser, job.url, viewport={"width": 1280, "height": 900})
    held: list[Any] = []
    tab.page.route("**/api/status*", lambda route: held.append(route))
    with tab.page.expect_request("**/api/status*"):
        pass
    come_back = """() => {
        for (let i = 0; i < 3; i += 1) document.dispatchEvent(new Event("visibilitychange"));
        return new Promise((done) => setTimeout(done, 100));
    }"""
    for _ in range(3):
        tab.page.evaluate(come_back)
    assert len(held) == 1
    with tab.page.expect_request("**/api/status*"):  # and goes on by itself
        held[0].continue_()
    tab.close()


def test_it_goes_by_keyboard(browser: Any, job: Job) -> None:
    tab = Tab(browser, job.url, viewport={"width": 1280, "height": 900})
    tab.page.keyboard.press("Tab")
    assert tab.page.evaluate("() => document.activeElement.className") == "skip"
    tab.page.keyboard.press("Enter")
    assert tab.page.evaluate("() => document.activeElement.id") == "workers"
    tab.page.keyboard.press("Tab")
    tab.page.keyboard.press("Enter")
    assert tab.text("#workers tbody th") == "worker-63"
    assert tab.page.get_attribute("#workers th", "aria-sort") == "descending"
    tab.page.focus(".plot")
    tab.page.keyboard.press("Home")
    assert tab.text(".chart .where") == "version 1"
    tab.page.keyboard.press("ArrowRight")
    assert tab.text(".chart .where") == "version 2"
    assert "at version 2" in tab.page.get_attribute(".plot", "aria-label")
    outline = tab.page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none"
    tab.page.keyboard.press("Tab")  # and away, which shows the newest again
    assert tab.text(".chart .where") == "version 30"
    assert tab.said == []
    tab.close()


def test_it_survives_a_restart_that_loses_versions(browser: Any, job: Job) -> None:
    tab = Tab(browser, job.url, viewport={"width": 1280, "height": 900})
    tab.page.evaluate("() => { window.sameDocument = true }")
    tab.wait_until(VERSION.format(30))
    port = job.page.address[1]
    job.page.close()
    tab.wait_until(PILL.format("away"))
    assert "the server is away" in tab.text(".pill")
    assert tab.page.locator("#workers tbody tr").count() == WORKERS  # what was last known
    durable = job.bench.server.status().durable_version
    assert durable < 30
    job.bench.crash()
    job.callers = [job.bench.join(caller.worker, epoch=caller.epoch) for caller in job.callers]
    job.sequences = dict.fromkeys(job.callers, durable + 1)
    job.page = PageServer(job.bench.server, "127.0.0.1", port)
    tab.wait_until(PILL.format("live"))
    tab.wait_until(VERSION.format(durable))
    job.step(2)
    tab.wait_until(VERSION.format(durable + 2))
    tab.page.focus(".plot")
    tab.page.keyboard.press("Home")
    assert tab.text(".chart .where") == "version 1"
    tab.page.keyboard.press("End")
    assert tab.text(".chart .where") == f"version {durable + 2}"
    assert tab.page.evaluate("() => window.sameDocument")
    # a browser says itself where nobody listens
    assert [one for one in tab.said if "ERR_CONNECTION_REFUSED" not in one] == []
    tab.close()
