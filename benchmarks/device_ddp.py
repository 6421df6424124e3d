"""The time that the hook adds to a DDP step on one GPU: a GPT of 124 M parameters, NCCL, one rank.

    python benchmarks/device_ddp.py

bf16 autocast, AdamW, 8 sequences of 1,024 random tokens; with one rank nothing crosses a link, so
what is measured is the work beside the backward pass. Dense, top-Q, fp16_compress_hook and PowerSGD
rank 1 in turn, each on a model made anew; prints medians and what each adds to dense, writes
runs/device_ddp.json after each. With NCCL, whatever waits for the device in a measured backward
pass of top-Q is an error, and that is what is reported of it. `--ranks 2` has as many processes
share the GPU, with gloo between them, and writes runs/device_ddp_2.json; PowerSGD is not run there.
`--trace` writes one more backward pass of each as runs/device_ddp_*_trace.json, which Perfetto
shows, and reports how long the stream of the backward pass has stood still in it. Without a GPU it
says so and exits with 2; with `--device cpu --layers 1 --width 64` it runs all the same, on gloo.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from harness.console import integer_from, option_parser, say, text_table, write_report
from harness.waits import no_waits, synchronize
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.multiprocessing.spawn import start_processes
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from topq_dist import register_topq_hook

HEAD_WIDTH = 64
OURS = "topq_dist"


@dataclass(frozen=True, kw_only=True)
class Row:
    """Seconds of each measured step of one method, and the peak of device memory in bytes.

    idle_us: how long the stream of the traced backward pass stood still, all told and at most;
    None without a trace, or without a stream.
    """

    times_s: list[float]
    peak_bytes: int
    idle_us: tuple[float, float] | None


class Gpt(nn.Module):
    """A decoder whose embedding and head share their weight, as GPT-2's do."""

    def __init__(self, layers: int, width: int, context: int, vocabulary: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, max(1, width // HEAD_WIDTH), 4 * width, 0.0, "gelu", batch_first=True,
                norm_first=True,
            )
            for _ in range(layers)
        )  # fmt: skip
        self.norm = nn.LayerNorm(width)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context))
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.tokens(ids) + self.places.weight
        for block in self.blocks:
            hidden = block(hidden, src_mask=self.mask, is_causal=True)
        return functional.linear(self.norm(hidden), self.tokens.weight)


def methods() -> dict[str, Callable[[DistributedDataParallel], Any]]:
    """Return by name what registers each method's hook."""
    return {
        "dense": lambda _: None,
        f"{OURS}, q = 0.99": lambda model: register_topq_hook(
            model, q=0.99, value_format="fp16", exchange="allgather"
        ),
        f"{OURS}, q = 0.97, int2": lambda model: register_topq_hook(
            model, q=0.97, value_format="int2", exchange="allgather"
        ),
        "fp16_compress_hook": lambda model: model.register_comm_hook(
            None, default_hooks.fp16_compress_hook
        ),
        "PowerSGD rank 1": lambda model: model.register_comm_hook(
            powerSGD_hook.PowerSGDState(None, 1, start_powerSGD_iter=2),
            powerSGD_hook.powerSGD_hook,
        ),
    }


def measure(
    name: str, register: Callable[[DistributedDataParallel], Any], options: argparse.Namespace
) -> Row:
    """Measure the steps of one method."""
    device: torch.device = options.device
    torch.manual_seed(0)
    model = Gpt(options.layers, options.width, options.context, options.vocabulary).to(device)
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    register(ddp)
    generator = torch.Generator(device).manual_seed(1)
    shape = (options.batch, options.context)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    # a collective of gloo is the host's, which waits for what it sends
    refused = name.startswith(OURS) and device.type == "cuda" and options.ranks == 1

    def forward() -> Tensor:
        ids = torch.randint(options.vocabulary, shape, generator=generator, device=device)
        with torch.autocast(device.type, torch.bfloat16):
            logits = ddp(ids)
        return functional.cross_entropy(logits.flatten(0, 1).float(), ids.roll(-1, 1).flatten())

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    times_s = []
    for step in range(options.warm_up + options.steps):
        synchronize(device)
        start_s = time.perf_counter()
        loss = forward()
        with no_waits(device, refused and step >= options.warm_up):
            loss.backward()  # type: ignore[no-untyped-call]
        update()
        synchronize(device)
        if step >= options.warm_up:
            times_s.append(time.perf_counter() - start_s)
    idle_us = None
    if options.trace:
        loss = forward()
        synchronize(device)
        # the others take the step as well
        writes = dist.get_rank() == 0
        traced: AbstractContextManager[Any] = nullcontext()
        if writes:
            traced = torch.profiler.profile()
        with traced as profile:
            loss.backward()  # type: ignore[no-untyped-call]
            synchronize(device)
        update()
        if profile is not None:
            what = "".join(letter if letter.isalnum() else "_" for letter in name)
            path = options.out / f"device_ddp_{options.ranks}_{what}_trace.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(path))
            idle_us = idle_of(json.loads(path.read_text())["traceEvents"])
    peak_bytes = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return Row(times_s=times_s, peak_bytes=peak_bytes, idle_us=idle_us)


