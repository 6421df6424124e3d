"""The time that the hook adds to a DDP step on one GPU: a GPT of 124 M parameters, NCCL, one rank.

    python benchmarks/device_ddp.py

bf16 autocast, AdamW, 8 sequences of 1,024 random tokens; with one rank nothing crosses a link, so
what is measured is the work beside the backward pass. Dense, fp16_compress_hook, PowerSGD rank 1
and top-Q in turn, each on a model made anew; prints medians and what each adds to dense, writes
runs/device_ddp.json. `--ranks 2` has as many processes share the GPU, with gloo between them, and
writes runs/device_ddp_2.json; PowerSGD is not run there. `--trace` writes one more step of each as
runs/device_ddp_*_trace.json, which Perfetto shows. Without a GPU it says so and exits with 2; with
`--device cpu --layers 1 --width 64` it runs all the same, on gloo.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from harness.console import integer_from, option_parser, say, text_table, write_report
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.multiprocessing.spawn import start_processes
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from topq_dist import register_topq_hook

VOCABULARY, HEAD_WIDTH = 50_304, 64


class Gpt(nn.Module):
    """A decoder whose embedding and head share their weight, as GPT-2's do."""

    def __init__(self, layers: int, width: int, context: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
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
        "fp16_compress_hook": lambda model: model.register_comm_hook(
            None, default_hooks.fp16_compress_hook
        ),
        "PowerSGD rank 1": lambda model: model.register_comm_hook(
            powerSGD_hook.PowerSGDState(None, 1, start_powerSGD_iter=2),
            powerSGD_hook.powerSGD_hook,
        ),
        "topq_dist, q = 0.99": lambda model: register_topq_hook(
            model, q=0.99, value_format="fp16", exchange="allgather"
        ),
        "topq_dist, q = 0.97, int2": lambda model: register_topq_hook(
            model, q=0.97, value_format="int2", exchange="allgather"
        ),
    }


def measure(
    name: str, register: Callable[[DistributedDataParallel], Any], options: argparse.Namespace
) -> tuple[list[float], int]:
    """Return the seconds of each measured step and the peak of device memory in bytes."""
    device: torch.device = options.device
    torch.manual_seed(0)
    model = Gpt(options.layers, options.width, options.context).to(device)
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    register(ddp)
    generator = torch.Generator(device).manual_seed(1)
    shape = (options.batch, options.context)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def take_step() -> None:
        ids = torch.randint(VOCABULARY, shape, generator=generator, device=device)
        with torch.autocast(device.type, torch.bfloat16):
            logits = ddp(ids)
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), ids.roll(-1, 1).flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    times_s = []
    for step in range(options.warm_up + options.steps):
        synchronize(device)
        start_s = time.perf_counter()
        take_step()
        synchronize(device)
        if step >= options.warm_up:
            times_s.append(time.perf_counter() - start_s)
    if options.trace and dist.get_rank() == 0:
        # the others take the step as well
        options.out.mkdir(parents=True, exist_ok=True)
        with torch.profiler.profile() as profile:
            take_step()
            synchronize(device)
        what = "".join(letter if letter.isalnum() else "_" for letter in name)
        path = options.out / f"device_ddp_{options.ranks}_{what}_trace.json"
        profile.export_chrome_trace(str(path))
    elif options.trace:
        take_step()
    return times_s, torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def synchronize(device: torch.device) -> None:
    """Wait until the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(argv: list[str] | None = None) -> None:
    parser = option_parser(__doc__)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--layers", type=integer_from(1), default=12)
    parser.add_argument("--width", type=integer_from(64), default=768)
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
    rows: dict[str, tuple[list[float], int]] = {}
    for name, register in methods().items():
        if store is not None and name.startswith("PowerSGD"):
            continue
        times_s, peak_bytes = measure(name, register, options)
        rows[name] = times_s, peak_bytes
        if rank == 0:
            say(f"{name}: {statistics.median(times_s) * 1e3:.1f} ms")
    dist.destroy_process_group()
    if rank:
        return
    name = "device_ddp" if options.ranks == 1 else f"device_ddp_{options.ranks}"
    report = {
        "benchmark": name,
        "machine": {
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "torch": torch.__version__,
        },
        "settings": {k: str(v) for k, v in vars(options).items() if k != "out"},
        "rows": {n: {"times_s": t, "peak_bytes": p} for n, (t, p) in rows.items()},
    }
    write_report(options.out, name, report)
    median_ms = {name: 1e3 * statistics.median(times_s) for name, (times_s, _) in rows.items()}
    cells = {
        name: [
            f"{median_ms[name]:.1f} ms",
            f"{median_ms[name] - median_ms['dense']:+.1f} ms",
            f"{peak_bytes / 1e9:.2f} GB",
        ]
        for name, (_, peak_bytes) in rows.items()
    }
    title = f"GPT, {options.layers} layers of {options.width}, {options.ranks} rank(s)"
    print(text_table(title, ["step", "over dense", "peak memory"], cells))


if __name__ == "__main__":
    main()
