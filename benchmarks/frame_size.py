"""Size of a whole frame, header included, against the least that its content could take.

    python benchmarks/frame_size.py

The least is log2 C(n, k) bits for which k of n elements were sent, if any set is as likely as any
other, and the value format's bits for each. Random index sets of n = 25.56 M elements (ResNet-50).
Prints a table, writes runs/frame_size.json and runs/frame_size.png.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from harness.console import integer_from, option_parser, text_table, write_report

from topq_dist.compress.codec.frame import HEADER_BYTES, encode_frame, max_frame_bytes, peek_header
from topq_dist.compress.codec.values import LOW_BITS, VALUE_FORMATS, WHOLE, payload_bytes, quantize

mpl.use("Agg")
from matplotlib import pyplot as plt

NOMINAL_BITS = {name: 8 * dtype.itemsize for name, dtype in WHOLE.items()} | LOW_BITS


@dataclass(frozen=True, kw_only=True)
class Row:
    """Bytes of one frame; `over` is its excess over log2 C(n, k) + k nominal value bits, a share.

    `*_bits` are a value: of indices, what they need at least, what Elias-Fano coding takes, and of
    values with their scales. `slot_bytes` is what max_frame_bytes allows for any index set.
    """

    density: float
    k: int
    value_format: str
    index_coding: str
    frame_bytes: int
    slot_bytes: int
    over: float
    index_bits: float
    least_index_bits: float
    elias_fano_bits: float
    value_bits: float
    times_smaller_than_fp32: float


def log2_choices(n: int, k: int) -> float:
    """Return log2 C(n, k)."""
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)


def measure(numel: int, density: float, value_format: str, seed: int) -> Row:
    """Encode a random set of this density."""
    random = np.random.default_rng(seed)
    k = max(1, round(density * numel))
    indices = np.sort(random.choice(numel, k, replace=False, shuffle=False))
    values = torch.from_numpy(random.standard_normal(k, dtype=np.float32))
    frame = encode_frame(numel, torch.from_numpy(indices), quantize(values, value_format))
    header = peek_header(frame)
    least = log2_choices(numel, k)
    low_bits = max(0, math.floor(math.log2(numel / k)))
    return Row(
        density=density,
        k=k,
        value_format=value_format,
        index_coding=header.index_coding.name,
        frame_bytes=frame.numel(),
        slot_bytes=max_frame_bytes(numel, k, value_format),
        over=frame.numel() * 8 / (least + k * NOMINAL_BITS[value_format]) - 1,
        index_bits=header.index_bytes * 8 / k,
        least_index_bits=least / k,
        elias_fano_bits=low_bits + 1 + (numel >> low_bits) / k,
        value_bits=payload_bytes(k, value_format) * 8 / k,
        times_smaller_than_fp32=4 * numel / frame.numel(),
    )


def table(rows: Sequence[Row]) -> str:
    """Return one line a frame."""
    heads = ["frame", "over the bound", "index bits (least)", "value bits", "dense fp32 /"]
    cells = {
        f"{row.density * 100:g} %, {row.value_format}": [
            f"{row.frame_bytes / 1e6:.4f} MB",
            f"{row.over * 100:+.2f} %",
            f"{row.index_bits:.3f} ({row.least_index_bits:.3f})",
            f"{row.value_bits:.2f}",
            f"{row.times_smaller_than_fp32:.0f}",
        ]
        for row in rows
    }
    return text_table(f"density, values; header {HEADER_BYTES} bytes", heads, cells)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw bits an index against density, and each format's excess over the bound."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4))
    curve = [row for row in rows if row.value_format == rows[0].value_format]
    densities = [row.density for row in curve]
    left.plot(densities, [32.0] * len(curve), color="#b0b0b0", label="int32")
    left.plot(
        densities, [row.elias_fano_bits for row in curve], color="#e0a458", label="Elias-Fano"
    )
    left.plot(densities, [row.index_bits for row in curve], "o-", color="#c0392b", label="frame")
    left.plot(
        densities,
        [row.least_index_bits for row in curve],
        ":",
        color="#4d4d4d",
        label="log2 C(n, k) / k",
    )
    left.set_xscale("log")
    left.set_ylim(0, 34)
    left.set_xlabel("density k / n (log scale)")
    left.set_ylabel("bits an index")
    left.set_title("Which elements", fontsize=10)
    left.legend(frameon=False)

    shown = list(dict.fromkeys(row.value_format for row in rows))
    marks = [density for density in (0.01, 0.001) if density in densities]
    for place, density in enumerate(marks):
        overs = [
            row.over * 100
            for value in shown
            for row in rows
            if (row.density, row.value_format) == (density, value)
        ]
        at = np.arange(len(shown)) + 0.4 * place - 0.2
        bars = right.bar(
            at, overs, 0.38, color=("#3b6ea5", "#8fa9c4")[place], label=f"{density * 100:g} %"
        )
        right.bar_label(bars, fmt="%.1f", fontsize=7, padding=1)
    right.set_xticks(range(len(shown)), shown)
    right.set_ylabel("% over the bound")
    right.set_title("The whole frame, header and scales included", fontsize=10)
    right.legend(frameon=False)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = option_parser(__doc__)
    parser.add_argument("--numel", type=integer_from(1000), default=25_560_000)
    parser.add_argument(
        "--densities", nargs="+", type=float, default=[0.2, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0001]
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    rows = [
        measure(options.numel, density, value_format, options.seed)
        for density in options.densities
        for value_format in VALUE_FORMATS
    ]
    report = {
        "benchmark": "frame_size",
        "settings": {"numel": options.numel, "seed": options.seed},
        "rows": [asdict(row) for row in rows],
    }
    write_report(options.out, "frame_size", report)
    draw(rows, options.out / "frame_size.png")
    print(table(rows))


if __name__ == "__main__":
    main()