def idle_of(events: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    """Return for how many microseconds the busiest stream of a trace stood still between kernels.

    All told, and the longest of them; None where no kernel ran.
    """
    streams: dict[Any, list[tuple[float, float]]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "kernel":
            start = float(event["ts"])
            streams[event["args"]["stream"]].append((start, start + float(event["dur"])))
    if not streams:
        return None
    busiest = sorted(max(streams.values(), key=lambda spans: sum(b - a for a, b in spans)))
    gaps = [max(0.0, after - stop) for (_, stop), (after, _) in pairwise(busiest)]
    return sum(gaps), max(gaps, default=0.0)


def main(argv: list[str] | None = None) -> None:
    parser = option_parser(__doc__)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--layers", type=integer_from(1), default=12)
    parser.add_argument("--width", type=integer_from(8), default=768)
    parser.add_argument("--vocabulary", type=integer_from(2), default=50_304)
    parser.add_argument("--context", type=integer_from(8), default=1024)
    parser.add_argument("--batch", type=integer_from(1), default=8)
    parser.add_argument(
        "--ranks", type=integer_from(1), default=1, help="with more than one, gloo on one device"
    )
    parser.add_argument("--trace", action="store_true", help="write a step of each method's trace")
    parser.add_argument("--warm-up", type=integer_from(1), default=6, help="steps not counted")
    parser.add_argument("--steps", type=integer_from(1), default=10, help="steps measured")
    options = parser.parse_args(argv)
    on_gpu = options.device.type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        sys.stderr.write("device_ddp.py: no CUDA device here: expected one, or --device cpu\n")
        sys.exit(2)
    if options.ranks == 1:
        run(0, options, None)
        return
    with tempfile.TemporaryDirectory() as folder:
        arguments = options, str(Path(folder) / "store")
        start_processes(run, arguments, options.ranks)  # type: ignore[no-untyped-call]


def run(rank: int, options: argparse.Namespace, store: str | None) -> None:
    """Measure every method as one of the ranks; the first one reports."""
    on_gpu = options.device.type == "cuda"
    if store is None:
        backend = "nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        shared = dist.FileStore(store, options.ranks)
        dist.init_process_group("gloo", store=shared, rank=rank, world_size=options.ranks)
    rows: dict[str, Row] = {}
    failed: dict[str, str] = {}
    for name, register in methods().items():
        if store is not None and name.startswith("PowerSGD"):
            continue
        try:
            rows[name] = measure(name, register, options)
        except RuntimeError as error:
            if store is not None:
                # the other ranks would wait for this one
                raise
            failed[name] = f"{error}".splitlines()[0]
        if rank == 0:
            took_s = statistics.median(rows[name].times_s) if name in rows else float("nan")
            say(f"{name}: {failed.get(name, f'{took_s * 1e3:.1f} ms')}")
            report(options, rows, failed)
    dist.destroy_process_group()
    if rank or "dense" not in rows:
        return
    median_ms = {name: 1e3 * statistics.median(row.times_s) for name, row in rows.items()}
    cells = {
        name: [
            f"{median_ms[name]:.1f} ms",
            f"{median_ms[name] - median_ms['dense']:+.1f} ms",
            f"{row.peak_bytes / 1e9:.2f} GB",
            "-" if row.idle_us is None else f"{row.idle_us[0]:.0f} us, {row.idle_us[1]:.0f} us",
        ]
        for name, row in rows.items()
    }
    title = f"GPT, {options.layers} layers of {options.width}, {options.ranks} rank(s)"
    print(text_table(title, ["step", "over dense", "peak memory", "idle, longest"], cells))


def report(options: argparse.Namespace, rows: Mapping[str, Row], failed: Mapping[str, str]) -> None:
    """Write what there is."""
    name = "device_ddp" if options.ranks == 1 else f"device_ddp_{options.ranks}"
    on_gpu = options.device.type == "cuda"
    machine = {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
    }
    settings = {key: str(value) for key, value in vars(options).items() if key != "out"}
    found = {"benchmark": name, "machine": machine, "settings": settings, "failed": failed}
    rows_found = {name: asdict(row) for name, row in rows.items()}
    write_report(options.out, name, {**found, "rows": rows_found})


if __name__ == "__main__":
    main()
