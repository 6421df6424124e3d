"""The cost of compress() on one core or more, beside other ways to select, and beside memcpy.

    python benchmarks/selection.py

A 6.55 M-element fp32 gradient, drawn anew each step. Ours is the whole of Compressor.compress():
the residual added, exact top-k, values in fp16, the frame, and what was not sent kept; the others
only select from the gradient. All take turns within each step. memcpy, a copy of the gradient into
a kept buffer in one thread, is the unit: it is as fast as memory is on this machine just then.
Prints a table of medians, writes runs/selection.json and runs/selection.png.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from harness.console import integer_from, option_parser, say, text_table, write_report
from torch import Tensor

from topq_dist.compress.codec.frame import decode_frame, encode_frame
from topq_dist.compress.codec.values import quantize
from topq_dist.compress.named_compressor import Compressor
from topq_dist.compress.residual import update_residual
from topq_dist.compress.sparsify.topk import Selector

mpl.use("Agg")
from matplotlib import pyplot as plt

OURS, MEMCPY, TOPK = "compress()", "memcpy", "torch.topk"
# DGC's sample of the gradient, and how far over k it lets the count be before it selects again
DGC_SAMPLE, DGC_SLACK = 0.01, 1.3
COLORS = {OURS: "#c0392b", MEMCPY: "#4d4d4d"}
OTHER_COLOR = "#8fa9c4"


@dataclass(frozen=True, kw_only=True)
class Row:
    """Seconds of each measured step of one method; `memcpys` and `of_topk` are ratios of medians.

    `part` marks a part of compress(), or what a receiver does, measured apart.
    """

    method: str
    part: bool
    q: float
    threads: int
    times_s: list[float]
    memcpys: float
    of_topk: float


class Methods:
    """Everything measured, each a call on one gradient, with the state it keeps between steps."""

    def __init__(self, numel: int, q: float) -> None:
        self.k = round((1.0 - q) * numel)
        self._copy = np.empty(numel, dtype=np.float32)
        self._out = torch.zeros(numel)
        self._random = torch.Generator().manual_seed(1)
        self._selector, self._residual = Selector(), torch.zeros(numel)
        self._compressor = Compressor(q=q, value_format="fp16", error_feedback=True)
        self._frame = torch.zeros(0, dtype=torch.uint8)

    def wholes(self) -> dict[str, Callable[[Tensor], object]]:
        """Return memcpy, compress() and its baselines."""
        return {
            MEMCPY: lambda g: np.copyto(self._copy, g.numpy()),
            OURS: lambda g: self._compressor.compress("gradient", g),
            TOPK: lambda g: torch.topk(g.abs(), self.k),
            "np.partition": lambda g: np.partition(np.abs(g.numpy()), g.numel() - self.k),
            "DGC, sampled threshold": self.dgc,
        }

    def dgc(self, gradient: Tensor) -> Tensor:
        """Select as Deep Gradient Compression does (Lin et al., ICLR 2018): about k elements."""
        magnitudes = gradient.abs()
        numel = gradient.numel()
        at = torch.randint(numel, (int(numel * DGC_SAMPLE),), generator=self._random)
        sampled = max(1, round(self.k * DGC_SAMPLE))
        threshold = torch.topk(magnitudes[at], sampled).values.min()
        indices = (magnitudes >= threshold).nonzero().view(-1)
        if indices.numel() > DGC_SLACK * self.k:
            indices = indices[torch.topk(magnitudes[indices], self.k).indices]
        return indices

    def parts(self, gradient: Tensor, measured: Callable[[str, float], None]) -> None:
        """Do by hand what compress() does, and what a receiver does, a stage at a time."""
        stage_s = [time.perf_counter()]
        picked = self._selector.select(gradient, self.k, residual=self._residual)
        stage_s.append(time.perf_counter())
        quantized = quantize(picked.values, "fp16")
        frame = encode_frame(gradient.numel(), picked.indices, quantized)
        stage_s.append(time.perf_counter())
        rest = torch.from_numpy(quantized.error(picked.values))
        update_residual(self._residual, gradient, picked.indices, rest)
        stage_s.append(time.perf_counter())
        received = decode_frame(frame, numel=gradient.numel())
        stage_s.append(time.perf_counter())
        received.add_to(self._out)
        stage_s.append(time.perf_counter())
        names = ("select", "encode", "update residual", "decode", "add to dense")
        for name, before_s, after_s in zip(names, stage_s, stage_s[1:], strict=False):
            measured(name, after_s - before_s)


def measure(numel: int, q: float, threads: int, warm_up: int, steps: int) -> list[Row]:
    """Return a row for each method and part at one q and number of threads."""
    torch.set_num_threads(threads)
    methods = Methods(numel, q)
    wholes = methods.wholes()
    times_s: dict[str, list[float]] = {name: [] for name in wholes}
    parts: set[str] = set()

    def measured(name: str, taken_s: float) -> None:
        parts.add(name)
        times_s.setdefault(name, []).append(taken_s)

    gradient, other = torch.empty(numel), torch.empty(numel)
    generator = torch.Generator().manual_seed(0)
    for step in range(warm_up + steps):
        # the slow ones need no warming up, ours starts with an empty residual
        names = list(wholes) if step >= warm_up - 1 else [MEMCPY, OURS]
        gradient.normal_(generator=generator)
        for name in names:
            # a copy of the gradient elsewhere: no method finds the caches as its own turn left them
            other.copy_(gradient)
            start_s = time.perf_counter()
            wholes[name](other)
            times_s[name].append(time.perf_counter() - start_s)
        methods.parts(gradient, measured)
    say(f"q = {q}, {threads} thread(s)")
    kept = {name: taken[-steps:] for name, taken in times_s.items()}
    median_s = {name: statistics.median(taken) for name, taken in kept.items()}
    return [
        Row(
            method=name,
            part=name in parts,
            q=q,
            threads=threads,
            times_s=taken,
            memcpys=median_s[name] / median_s[MEMCPY],
            of_topk=median_s[name] / median_s[TOPK],
        )
        for name, taken in kept.items()
    ]


def table(rows: Sequence[Row]) -> str:
    """Return one table a setting."""
    tables = []
    for q, threads in dict.fromkeys((row.q, row.threads) for row in rows):
        cells = {
            f"  {row.method}" if row.part else row.method: [
                f"{statistics.median(row.times_s) * 1e3:.2f} ms",
                f"{row.memcpys:.2f}",
                f"1/{1 / row.of_topk:.1f}",
            ]
            for row in rows
            if (row.q, row.threads) == (q, threads)
        }
        title = f"q = {q}, {threads} thread{'s' if threads > 1 else ''}"
        tables.append(text_table(title, ["median", "memcpys", "of torch.topk"], cells))
    return "\n\n".join(tables)


def draw(rows: Sequence[Row], numel: int, path: Path) -> None:
    """Draw the methods' medians in memcpys, a panel for each setting."""
    settings = list(dict.fromkeys((row.q, row.threads) for row in rows))
    figure, axes = plt.subplots(
        1, len(settings), figsize=(3.6 * len(settings) + 1.6, 3.2), sharey=True, squeeze=False
    )
    for axis, (q, threads) in zip(axes[0], settings, strict=True):
        shown = [row for row in rows if (row.q, row.threads) == (q, threads) and not row.part][::-1]
        bars = axis.barh(
            [row.method for row in shown],
            [row.memcpys for row in shown],
            color=[COLORS.get(row.method, OTHER_COLOR) for row in shown],
        )
        axis.bar_label(bars, fmt="%.1f", padding=3)
        axis.set_xscale("log")
        axis.set_xlim(0.5, 4 * max(row.memcpys for row in rows))
        axis.set_title(f"q = {q}, {threads} thread{'s' if threads > 1 else ''}", fontsize=10)
        axis.set_xlabel("memcpys (log scale)")
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"Top-k of {numel / 1e6:.2f} M fp32 elements; compress() is residual and coding included"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = option_parser(__doc__)
    parser.add_argument("--numel", type=integer_from(1000), default=6_553_600)
    parser.add_argument("--q", nargs="+", type=float, default=[0.99, 0.999])
    parser.add_argument("--threads", nargs="+", type=integer_from(1), default=[1])
    parser.add_argument("--warm-up", type=integer_from(1), default=60, help="steps not counted")
    parser.add_argument("--steps", type=integer_from(1), default=15, help="steps measured")
    options = parser.parse_args(argv)
    rows = [
        row
        for q in options.q
        for threads in options.threads
        for row in measure(options.numel, q, threads, options.warm_up, options.steps)
    ]
    report = {
        "benchmark": "selection",
        "machine": {"cores": os.cpu_count(), "torch": torch.__version__, "numpy": np.__version__},
        "settings": {"numel": options.numel, "warm_up": options.warm_up, "steps": options.steps},
        "rows": [asdict(row) for row in rows],
    }
    write_report(options.out, "selection", report)
    draw(rows, options.numel, options.out / "selection.png")
    print(table(rows))


if __name__ == "__main__":
    main()
