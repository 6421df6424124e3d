"""The memory that the hook takes beyond a dense step: peak resident size of fresh processes.

    python benchmarks/memory.py

Trains the 10.5 M-parameter MLP of ddp_step.py for a few steps on two local ranks, dense and with
each sparse exchange, and compares the peaks with the residual (one gradient) and one bucket.
"loaded" is a dense step in a process that has loaded topq_dist and run what the hook runs on a
bucket of few elements: what its code takes, whatever the model. Some of that are pages of library
files, of which a machine holds one copy for all processes.
Prints a table and writes runs/memory.json. Needs Linux.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from harness.console import option_parser, say, text_table, write_report
from harness.ddp_worker import PARAMETERS, Training
from torch.multiprocessing.spawn import spawn

import topq_dist

RANKS = 2
STEPS = 8
MODES = ("dense", "loaded", "allgather", "split")
GRADIENT_BYTES = 4 * PARAMETERS
# DDP's default, which no bucket here exceeds by more than one layer
BUCKET_BYTES = 25 * 2**20


def main() -> None:
    parser = option_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    peaks: dict[str, list[Peak]] = {mode: [] for mode in MODES}
    for _ in range(options.repeats):
        for mode in MODES:
            say(mode)
            peaks[mode].append(peak_of(mode))
    medians = {mode: sorted(found)[len(found) // 2] for mode, found in peaks.items()}
    rows: list[dict[str, Any]] = [
        {
            "mode": mode,
            "peak_bytes": peak.resident_bytes,
            "file_bytes": peak.file_bytes,
            "beyond_dense_bytes": peak.resident_bytes - medians["dense"].resident_bytes,
            "beyond_loaded_bytes": peak.resident_bytes - medians["loaded"].resident_bytes,
        }
        for mode, peak in medians.items()
    ]
    found = {"gradient_bytes": GRADIENT_BYTES, "bucket_bytes": BUCKET_BYTES, "rows": rows}
    write_report(options.out, "memory", found)
    lines = {
        row["mode"]: [
            f"{row['peak_bytes'] / 1e6:.0f} MB",
            f"{row['file_bytes'] / 1e6:.0f} MB",
            f"{row['beyond_dense_bytes'] / 1e6:+.0f} MB",
            f"{row['beyond_loaded_bytes'] / 1e6:+.0f} MB",
            f"{row['beyond_loaded_bytes'] / GRADIENT_BYTES:+.2f}",
        ]
        for row in rows
    }
    print(
        text_table(
            "peak of a rank",
            ["resident", "files at the end", "beyond dense", "beyond loaded", "in gradients"],
            lines,
        )
    )
    print(
        f"a gradient, and so the residual: {GRADIENT_BYTES / 1e6:.0f} MB; "
        f"a bucket: {BUCKET_BYTES / 1e6:.0f} MB"
    )


class Peak(NamedTuple):
    """The most that a process has had resident, and how much of files it has at the end."""

    resident_bytes: int
    file_bytes: int


def peak_of(mode: str) -> Peak:
    """Return the larger peak of two fresh ranks that train in this mode."""
    with tempfile.TemporaryDirectory(prefix="topq-memory-") as folder:
        spawn(rank_main, args=(mode, folder), nprocs=RANKS)  # type: ignore[no-untyped-call]
        return max(
            Peak(*json.loads((Path(folder) / f"peak{rank}").read_text())) for rank in range(RANKS)
        )


def rank_main(rank: int, mode: Any, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    training = Training(rank, bucket_cap_mb=25)
    if mode == "loaded":
        load_loops()
    elif mode != "dense":
        topq_dist.register_topq_hook(training.model, q=0.99, value_format="fp16", exchange=mode)
    for _ in range(STEPS):
        training.step_s(exchange=True)
    (Path(folder) / f"peak{rank}").write_text(json.dumps(own_peak()))
    dist.destroy_process_group()


def load_loops() -> None:
    """Take a small gradient through what the hook takes a bucket through, cold and warm."""
    # not above: a dense step would take the room of what they load
    from topq_dist.compress.aggregate import decode_partition
    from topq_dist.compress.compressor import TopKCompressor
    from topq_dist.compress.layout import Layout
    from topq_dist.compress.reduce import PartReducer
    from topq_dist.compress.sparsify.segments import uniform_segments

    compressor = TopKCompressor(value_format="fp16", error_feedback=True)
    reducer = PartReducer(compressor.residuals)
    numels = (10_000, 100)
    layout = Layout(names=("few", "fewer"), shapes=tuple((numel,) for numel in numels))
    for parts in (1, 2, 2):
        gradient = torch.randn(layout.numel)
        segments = uniform_segments(numels, q=0.99, scope="parameter")
        compressed = compressor.compress(gradient, layout, segments, parts=parts)
        reduced = [
            reducer.reduce([frame] * RANKS, layout, part=part, parts=parts)
            for part, frame in enumerate(compressed.frames)
        ]
        received = decode_partition([part.frame for part in reduced], numel=layout.numel)
        compressor.update_and_write(compressed, received, divisor=1)
        for part_reduced in reduced:
            compressor.residuals.apply(part_reduced.update)


def own_peak() -> Peak:
    """Return this process's peak so far."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    resident, files = (1024 * int(status[name].split()[0]) for name in ("VmHWM", "RssFile"))
    return Peak(resident, files)


if __name__ == "__main__":
    main()
