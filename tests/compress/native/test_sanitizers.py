"""Kernels that read what came over a wire, under AddressSanitizer and UndefinedBehaviorSanitizer.

TOPQ_FUZZ_FRAMES: how many damaged frames they are to read.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from native_build import compile_kernels, compilers

from topq_dist.compress.codec.frame import encode_frame
from topq_dist.compress.codec.values import CODED, VALUE_FORMATS, quantize

DRIVER = Path(__file__).with_name("fuzz_driver.c")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1")


def built(out: Path, *extra: str) -> Path:
    """Return the driver with the kernels, under sanitizers; skips where no compiler has them."""
    said = "no compiler"
    for compiler in compilers():
        done = compile_kernels(compiler, out, *SANITIZERS, *extra, sources=[DRIVER])
        if not done.returncode:
            return out
        said = done.stderr
    pytest.skip(f"no compiler here has sanitizers: {said[-200:]}")


def frames() -> bytes:
    """Return frames of all kinds, each behind its length."""
    generator = np.random.default_rng(0)
    stream = b""
    for value_format in VALUE_FORMATS:
        sizes = [(64, 1), (5_000, 40), (60_000, 30), (2_000, 700), (40_000, 1_500)]
        # of 4 lanes, and of 16
        sizes += [(40_000, 4_500), (99_000, 17_000)] if value_format in CODED[-1:] else []
        for numel, k in sizes:
            for segments in (1, 7):
                indices = np.sort(generator.choice(numel, k, replace=False))
                edges = np.sort(generator.integers(0, k, segments - 1))
                quantized = quantize(
                    torch.from_numpy(generator.standard_normal(k)),
                    value_format,
                    segment_ks=np.diff(edges, prepend=0, append=k),
                )
                frame = encode_frame(numel, torch.from_numpy(indices), quantized)
                sent = frame.numpy().tobytes().ljust(44, b"\0")
                stream += len(sent).to_bytes(4, "little") + sent
    return stream


def run(driver: Path, count: int) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [driver, str(count), "1"], input=frames(), capture_output=True, timeout=170, check=False
    )


def test_damaged_frames_are_read_without_a_step_outside(tmp_path: Path) -> None:
    count = int(os.environ.get("TOPQ_FUZZ_FRAMES", "20000"))
    done = run(built(tmp_path / "driver"), count)
    assert (done.returncode, done.stderr) == (0, b"")
    # they are not all refused at once
    taken = [int(word) for word in done.stdout.decode().replace(",", "").split() if word.isdigit()]
    assert min(taken) > count // 100


def test_a_broken_bound_is_reported(tmp_path: Path) -> None:
    done = run(built(tmp_path / "driver", "-DTOPQ_BREAK_A_BOUND"), 20_000)
    assert done.returncode
    assert b"heap-buffer-overflow" in done.stderr
    assert b"topq_read_gaps" in done.stderr
