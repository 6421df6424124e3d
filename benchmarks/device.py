"""The cost of compress() on a GPU, beside torch.topk and a copy on the device.

    python benchmarks/device.py

fp32 gradients of 25 M and 100 M elements, drawn anew each step; compress() is the residual added,
exact top-k, fp16 values, the frame, and what was not sent kept; the frame ends on the CPU. All take
turns within a step, with the device idle before and after each. Prints medians and GB/s of
gradient, writes runs/device.json. Without a GPU it says so and exits with 2; `--device cpu` runs
it all the same.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from harness.console import integer_from, option_parser, say, text_table, write_report

from topq_dist import Compressor

COPY, OURS, TOPK = "copy on the device", "compress()", "torch.topk"


@dataclass(frozen=True, kw_only=True)
class Row:
    """Seconds of each measured step of one method; `copies` is a ratio of medians."""

    method: str
    numel: int
    q: float
    times_s: list[float]
    gradient_gb_per_s: float
    copies: float


def measure(device: torch.device, numel: int, q: float, warm_up: int, steps: int) -> list[Row]:
    """Return a row for each method at one size and q."""
    k = round((1.0 - q) * numel)
    compressor = Compressor(q=q, value_format="fp16")
    gradient, kept = torch.empty(numel, device=device), torch.empty(numel, device=device)
    methods: dict[str, Callable[[], object]] = {
        COPY: lambda: kept.copy_(gradient),
        OURS: lambda: compressor.compress("gradient", gradient),
        TOPK: lambda: torch.topk(gradient.abs(), k, sorted=False),
    }
    times_s: dict[str, list[float]] = {name: [] for name in methods}
    generator = torch.Generator(device).manual_seed(0)
    for step in range(warm_up + steps):
        gradient.normal_(generator=generator)
        for name, method in methods.items():
            synchronize(device)
            start_s = time.perf_counter()
            method()
            synchronize(device)
            if step >= warm_up:
                times_s[name].append(time.perf_counter() - start_s)
    say(f"{numel / 1e6:g} M elements, q = {q}")
    median_s = {name: statistics.median(taken) for name, taken in times_s.items()}
    return [
        Row(
            method=name,
            numel=numel,
            q=q,
            times_s=taken,
            gradient_gb_per_s=4e-9 * numel / median_s[name],
            copies=median_s[name] / median_s[COPY],
        )
        for name, taken in times_s.items()
    ]


def synchronize(device: torch.device) -> None:
    """Wait until the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(rows: Sequence[Row]) -> str:
    """Return one table a setting."""
    tables = []
    for numel, q in dict.fromkeys((row.numel, row.q) for row in rows):
        cells = {
            row.method: [
                f"{statistics.median(row.times_s) * 1e3:.2f} ms",
                f"{row.gradient_gb_per_s:.1f}",
                f"{row.copies:.1f}",
            ]
            for row in rows
            if (row.numel, row.q) == (numel, q)
        }
        title = f"{numel / 1e6:g} M elements, q = {q}"
        tables.append(text_table(title, ["median", "GB/s of gradient", "copies"], cells))
    return "\n\n".join(tables)


def main(argv: list[str] | None = None) -> None:
    parser = option_parser(__doc__)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument(
        "--numel", nargs="+", type=integer_from(1000), default=[25_000_000, 100_000_000]
    )
    parser.add_argument("--q", nargs="+", type=float, default=[0.99, 0.999])
    parser.add_argument("--warm-up", type=integer_from(1), default=30, help="steps not counted")
    parser.add_argument("--steps", type=integer_from(1), default=15, help="steps measured")
    options = parser.parse_args(argv)
    if options.device.type == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("device.py: no CUDA device here: expected one, or --device cpu\n")
        sys.exit(2)
    rows = [
        row
        for numel in options.numel
        for q in options.q
        for row in measure(options.device, numel, q, options.warm_up, options.steps)
    ]
    name = torch.cuda.get_device_name() if options.device.type == "cuda" else "cpu"
    report = {
        "benchmark": "device",
        "machine": {"device": name, "torch": torch.__version__},
        "settings": {"warm_up": options.warm_up, "steps": options.steps},
        "rows": [asdict(row) for row in rows],
    }
    write_report(options.out, "device", report)
    print(table(rows))


if __name__ == "__main__":
    main()
