"""The rows of docs/compatibility.md, for the tests that make them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "compatibility.md"


class Row(NamedTuple):
    """A row of the page: what was tried, what came of it, and by which test."""

    what: str
    outcome: str
    test: str


def rows() -> list[Row]:
    found = []
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| ") and len(cells) == 3 and "---" not in line and cells[0] != "what":
            found.append(Row(*cells))
    return found


def cases_of(path: str) -> set[str]:
    """Return what the rows are of that a test file makes."""
    return {row.what.strip("`") for row in rows() if path in row.test}


def outcome_of(what: str, path: str) -> tuple[str, str]:
    """Return whether the page says of a row of this file that it works, and the words it quotes."""
    (row,) = [row for row in rows() if row.what.strip("`") == what and path in row.test]
    kind, _, words = row.outcome.partition(": ")
    return kind, words.strip("`")
