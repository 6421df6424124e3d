"""Size of a whole frame, header included, against the least that its content could take.

    python benchmarks/frame_size.py [--distribution laplace]

The least is log2 C(n, k) bits for which k of n elements were sent, if any set is as likely as any
other, and for the values the format's bits, or of an entropy-coded format the entropy of what it
codes and the bits that it leaves as they are. The k largest of n = 25.56 M random elements
(ResNet-50). Rounding errors are squared and relative to what was sent; times, of the entropy-coded
formats alone, are quantizing with encoding, and decoding, beside those of the format of fixed width
that they are compared with, of the processor, one thread, the best of some runs in turn. SparseLoCo
(arXiv:2508.15706) sends 14 bits a value, 146 x fewer at 1.5625 %. Prints a table, writes
runs/frame_size.json and runs/frame_size.png.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import torch
from harness.console import integer_from, option_parser, text_table, write_report

from topq_dist.compress.codec.coded import STEP_RATIOS, levels_in
from topq_dist.compress.codec.frame import (
    HEADER_BYTES,
    decode_frame,
    encode_frame,
    max_frame_bytes,
    peek_header,
)
from topq_dist.compress.codec.values import (
    CODED,
    LOW_BITS,
    VALUE_FORMATS,
    WHOLE,
    Quantized,
    quantize,
)

mpl.use("Agg")
from matplotlib import pyplot as plt

NOMINAL_BITS = {name: 8 * dtype.itemsize for name, dtype in WHOLE.items()} | LOW_BITS
# of fixed width, what the entropy-coded formats are beside
FIXED = {"ec1": "int2", "ec2": "int2", "ecfp16": "fp16", "ecbf16": "bf16"}
DRAWS: dict[str, Callable[[np.random.Generator, int], npt.NDArray[np.floating]]] = {
    "normal": lambda random, size: random.standard_normal(size, dtype=np.float32),
    "laplace": lambda random, size: random.laplace(size=size),
    "student": lambda random, size: random.standard_t(3, size),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """Bytes of one frame; `over` is its excess over log2 C(n, k) + k * least_value_bits, a share.

    `*_bits` are a value: of indices, what they need at least, what Elias-Fano coding takes, and of
    values with their scales, what they need at least. `slot_bytes` is what max_frame_bytes allows
    for any index set. `error` is the rounding error, `lost` the part of the whole vector's energy
    that it is. `*_times` are times over those of `FIXED`, None where there is none.
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
    least_value_bits: float
    error: float
    lost: float
    encode_times: float | None
    decode_times: float | None
    times_smaller_than_fp32: float


def log2_choices(n: int, k: int) -> float:
    """Return log2 C(n, k)."""
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)


def least_value_bits(quantized: Quantized) -> float:
    """Return the bits that a value needs at least."""
    value_format, k = quantized.value_format, quantized.decoded.numel()
    if value_format not in CODED:
        return NOMINAL_BITS[value_format]
    counts = np.bincount(levels_in(quantized.payload, k, halves=value_format not in STEP_RATIOS))
    shares = counts[counts > 0] / k
    # beside a sign, or the half that is not coded
    return -float((shares * np.log2(shares)).sum()) + (1 if value_format in STEP_RATIOS else 8)


def times_over(numel: int, indices: torch.Tensor, values: torch.Tensor, name: str) -> list[float]:
    """Return the times of encoding and of decoding over those of the fixed format."""
    best: dict[str, list[float]] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(max(5, min(40, 4_000_000 // values.numel()))):
            for one in (name, FIXED[name]):
                started_s = time.process_time()
                frame = encode_frame(numel, indices, quantize(values, one))
                encoded_s = time.process_time()
                decode_frame(frame, numel=numel)
                ended_s = time.process_time()
                took = [encoded_s - started_s, ended_s - encoded_s]
                best[one] = [min(pair) for pair in zip(best.get(one, took), took, strict=True)]
    finally:
        torch.set_num_threads(threads)
    return [ours / fixed for ours, fixed in zip(best[name], best[FIXED[name]], strict=True)]


def measure(vector: npt.NDArray[np.float32], density: float, value_format: str) -> Row:
    """Encode the largest part of this density."""
    numel = vector.size
    k = max(1, round(density * numel))
    chosen = np.sort(np.argpartition(np.abs(vector), numel - k)[numel - k :])
    indices, values = torch.from_numpy(chosen), torch.from_numpy(vector[chosen])
    quantized = quantize(values, value_format)
    frame = encode_frame(numel, indices, quantized)
    header = peek_header(frame)
    least, value_bits = log2_choices(numel, k), least_value_bits(quantized)
    low_bits = max(0, math.floor(math.log2(numel / k)))
    sent, lost = (
        float(np.square(part, dtype=np.float64).sum())
        for part in (vector[chosen], quantized.error(values))
    )
    encode_times, decode_times = (
        times_over(numel, indices, values, value_format) if value_format in FIXED else (None, None)
    )
    return Row(
        density=density,
        k=k,
        value_format=value_format,
        index_coding=header.index_coding.name,
        frame_bytes=frame.numel(),
        slot_bytes=max_frame_bytes(numel, k, value_format),
        over=frame.numel() * 8 / (least + k * value_bits) - 1,
        index_bits=header.index_bytes * 8 / k,
        least_index_bits=least / k,
        elias_fano_bits=low_bits + 1 + (numel >> low_bits) / k,
        value_bits=header.value_bytes * 8 / k,
        least_value_bits=value_bits,
        error=lost / sent,
        lost=lost / float(np.square(vector, dtype=np.float64).sum()),
        encode_times=encode_times,
        decode_times=decode_times,
        times_smaller_than_fp32=4 * numel / frame.numel(),
    )


def table(rows: Sequence[Row]) -> str:
    """Return one line a frame."""
    heads = ["frame", "over the bound", "index bits (least)", "value bits (least)", "error"]
    heads += ["encode", "decode", "dense fp32 /"]
    cells = {
        f"{row.density * 100:g} %, {row.value_format}": [
            f"{row.frame_bytes / 1e6:.4f} MB",
            f"{row.over * 100:+.2f} %",
            f"{row.index_bits:.3f} ({row.least_index_bits:.3f})",
            f"{row.value_bits:.3f} ({row.least_value_bits:.3f})",
            f"{row.error:.1e}",
            "" if row.encode_times is None else f"{row.encode_times:.2f} x",
            "" if row.decode_times is None else f"{row.decode_times:.2f} x",
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
        "--densities", nargs="+", type=float, default=[0.2, 0.1, 0.03, 0.015625, 0.01, 0.003, 0.001]
    )
    parser.add_argument("--distribution", choices=list(DRAWS), default="normal")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    random = np.random.default_rng(options.seed)
    vector = DRAWS[options.distribution](random, options.numel).astype(np.float32)
    rows = [
        measure(vector, density, value_format)
        for density in options.densities
        for value_format in VALUE_FORMATS
    ]
    report = {
        "benchmark": "frame_size",
        "settings": {
            "numel": options.numel,
            "seed": options.seed,
            "distribution": options.distribution,
        },
        "rows": [asdict(row) for row in rows],
    }
    write_report(options.out, "frame_size", report)
    draw(rows, options.out / "frame_size.png")
    print(table(rows))


if __name__ == "__main__":
    main()
