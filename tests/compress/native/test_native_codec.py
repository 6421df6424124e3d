"""Compiled kernels of gaps, halves and levels: the same bits as numpy's and a second opinion's."""

from __future__ import annotations

from typing import Any

import kernels_reference as reference
import numpy as np
import pytest
from compress.native.kernel_vectors import SIZES, Array, assert_same, by_numpy, floats
from hypothesis import given
from hypothesis import strategies as st

from topq_dist.compress.codec import lowbit
from topq_dist.compress.codec.values import LOW_BITS
from topq_dist.compress.native import codec_binding

CODE_BITS = sorted(LOW_BITS.values())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", ["i4", "i8"])
def test_gaps_between(size: int, dtype: str) -> None:
    indices = np.flatnonzero(np.random.default_rng(1).random(max(1, 5 * size)) < 0.2)[:size]
    numel = int(indices[-1]) + 1 if indices.size else 0
    ours, theirs = np.empty(indices.size, dtype), np.empty(indices.size, dtype)
    assert codec_binding.gaps_between(indices, numel, ours)
    assert by_numpy.gaps_between(indices, numel, theirs)
    assert_same(ours, theirs)
    assert_same(ours, (np.diff(indices, prepend=-1) - 1).astype(dtype))
    if indices.size:
        assert not codec_binding.gaps_between(indices, numel - 1, ours)
        assert not codec_binding.gaps_between(np.array([-1]), numel, ours)
        assert not codec_binding.gaps_between(np.array([0, 0]), numel, np.empty(2, dtype))


