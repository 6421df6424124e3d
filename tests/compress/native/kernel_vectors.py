"""Vectors for the compiled kernels, numpy's kernels beside them, and a comparison to the bit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from topq_dist.compress.native import numpy_codec, numpy_kernels

Array = npt.NDArray[Any]
LANES = 64
SIZES = [0, 1, LANES - 1, LANES, LANES + 1, 1_000, 100_000]
NUMBERS = ["f4", "f8"]

by_numpy = SimpleNamespace(**vars(numpy_kernels) | vars(numpy_codec))


def floats(dtype: str, size: int, seed: int, *, finite: bool = False) -> Array:
    """Return numbers with ties, zeros of both signs, denormals, and what is not finite."""
    generator = np.random.default_rng(seed)
    drawn = generator.standard_normal(size)
    drawn[::3] = np.round(drawn[::3] * 3)
    numbers = drawn.astype(dtype)
    info = np.finfo(numbers.dtype)
    rare = [0.0, -0.0, info.smallest_subnormal, -info.tiny / 3, info.max, -info.max]
    rare += [] if finite else [np.inf, -np.inf, np.nan]
    where = generator.random(size) < 0.05
    numbers[where] = generator.choice(np.array(rare, dtype), int(where.sum()))
    return numbers


def assert_same(ours: Array, theirs: Array) -> None:
    """Compare to the bit, but for a NaN's own."""
    assert ours.dtype == theirs.dtype
    if ours.dtype.kind == "f":
        # what a sum that is no number looks like is not said
        nan = np.isnan(ours)
        np.testing.assert_array_equal(nan, np.isnan(theirs))
        bits = f"u{ours.itemsize}"
        ours, theirs = ours.view(bits)[~nan], theirs.view(bits)[~nan]
    np.testing.assert_array_equal(ours, theirs)
