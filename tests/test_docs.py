"""The pages for people: every path that they name is there, and every link leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
# a folder, or a file by the ending of its name
_PATH = re.compile(
    r"\.?[\w.-]+(/[\w.-]+)*/|(\.?[\w.-]+/)*\.?[\w-]+\.(md|proto|py|sh|toml|txt|yaml|yml)"
)
# of a user, or made by a script
_ELSEWHERE = ("runs/", "secrets/")


def paths_in_backticks(text: str) -> set[str]:
    """Return the words in backticks that are paths, without the options behind a script."""
    words = {span.split(" ")[0] for span in re.findall(r"`([^`\n]+)`", text)}
    return {word for word in words if _PATH.fullmatch(word) and not word.startswith(_ELSEWHERE)}


def test_contributing_names_what_is_there() -> None:
    named = paths_in_backticks((ROOT / "CONTRIBUTING.md").read_text())
    assert {"launch/test.sh", ".pre-commit-config.yaml", "topq_dist/v1/"} < named
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_the_readme_is_short_and_the_way_into_the_code_is_there() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
    assert (ROOT / "CONTRIBUTING.md").read_text().count("](topq_dist/") >= 6


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for target in targets:
        path, _, heading = target.partition("#")
        if "://" in path:
            continue
        file = page.parent / path if path else page
        assert file.exists(), target
        if heading:
            assert heading in headings(file), target


def headings(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as the repository's host makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", title).lower() for title in titles]
    return {title.replace(" ", "-") for title in plain}


def test_the_hooks_before_a_commit_are_the_checks_of_the_tests() -> None:
    hooks = re.findall(r"entry: (.+)", (ROOT / ".pre-commit-config.yaml").read_text())
    script = (ROOT / "launch" / "test.sh").read_text()
    for tool in ("ruff check", "ruff format", "mypy"):
        assert f"+ {tool}" in script or f"run_from_root {tool}" in script
        assert any(entry.startswith(f".venv/bin/python -m {tool}") for entry in hooks)
    assert "lint-imports" in script
    assert ".venv/bin/python .venv/bin/lint-imports" in hooks
    # whatever else there is comes from the same place
    assert all(entry.startswith(".venv/bin/python ") for entry in hooks)


def test_the_recipes_for_trainers_are_the_examples() -> None:
    page = (ROOT / "docs" / "trainers.md").read_text()
    recipes = re.findall(
        r"\]\(\.\./(examples/\w+\.py)\):\n\n<!-- [^>]+ -->\n```python\n(.*?)```\n", page, re.DOTALL
    )
    trainers = {path.stem for path in (ROOT / "topq_dist" / "integrations").glob("*.py")}
    # torchtitan has a recipe, and needs no module
    assert len(recipes) == len(trainers - {"__init__", "saving"}) + 1
    for example, code in recipes:
        assert code == (ROOT / example).read_text(), example
