"""Tiles of Rice-coded gaps: what they hold, how long they are, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from topq_dist.compress.codec import tiled
from topq_dist.compress.codec.bits import Bytes
from topq_dist.compress.codec.frame import decode_frame, encode_frame, peek_header
from topq_dist.compress.codec.indices import (
    IndexCoding,
    Indices,
    decode_indices,
    encode_indices,
)
from topq_dist.compress.codec.values import quantize


def drawn(random: np.random.Generator, numel: int, k: int) -> Indices:
    return np.sort(random.choice(numel, k, replace=False, shuffle=False))


def read(code: Bytes, bits: int, numel: int, k: int) -> Indices:
    return decode_indices(code, IndexCoding.TILED, bits, numel=numel, k=k)


@given(
    gaps=st.lists(st.integers(0, 5000), min_size=1, max_size=700),
    spare=st.integers(1, 100_000),
    far=st.booleans(),
)
def test_what_is_written_is_read(gaps: list[int], spare: int, far: bool) -> None:
    indices = np.cumsum(np.array(gaps, np.int64) + 1) - 1
    # above 2**32 the directory has eight bytes for a number
    numel = int(indices[-1]) + 1 + spare + (far << 40)
    coded = encode_indices(indices, numel, in_tiles=True)
    assert coded.coding is IndexCoding.TILED
    assert np.array_equal(read(coded.payload, coded.rice_bits, numel, len(gaps)), indices)
    assert coded.payload.size <= tiled.bound_bytes(numel, len(gaps))


def test_a_frame_says_how_its_indices_are_written() -> None:
    indices = torch.from_numpy(drawn(np.random.default_rng(0), 100_000, 1000))
    values = quantize(torch.randn(1000), "int2")
    frame = encode_frame(100_000, indices, values, in_tiles=True)
    assert peek_header(frame).index_coding is IndexCoding.TILED
    decoded = decode_frame(frame, numel=100_000)
    assert torch.equal(decoded.indices, indices)
    assert torch.equal(decoded.values, values.decoded)
    # where there is nothing to code, there are no tiles
    whole = encode_frame(1000, torch.arange(1000), values, in_tiles=True)
    assert peek_header(whole).index_coding is IndexCoding.ALL


@pytest.mark.parametrize(("density", "most_over"), [(0.01, 0.05), (0.001, 0.06)])
def test_it_is_hardly_longer_than_need_be(density: float, most_over: float) -> None:
    numel = 25_560_000
    k = round(density * numel)
    least = math.lgamma(numel + 1) - math.lgamma(k + 1) - math.lgamma(numel - k + 1)
    coded = encode_indices(drawn(np.random.default_rng(1), numel, k), numel, in_tiles=True)
    assert coded.payload.size * 8 < (1.0 + most_over) * least / math.log(2)
    # and any other set takes little more
    assert tiled.bound_bytes(numel, k) < 1.07 * coded.payload.size


def test_a_directory_that_does_not_fit_is_refused() -> None:
    numel, k = 50_000, 600
    coded = encode_indices(drawn(np.random.default_rng(2), numel, k), numel, in_tiles=True)
    for at in range(tiled.directory_bytes(numel, k)):
        altered = coded.payload.copy()
        altered[at] ^= 1
        with pytest.raises(ValueError, match="directory"):
            read(altered, coded.rice_bits, numel, k)
    with pytest.raises(ValueError, match="directory of 24"):
        read(coded.payload[:20], coded.rice_bits, numel, k)
    with pytest.raises(ValueError, match="Rice parameter"):
        read(coded.payload, 60, numel, k)
