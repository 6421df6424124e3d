"""The console of the benchmarks: options, progress, and a table in plain text."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence

COLUMN = 26


def integer_from(low: int) -> Callable[[str], int]:
    """Return an argparse type that takes integers of at least `low`."""

    def integer(text: str) -> int:
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"{text}: expected an integer of at least {low}")
        return int(text)

    return integer


def say(text: str) -> None:
    """Tell of progress on stderr, so that stdout holds the table alone."""
    print(text, file=sys.stderr, flush=True)


def text_table(title: str, heads: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """Return `rows` (label to cells) under `heads`, with `title` above the labels."""
    width = max(map(len, (title, *rows)))
    return "\n".join(
        f"{label:{width}}" + "".join(f"{cell:>{COLUMN}}" for cell in cells)
        for label, cells in ((title, heads), *rows.items())
    )