@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize("dtype", ["i4", "i8"])
def test_rice_code(size: int, dtype: str) -> None:
    gaps = np.random.default_rng(size).geometric(0.01, size).astype(dtype) - 1
    for bits in (0, 1, 5, 7, 8, 9, 16, 17, 31):
        sums = [np.empty(min(3, 8 * gaps.itemsize - bits), np.int64) for _ in range(2)]
        codec_binding.sums_of_quotients(gaps, bits, sums[0])
        by_numpy.sums_of_quotients(gaps, bits, sums[1])
        expected = [int((gaps >> shift).sum()) for shift in range(bits, bits + sums[0].size)]
        assert sums[0].tolist() == sums[1].tolist() == expected
        total = expected[0]
        found = []
        for write in (codec_binding.write_gaps, by_numpy.write_gaps):
            unary = np.zeros((total + size + 7) // 8, np.uint8)
            planes = np.empty((bits // 8, size), np.uint8)
            fields = np.zeros((size * (bits % 8) + 7) // 8, np.uint8)
            write(gaps, bits, unary, planes, fields)
            found.append((unary, planes, fields))
        for ours, theirs, expected in zip(*found, reference.write_gaps(gaps, bits), strict=True):
            assert_same(ours, theirs)
            assert_same(ours, expected)
        words = np.zeros(-(-found[0][0].size // 8) * 8, np.uint8)
        words[: found[0][0].size] = found[0][0]
        for room in (size, size - 1):
            ours, theirs = np.empty(room, np.int64), np.empty(room, np.int64)
            short = [found[0][0], *found[0][1:]]
            if room < size:
                short[1] = np.ascontiguousarray(short[1][:, :room])
            count = codec_binding.read_gaps(short[0], short[1], short[2], bits, ours)
            assert count == by_numpy.read_gaps(words.view(np.uint64), *short[1:], bits, theirs)
            assert_same(ours, theirs)
            assert_same(ours, (np.cumsum(gaps.astype(np.int64) + 1) - 1)[:room])


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("size", [0, 1, 7, 16, 33, 1 << 16])
def test_split_halves_and_join_halves_all_patterns(size: int, *, rotated: bool) -> None:
    halves = np.arange((1 << 16) - size, 1 << 16, dtype=np.uint32).astype(np.uint16)
    turned = (halves.astype(np.uint32) * 0x10001 >> (15 if rotated else 0)).astype(np.uint16)
    for kind in (codec_binding, by_numpy):
        high, low = np.full((2, size), 77, np.uint8)
        kind.split_halves(halves, high, low, rotated=rotated)
        assert_same(high, (turned >> 8).astype(np.uint8))
        assert_same(low, (turned & 255).astype(np.uint8))
        joined = np.full(size, 77, np.uint16)
        kind.join_halves(high, low, joined, rotated=rotated)
        assert_same(joined, halves)


def test_round_to_half_and_widen_half_all_patterns() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16)
    for scale in (1.0, 2.0**-14, 2.0**-126, 2.0**113):
        ours, theirs = np.empty(halves.size, np.float32), np.empty(halves.size, np.float32)
        args = (halves, np.float32(scale))
        assert not codec_binding.widen_half(*args, ours, ours.view(np.int32))
        assert not by_numpy.widen_half(*args, theirs, theirs.view(np.int32))
        finite = np.isfinite(halves.view(np.float16))
        assert_same(ours[finite], theirs[finite])
        assert_same(ours[finite], reference.widen_half(halves, scale)[finite])
        mine = np.ascontiguousarray(halves[finite & (np.abs(ours) < np.inf)])
        assert codec_binding.widen_half(mine, np.float32(scale), ours[: mine.size], ours)
    between = np.sort(halves[halves < 0x7BFF]).view(np.float16).astype(np.float32)
    # all numbers, the middles between them, and both neighbours of these
    middles = (between[1:] + between[:-1]) / 2
    numbers = np.concatenate([between, middles, np.nextafter(middles, 9), np.nextafter(middles, 0)])
    check_round_to_half(
        np.concatenate([numbers, -numbers, floats("f4", 9_999, 1, finite=True) % 60_000]), 1.0
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [1.0, 2.0**-20, 2.0**126])
def test_round_to_half(size: int, scale: float) -> None:
    numbers = floats("f4", size, size, finite=True)
    with np.errstate(over="ignore"):
        numbers[~(np.abs(numbers * np.float32(scale)) < 65_520)] = 0.0
    check_round_to_half(numbers, scale)


def check_round_to_half(numbers: Array, scale: float) -> None:
    numbers = np.nan_to_num(numbers)
    found = []
    for narrow in (codec_binding.round_to_half, by_numpy.round_to_half):
        scaled, halves = np.empty_like(numbers), np.empty(numbers.size, np.uint16)
        narrow(numbers, np.float32(scale), scaled, scaled.view(np.int32), halves)
        found.append(halves)
    assert_same(*found)
    expected = (numbers * np.float32(scale)).astype(np.float16)
    assert_same(found[0], expected.view(np.uint16))


KS = st.lists(st.sampled_from([0, 1, 2, 3, 127, 128, 129, 300]), max_size=6)


@given(ks=KS, seed=st.integers(0, 999), code_bits=st.sampled_from(CODE_BITS))
def test_blocks_of_levels(ks: list[int], seed: int, code_bits: int) -> None:
    check_blocks_of_levels(np.array(ks, np.int64), seed, code_bits)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("code_bits", CODE_BITS)
def test_blocks_of_levels_of_one_segment(size: int, code_bits: int) -> None:
    check_blocks_of_levels(np.array([size]), 1, code_bits)


def check_blocks_of_levels(ks: Array, seed: int, code_bits: int) -> None:
    values = floats("f4", int(ks.sum()), seed, finite=True)
    if seed % 3 == 0:
        # many alike
        values = np.copysign(np.float32(seed), values)
    blocks = lowbit.block_count(ks)
    payload = np.full(lowbit.lowbit_bytes(values.size, code_bits, blocks) + 1, 77, np.uint8)
    scales, packed = np.split(payload[:-1], [4 * blocks])
    decoded = np.full(values.size + 1, 77, np.float32)
    codec_binding.encode_blocks(values, ks, code_bits, scales, packed, decoded[:-1])
    assert payload[-1] == decoded[-1] == 77
    payload, decoded = payload[:-1], decoded[:-1]
    expected, (levels, again) = np.empty_like(payload), np.empty((2, values.size), np.float32)
    scales, packed = np.split(expected, [4 * blocks])
    by_numpy.encode_blocks(values, ks, code_bits, scales, packed, levels)
    by_numpy.decode_blocks(payload, ks, code_bits, again)
    assert_same(payload, expected)
    assert_same(decoded, levels)
    assert_same(decoded, again)
    assert_same(
        np.concatenate([np.zeros(0, np.uint8), *payload_by_numpy(values, ks, code_bits)]), payload
    )
    back = np.empty_like(values)
    codec_binding.decode_blocks(payload, ks, code_bits, back)
    assert_same(back, decoded)


def payload_by_numpy(values: Array, ks: Array, code_bits: int) -> tuple[Array, Array]:
    """Return scales and packed codes."""
    top, scales, codes = (1 << (code_bits - 1)) - 1, [], [np.zeros(0, np.uint8)]
    for where in reference.blocks_of(ks, 128):
        block = np.minimum(np.abs(values[where]), np.float32(2.0**127))
        base, step = reference.scales(block, code_bits)
        scales += [base, step]
        levels = reference.nearest_levels(block, base, step, top)
        codes.append(levels | np.signbit(values[where]).astype(np.uint8) << (code_bits - 1))
    halves = (np.array(scales, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    bits = np.concatenate(codes)[:, None] >> np.arange(code_bits) & 1
    return halves.view(np.uint8), np.packbits(bits.astype(np.uint8).reshape(-1), bitorder="little")


@pytest.mark.parametrize("kind", [codec_binding, by_numpy], ids=["compiled", "numpy"])
@pytest.mark.parametrize("code_bits", CODE_BITS)
def test_a_payload_that_does_not_fit_is_refused(code_bits: int, kind: Any) -> None:
    ks, values = np.array([5, 130]), floats("f4", 135, 1, finite=True)
    payload = np.concatenate(payload_by_numpy(values, ks, code_bits))
    for wrong_ks in ([135], [5, 129], [5, 131], [-1, 136], [2**62, 2**62, 135], []):
        with pytest.raises(ValueError, match="bytes"):
            kind.decode_blocks(payload, np.array(wrong_ks, np.int64), code_bits, values)
    for wrong in (payload[:-1], np.append(payload, np.uint8(0)), payload[:0]):
        with pytest.raises(ValueError, match="bytes"):
            kind.decode_blocks(wrong, ks, code_bits, values)
    if code_bits < 8:
        payload[-1] |= 128
        with pytest.raises(ValueError, match="not zero"):
            kind.decode_blocks(payload, ks, code_bits, values)
        payload[-1] &= 127
    payload[:2] = np.array([0x7F80], np.uint16).view(np.uint8)
    with pytest.raises(ValueError, match="not finite"):
        kind.decode_blocks(payload, ks, code_bits, values)
