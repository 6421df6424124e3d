"""Ranks that are killed, one after the other, at random moments of a run.

    python benchmarks/elastic.py --kills 30

Three ranks, or two nodes of two, train with LocalTopQ(elastic=...) or with the hook of
DistributedDataParallel. Again and again one that is drawn is killed by SIGKILL at a moment that is
drawn; the others must have an exchange that counts without it within 30 s, and it is started anew.
Compared are digests of the parameters (the outer ones of LocalTopQ) after every step of every
process, the killed ones' included, and of the model at the end. Prints a table and writes
runs/elastic.json; ends with 1 where a rank had other parameters than its peers, or took too long.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from harness.console import integer_from, option_parser, say, text_table, write_report
from harness.elastic_run import ElasticRun, Kill, random_kills

# the lease is Elastic's default
LEASE_S = 10.0
WITHIN_S = 30.0
CASES: dict[str, dict[str, Any]] = {
    "local": {},
    "local, streamed": {"every": 4, "fragments": 2, "overlap": 2},
    "hook": {"kind": "hook"},
    "hook, nodes": {
        "kind": "hook",
        "ranks": 4,
        "exchange": "hierarchical",
        "ranks_per_node": 2,
    },
}


def main() -> int:
    parser = option_parser(__doc__)
    parser.add_argument("--kills", type=integer_from(1), default=30)
    parser.add_argument("--seed", type=integer_from(0), default=0)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    options = parser.parse_args()
    rows = {case: measured(case, options.kills, options.seed) for case in options.cases}
    write_report(options.out, "elastic", {"kills": options.kills, "lease_s": LEASE_S, "rows": rows})
    cells = {
        case: [
            f"{row['recovered_s'][-1]:.1f} s",
            f"{row['recovered_s'][len(row['recovered_s']) // 2]:.1f} s",
            str(row["steps_compared"]),
            str(len(row["disagreements"])),
            "yes" if row["equal_at_end"] else "NO",
        ]
        for case, row in rows.items()
    }
    heads = ["others go on, longest", "median", "steps compared", "unequal", "all equal at the end"]
    print(text_table(f"{options.kills} kills", heads, cells))
    return int(not all(passed(row) for row in rows.values()))


def measured(case: str, kills: int, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        run = ElasticRun(Path(folder), lease_s=LEASE_S, **CASES[case])
        found: list[Kill] = []
        try:
            for kill in random_kills(run, kills, seed):
                found.append(kill)
                say(f"{case}: {len(found)} of {kills}, {kill}")
            ends = run.end()
        finally:
            run.stop()
        models = [end["model"] for end in ends.values()]
        return {
            "recovered_s": sorted(kill.recovered_s for kill in found),
            "returned_s": sorted(kill.returned_s for kill in found),
            "steps_compared": len({line.step for line in run.lines()}),
            "disagreements": run.disagreements(),
            "equal_at_end": all(
                torch.equal(tensor, models[0][name])
                for model in models
                for name, tensor in model.items()
            ),
        }


def passed(row: dict[str, Any]) -> bool:
    """Return whether every kill went as it should."""
    fast = row["recovered_s"][-1] < WITHIN_S
    return fast and row["equal_at_end"] and not row["disagreements"]


if __name__ == "__main__":
    sys.exit(main())
