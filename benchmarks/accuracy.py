"""Test accuracy and bytes of dense DDP and of top-Q from the same seeds, by launch/train.sh.

    python benchmarks/accuracy.py
    python benchmarks/accuracy.py --mode ps

Runs each data set with each seed on two ranks, prints a table, and writes accuracy.json; by a
parameter server, accuracy_ps.json, where bytes are counted both ways, the first fetch included.
Fashion-MNIST needs the Debian package dataset-fashion-mnist.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

from harness.console import option_parser, say, text_table, write_report

from topq_dist.compress.defaults import DEFAULT_Q

ROOT = Path(__file__).resolve().parents[1]
# the curves stay in runs/: what a table needs is kept
LEFT_OUT = {"losses", "sent_bytes", "received_bytes"}


def main() -> None:
    parser = option_parser(__doc__)
    parser.add_argument("--mode", choices=("ddp", "ps"), default="ddp")
    parser.add_argument("--data", nargs="+", default=["digits", "fashion-mnist"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--q", type=float, default=DEFAULT_Q)
    options = parser.parse_args()
    rows = [
        row
        for data in options.data
        for seed in options.seeds
        for row in compared(options.mode, data, seed, options.q, options.out)
    ]
    name = "accuracy" if options.mode == "ddp" else "accuracy_ps"
    write_report(options.out, name, {"rows": rows})
    print(table(rows))


def compared(mode: str, data: str, seed: int, q: float, out: Path) -> list[dict[str, Any]]:
    """Run one comparison and return its two results, with the seconds that both took together.

    mode: "ddp" or "ps", for what carries top-Q.
    """
    folder = out / f"accuracy-{mode}-{data}-{seed}"
    say(f"{data}, seed {seed}")
    began_s = time.perf_counter()
    arguments = ["--data", data, "--seed", str(seed), "--q", str(q), "--out", str(folder)]
    arguments += ["--mode", mode, "--link", "none"]
    subprocess.run([ROOT / "launch" / "train.sh", *arguments], check=True)
    wall_s = time.perf_counter() - began_s
    rows = []
    for part in ("dense", "ps" if mode == "ps" else "topq"):
        result = json.loads((folder / f"{data}-{part}.json").read_text())
        row = {key: value for key, value in result.items() if key not in LEFT_OUT}
        row |= {"sent_bytes": result["sent_bytes"][-1], "comparison_s": wall_s}
        if mode == "ps":
            row["received_bytes"] = result["received_bytes"][-1]
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the medians over the seeds, and the widest gap in accuracy, as plain text."""
    ways = [way for way in ("sent_bytes", "received_bytes") if way in rows[0]]
    lines: dict[str, list[str]] = {}
    for data in dict.fromkeys(row["data"] for row in rows):
        dense, topq = (
            [row for row in rows if row["data"] == data and (row["mode"] == "dense") == is_dense]
            for is_dense in (True, False)
        )
        gaps = [
            100 * (other["test_accuracy"] - one["test_accuracy"])
            for one, other in zip(dense, topq, strict=True)
        ]
        lines[data] = [
            f"{100 * median(dense, 'test_accuracy'):.2f} %",
            f"{100 * median(topq, 'test_accuracy'):.2f} %",
            " ".join(f"{gap:+.2f}" for gap in gaps),
            *(f"{median(dense, way) / median(topq, way):.0f} x" for way in ways),
            f"{max(row['comparison_s'] for row in topq):.0f} s",
        ]
    fewer = ["fewer bytes"] if len(ways) == 1 else ["fewer bytes up", "down"]
    heads = ["dense accuracy", "top-Q accuracy", "points, seed by seed", *fewer, "both took"]
    return text_table("data", heads, lines)


def median(rows: list[dict[str, Any]], key: str) -> float:
    """Return the median of one figure."""
    return float(statistics.median(row[key] for row in rows))


if __name__ == "__main__":
    main()
