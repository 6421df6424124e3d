"""The page on metrics has each metric, with its kind, unit, labels and meaning, and no other."""

from __future__ import annotations

from pathlib import Path

import pytest

from topq_dist.telemetry.catalog import METRICS, Side

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()


@pytest.mark.parametrize("side", ["rank", "server"])
def test_the_page_lists_what_the_code_has(side: Side) -> None:
    table = PAGE.partition(f"<!-- {side} -->\n")[2].partition("\n<!-- end -->")[0]
    expected = ["| metric | kind | unit | labels | meaning |", "| --- | --- | --- | --- | --- |"]
    for one in METRICS:
        labels = ", ".join(one.labels) or "-"
        row = f"| `{one.shown_name}` | {one.kind} | {one.unit or '-'} | {labels} | {one.text} |"
        expected += [row] if one.side == side else []
    assert table.splitlines() == expected


def test_names_follow_openmetrics() -> None:
    assert len({one.name for one in METRICS}) == len(METRICS)
    for one in METRICS:
        assert one.name.endswith(f"_{one.unit}") or not one.unit
        assert not one.name.endswith(("_total", "_info", "_count", "_sum", "_bucket", "_created"))
        assert one.text.endswith(".")
