"""The site is built without a warning, its links lead somewhere; .github follows its schemas."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from page_blocks import ROOT

import topq_dist
import topq_dist.ps

ENVIRONMENT = ROOT / ".venv-docs"
CONSTRAINTS = ("constraints.txt", "constraints-docs.txt")
NO_NETWORK = ("NewConnectionError", "NameResolutionError", "Network is unreachable")


def documentation_python() -> Path:
    """Return a Python that has this one's packages and those of the extra docs; made once."""
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*extra["optional-dependencies"]["docs"], "check-jsonschema"]
    made_of = "".join((*wanted, sys.prefix, *((ROOT / name).read_text() for name in CONSTRAINTS)))
    stamp, python = ENVIRONMENT / "made_of", ENVIRONMENT / "bin" / "python"
    digest = hashlib.sha256(made_of.encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return python
    venv.create(ENVIRONMENT, clear=True, with_pip=False, symlinks=True)
    packages = Path(
        sysconfig.get_path("purelib", vars={"base": str(ENVIRONMENT), "platbase": str(ENVIRONMENT)})
    )
    (packages / "beneath.pth").write_text(sysconfig.get_path("purelib") + "\n")
    words = [f"-c{ROOT / name}" for name in CONSTRAINTS]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            python,
            "install",
            "--no-compile",
            *words,
            *wanted,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode and any(word in done.stderr + done.stdout for word in NO_NETWORK):
        pytest.skip("no network to install the extra docs from")
    assert done.returncode == 0, done.stderr
    stamp.write_text(digest)
    return python


class Page(HTMLParser):
    """The anchors of a page of HTML, where it links to, and what it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what a tag says of these."""
        values = {name: value for name, value in attrs if value is not None}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.add(values["href"])
        elif "src" in values or (tag == "link" and "href" in values):
            self.loaded.add(values.get("src") or values["href"])


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Page]:
    """The built pages by their paths."""
    site = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [documentation_python(), "-m", "mkdocs", "build", "--strict", "--site-dir", site],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


def test_every_link_leads_somewhere(pages: dict[Path, Page]) -> None:
    assert len(pages) > 25
    lost = []
    for path, page in pages.items():
        for link in page.links | page.loaded:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            is_there = target.exists() and (
                not anchor or target not in pages or anchor in pages[target].anchors
            )
            lost += [] if is_there else [f"{path.name}: {link}"]
    assert lost == []


def test_nothing_is_loaded_from_elsewhere(pages: dict[Path, Page]) -> None:
    loaded = {link for page in pages.values() for link in page.loaded}
    assert {link for link in loaded if urlsplit(link).scheme or link.startswith("//")} == set()


def test_the_reference_has_what_is_exported(pages: dict[Path, Page]) -> None:
    (anchors,) = [page.anchors for path, page in pages.items() if path.name == "reference.html"]
    names = {f"topq_dist.{name}" for name in topq_dist.__all__ if name != "__version__"}
    names |= {f"topq_dist.ps.{name}" for name in topq_dist.ps.__all__}
    assert names - anchors == set()
    assert "topq_dist.telemetry.serve_metrics" in anchors


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("github-workflows", ".github/workflows/*.yml"),
        ("github-issue-forms", ".github/ISSUE_TEMPLATE/[!c]*.yml"),
        ("github-issue-config", ".github/ISSUE_TEMPLATE/config.yml"),
        ("citation-file-format", "CITATION.cff"),
    ],
)
def test_it_follows_its_schema(schema: str, files: str) -> None:
    words = ["-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}"]
    found = sorted(ROOT.glob(files))
    assert found
    done = subprocess.run(
        [documentation_python(), *words, *found], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_the_citation_is_of_this_version() -> None:
    assert f"\nversion: {topq_dist.__version__}\n" in (ROOT / "CITATION.cff").read_text()
