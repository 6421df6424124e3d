"""The engine without compiled kernels: it says so once, and makes the same frames and numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from topq_dist.compress.native import library

# all that leaves the engine, of three steps of every format and dtype, in sums of two workers
PROGRAM = """
import hashlib, torch
from topq_dist import Compressor
from topq_dist.compress.aggregate import average
from topq_dist.compress.codec.values import VALUE_FORMATS

digest = hashlib.sha256()
for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
    for value_format in VALUE_FORMATS:
        for numel, q in ((5, 0.5), (4_097, 0.9), (20_000, 0.99)):
            generator = torch.Generator().manual_seed(numel)
            workers = [Compressor(q=q, value_format=value_format) for _ in range(2)]
            for step in range(3):
                frames = []
                for worker in workers:
                    drawn = torch.randn(numel, generator=generator, dtype=torch.float64)
                    # with ties, zeros and, once, all zeros
                    drawn = drawn.mul_(4).round_() if step else drawn
                    drawn[numel // 2 :] *= 0 if step == 2 else 1e-3
                    frames.append(worker.compress("w", drawn.to(dtype)).clone())
                mean = average(frames, out=torch.empty(numel, dtype=dtype))
                owed = [residual for worker in workers for residual in worker.state_dict().values()]
                for tensor in (*frames, mean, *owed):
                    digest.update(tensor.view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def run(**environment: str) -> tuple[str, str]:
    """Return what the program printed, and what it was told."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM],
        env={**os.environ, "TOPQ_NATIVE": "", **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=170,
    )
    return done.stdout, done.stderr


@pytest.mark.skipif(library.LIBRARY is None, reason="there is no library to compare with")
def test_numpy_makes_the_same_frames_and_says_once_that_it_does() -> None:
    compiled, silence = run()
    assert silence == ""
    by_numpy, said = run(TOPQ_NATIVE="0")
    assert by_numpy == compiled
    assert said.count("numpy") == said.count("TOPQ_NATIVE=0") == said.count("\n") == 1


@pytest.mark.parametrize("content", [None, b"\x7fELF"])
def test_a_library_that_is_absent_or_damaged_is_named(
    tmp_path: Path, content: bytes | None
) -> None:
    library_file = tmp_path / "library.so"
    if content is not None:
        library_file.write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-c", "import topq_dist.compress.kernels"],
        env={**os.environ, "TOPQ_NATIVE": "", "TOPQ_NATIVE_LIBRARY": str(library_file)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(library_file) in done.stderr
