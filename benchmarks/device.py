"""Everything about the engine on a GPU, in one run of eight minutes at most.

    python benchmarks/device.py

First the tests of the kernels and of the hook, on the GPU. Then the cost of a step's stages there,
beside compress(), torch.topk, the sampled threshold of DGC and a copy on the device: fp32 gradients
of 25 M, 125 M and 1,000 M elements, drawn anew each step. A step's stages are selection of gradient
and residual, two-bit values bounded as by default, the slot, its checks, the residual's update and
the average, with an error for whatever waits for the device; compress() adds the residual, selects,
codes fp16 values and keeps what was not sent, and its frame ends on the CPU. All take turns within
a step, with the device idle before and after each. Last what the hook adds to a DDP step
(device_ddp.py), one rank with NCCL and two with gloo on the one GPU. What there is no time for is
left out, and said.

Prints medians and GB/s of gradient, writes runs/device.json. Without a GPU it says so and exits
with 2; `--device cpu` runs the second part all the same, and with TRITON_INTERPRET=1 and
TOPQ_GPU=interpret the kernels in it too, by numpy: small sizes alone.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from harness.console import integer_from, option_parser, say, text_table, write_report
from torch import Tensor

from topq_dist import Compressor
from topq_dist.compress.compressor import TopKCompressor
from topq_dist.compress.gpu import engine
from topq_dist.compress.layout import Layout
from topq_dist.compress.sparsify.segments import uniform_segments

COPY, OURS, TOPK = "copy on the device", "compress()", "torch.topk"
STAGES, SAMPLED = "a step's stages on the device", "sampled threshold (DGC)"
ROOT = Path(__file__).parents[1]
_SAMPLED_FRACTION = 0.01


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
        SAMPLED: lambda: sampled_threshold(gradient, k),
    }
    if engine.runs_on(device):
        methods[STAGES] = stages(gradient, q)
    times_s: dict[str, list[float]] = {name: [] for name in methods}
    generator = torch.Generator(device).manual_seed(0)
    for step in range(warm_up + steps):
        gradient.normal_(generator=generator)
        for name, method in methods.items():
            synchronize(device)
            start_s = time.perf_counter()
            with no_waits(device, name == STAGES and step >= warm_up):
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


def stages(gradient: Tensor, q: float) -> Callable[[], object]:
    """Return what does to a copy of a gradient all that a step does, of a world of one rank."""
    from topq_dist.compress.device_compressor import DeviceCompressor, slot_bytes

    device, numel = gradient.device, gradient.numel()
    settings = TopKCompressor(value_format="int2", error_feedback=True, bound=1.0)
    compressor = DeviceCompressor(settings, device)
    layout = Layout(names=("gradient",), shapes=((numel,),))
    segments = uniform_segments([numel], q=q, scope="parameter")
    nothing = torch.zeros(2, dtype=torch.float64, device=device)
    report = torch.zeros(1, dtype=torch.int64, device=device)
    bucket = torch.empty_like(gradient)
    slots: list[Tensor] = []

    def step() -> None:
        # its copy is not a part of the step: see `copies`, of which it is one
        bucket.copy_(gradient)
        selected = compressor.compress(bucket, layout, segments).on_device
        if selected is None:
            raise RuntimeError("nothing was selected on the device")
        if not slots:
            length = slot_bytes(selected.shape)
            slots.append(torch.zeros((1, length), dtype=torch.uint8, device=device))
        report.zero_()
        written = compressor.write(selected, slots[0][0], 0, nothing)
        heads = compressor.check(selected, slots[0], report)
        compressor.finish(selected, written, slots[0], heads, report)
        compressor.rejoin(device)

    return step


def sampled_threshold(gradient: Tensor, k: int) -> Tensor:
    """Return about k indices, as deep gradient compression finds them: by a sample's threshold."""
    magnitudes = gradient.abs()
    count = max(1, int(_SAMPLED_FRACTION * gradient.numel()))
    sample = magnitudes[torch.randint(gradient.numel(), (count,), device=gradient.device)]
    kth = max(1, round(k * _SAMPLED_FRACTION))
    threshold = sample.topk(min(kth, count), sorted=True).values[-1]
    return (magnitudes >= threshold).nonzero()


@contextmanager
def no_waits(device: torch.device, refused: bool) -> Iterator[None]:
    """Have whatever waits for the device within the block be an error, where that is asked for."""
    if device.type == "cuda" and refused:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def tested(limit_s: float) -> str:
    """Run the tests of the kernels and of the hook on the GPU; return how that ended."""
    folders = ["tests/compress/gpu", "tests/ddp/test_hook_on_device.py", "tests/exchange"]
    return told(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", *folders],
        limit_s,
        {"TOPQ_TEST_DEVICE": "cuda"},
    )


def told(command: Sequence[str], limit_s: float, more: Mapping[str, str]) -> str:
    """Run a command for so long at most, and return the last line that it prints."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **more}, capture_output=True, text=True,
            timeout=max(1.0, limit_s), check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"no end within {limit_s:.0f} s"
    lines = (done.stdout.strip() or done.stderr.strip() or "nothing").splitlines()
    return f"{lines[-1]} (exit {done.returncode})"


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
        "--numel",
        nargs="+",
        type=integer_from(1000),
        default=[25_000_000, 125_000_000, 1_000_000_000],
    )
    parser.add_argument("--limit-s", type=integer_from(1), default=480, help="seconds, all told")
    parser.add_argument("--q", nargs="+", type=float, default=[0.99, 0.999])
    parser.add_argument("--warm-up", type=integer_from(1), default=10, help="steps not counted")
    parser.add_argument("--steps", type=integer_from(1), default=15, help="steps measured")
    options = parser.parse_args(argv)
    if options.device.type == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("device.py: no CUDA device here: expected one, or --device cpu\n")
        sys.exit(2)
    on_gpu = options.device.type == "cuda"
    ends_s = time.monotonic() + options.limit_s
    ended = {"tests": tested(0.4 * options.limit_s)} if on_gpu else {}
    rows = []
    for numel in options.numel:
        for q in options.q:
            if time.monotonic() > ends_s - 0.3 * options.limit_s:
                ended[f"{numel} elements, q = {q}"] = "left out: no time"
                continue
            try:
                rows += measure(options.device, numel, q, options.warm_up, options.steps)
            except torch.OutOfMemoryError as error:
                ended[f"{numel} elements, q = {q}"] = f"left out: {error}".splitlines()[0]
    for ranks in (1, 2) if on_gpu else ():
        command = [sys.executable, "benchmarks/device_ddp.py", "--ranks", str(ranks), "--trace"]
        left_s = (ends_s - time.monotonic()) / (3 - ranks)
        ended[f"device_ddp, ranks = {ranks}"] = told(command, left_s, {})
    for what, how in ended.items():
        say(f"{what}: {how}")
    name = torch.cuda.get_device_name() if options.device.type == "cuda" else "cpu"
    report = {
        "benchmark": "device",
        "machine": {"device": name, "torch": torch.__version__},
        "settings": {"warm_up": options.warm_up, "steps": options.steps},
        "engine_on_device": engine.runs_on(options.device),
        "ended": ended,
        "rows": [asdict(row) for row in rows],
    }
    write_report(options.out, "device", report)
    print(table(rows))


if __name__ == "__main__":
    main()
