"""Headless Chromium from the system's packages, for tests of the status page."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# as Debian and others name it; the package playwright brings none
_NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def chromium() -> Iterator[Any]:
    """Start a browser, or skip the test where the machine has none."""
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # as root, in containers, it has no sandbox of its own
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


class Tab:
    """A page at a URL, with what its console says, what it asks for, and when it was there.

    options: of playwright's new_context.
    """

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self._context = browser.new_context(**options)
        self.page = self._context.new_page()
        self.page.set_default_timeout(20_000)
        self.said: list[str] = []
        self.hosts: set[str] = set()
        self.page.on("console", lambda message: self.said.append(f"{message.type} {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(f"error {error}"))
        self.page.on("request", lambda request: self.hosts.add(request.url.split("/")[2]))
        self.page.goto(url)
        self.page.wait_for_selector("#workers tbody tr, p#workers")

    def loaded_s(self) -> float:
        """Return the seconds from the request until all was loaded and drawn once."""
        script = """() => {
            const [asked] = performance.getEntriesByType("navigation");
            const [drawn] = performance.getEntriesByName("drawn", "measure");
            return Math.max(asked.loadEventEnd, drawn.startTime + drawn.duration) / 1000;
        }"""
        return float(self.page.evaluate(script))

    def text(self, selector: str) -> str:
        """Return the text of the first element."""
        return str(self.page.inner_text(selector))

    def wait_until(self, script: str) -> None:
        """Wait for a condition, in JavaScript."""
        self.page.wait_for_function(script)

    def overflows(self) -> bool:
        """Return whether the page is wider than what shows it."""
        script = "() => document.documentElement.scrollWidth > innerWidth"
        return bool(self.page.evaluate(script))

    def shot(self, path: Path, *, full: bool = False) -> None:
        """Take a screenshot."""
        self.page.screenshot(path=str(path), full_page=full)

    def close(self) -> None:
        """Close the tab."""
        self._context.close()
