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

Prints medians and GB/s of gradient; writes runs/device.json after each part, and beside it what the
other programs have said. Without a GPU it says so and exits with 2; `--dry-run` goes through all of
it on the CPU, small, with the kernels run by Triton's interpreter, but only collects the tests.
`--device cpu` has the second part alone.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from harness.console import integer_from, option_parser, say, text_table, write_report
from harness.waits import no_waits, synchronize
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
# of device_ddp.py, for a dry run
SMALL = (
    *("--device", "cpu", "--layers", "1", "--width", "8", "--context", "8", "--batch", "1"),
    *("--vocabulary", "16", "--warm-up", "1", "--steps", "1"),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """Seconds of each measured step of one method; `copies` is a ratio of medians."""

    method: str
    numel: int
    q: float
    times_s: list[float]
    gradient_gb_per_s: float
    copies: float


def measure(
    device: torch.device, numel: int, q: float, warm_up: int, steps: int, ends_s: float
) -> list[Row]:
    """Return a row for each method at one size and q, of fewer steps if time runs out."""
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
        if step > warm_up and time.monotonic() > ends_s:
            break
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


def tested(limit_s: float, out: Path, dry_run: bool) -> str:
    """Run the tests of the kernels and of the hook on the GPU; return how that ended."""
    folders = ["tests/compress/gpu", "tests/ddp/test_hook_on_device.py", "tests/exchange"]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", *folders]
    if dry_run:
        return told([*command, "--collect-only"], limit_s, {}, out / "device_tests.txt")
    return told(command, limit_s, {"TOPQ_TEST_DEVICE": "cuda"}, out / "device_tests.txt")


def told(command: Sequence[str], limit_s: float, more: Mapping[str, str], log: Path) -> str:
    """Run a command for so long at most, its output in a file; return its last line."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        # a group of its own, since what it has started may hold the device
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **more}, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(max(1.0, limit_s))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"no end within {limit_s:.0f} s"
    lines = log.read_text().strip().splitlines() or ["nothing"]
    return f"{lines[-1]} (exit {process.returncode})"


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
    parser.add_argument("--dry-run", action="store_true", help="all of it, small, on the CPU")
    options = parser.parse_args(argv)
    if options.dry_run:
        # before anything imports triton
        os.environ |= {"TRITON_INTERPRET": "1", "TOPQ_GPU": "interpret"}
        options.device, options.numel, options.q = torch.device("cpu"), [2000], [0.99]
        options.warm_up, options.steps = 2, 2
    if options.device.type == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("device.py: no CUDA device here: expected one, or --device cpu\n")
        sys.exit(2)
    on_gpu = options.device.type == "cuda"
    ends_s = time.monotonic() + options.limit_s
    ended: dict[str, str] = {}
    report: dict[str, Any] = {
        "benchmark": "device",
        "machine": {
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "torch": torch.__version__,
        },
        "settings": {"warm_up": options.warm_up, "steps": options.steps},
        "engine_on_device": engine.runs_on(options.device),
        "ended": ended,
        "rows": [],
    }
    rows: list[Row] = []

    def note(what: str, how: str) -> None:
        # what there is by now is kept, whatever comes
        ended[what] = how
        report["rows"] = [asdict(row) for row in rows]
        report["left_s"] = ends_s - time.monotonic()
        write_report(options.out, "device", report)
        say(f"{what}: {how}")

    if on_gpu or options.dry_run:
        note("tests", tested(0.4 * options.limit_s, options.out, options.dry_run))
    measured_until_s = ends_s - 0.3 * options.limit_s
    for numel in options.numel:
        for q in options.q:
            how = "measured"
            if time.monotonic() > measured_until_s:
                how = "left out: no time"
            else:
                try:
                    rows += measure(
                        options.device, numel, q, options.warm_up, options.steps, measured_until_s
                    )
                except RuntimeError as error:
                    # out of memory, or a wait for the device
                    how = f"left out: {error}".splitlines()[0]
            note(f"{numel} elements, q = {q}", how)
    if on_gpu:
        torch.cuda.empty_cache()
    for ranks in (1, 2) if on_gpu or options.dry_run else ():
        command = [sys.executable, "benchmarks/device_ddp.py", "--ranks", str(ranks), "--trace"]
        command += ["--out", str(options.out.resolve()), *(SMALL if options.dry_run else ())]
        left_s = (ends_s - time.monotonic()) / (3 - ranks)
        log = options.out / f"device_ddp_{ranks}.txt"
        note(f"device_ddp, ranks = {ranks}", told(command, left_s, {}, log))
    print(table(rows))


if __name__ == "__main__":
    main()
