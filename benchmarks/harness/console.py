"""The console of the benchmarks: options, progress, and a table in plain text."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

RUNS = Path(__file__).resolve().parents[2] / "runs"
COLUMN = 26


def option_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of a benchmark's options, with `out`, the folder of what it writes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RUNS, help="folder for what is written (runs)")
    return parser


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


def write_report(folder: Path, name: str, report: Mapping[str, Any]) -> None:
    """Write figures to `name`.json in a folder, which is made where it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")


def text_table(title: str, heads: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """Return `rows` (label to cells) under `heads`, with `title` above the labels."""
    width = max(map(len, (title, *rows)))
    return "\n".join(
        f"{label:{width}}" + "".join(f"{cell:>{COLUMN}}" for cell in cells)
        for label, cells in ((title, heads), *rows.items())
    )
