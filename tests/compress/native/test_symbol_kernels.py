"""Kernels of entropy coding: compiled and by numpy the same bits, and nothing read that is not one.

The decoder here is a third opinion, of numbers as large as they get.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from topq_dist.compress.codec.symbols import most_bytes
from topq_dist.compress.native import codec_binding, numpy_symbols

Array = NDArray[Any]
KINDS = [codec_binding, numpy_symbols]
BLOCK = 4096
KS = st.lists(st.sampled_from([0, 1, 2, 3, 8, 127, 300, 4095, 4096, 4097]), max_size=5)


def written(levels: Array) -> Array:
    """Return the code, the same from both, in no more bytes than are allowed."""
    codes = []
    for kind in KINDS:
        room = np.full(most_bytes(levels.size) + 1, 77, np.uint8)
        used = kind.write_symbols(levels, np.empty_like(levels), room[:-1])
        assert room[-1] == 77
        codes.append(room[:used].tobytes())
    assert codes[0] == codes[1]
    return np.frombuffer(codes[0], np.uint8)


def read(code: Array, count: int) -> list[Array | str]:
    """Return what each of both reads, or why it does not."""
    found: list[Array | str] = []
    for kind in KINDS:
        levels = np.empty(count, np.uint8)
        try:
            kind.read_symbols(code, levels)
        except ValueError as error:
            found.append(str(error))
        else:
            found.append(levels)
    return found


def decoded_slowly(code: bytes, count: int) -> list[int]:
    """Return the numbers of a code, by symbols.py's description of it."""
    weights: dict[int, int] = {}
    level, at = 0, 1
    while level <= code[0]:
        if code[at] == 0:
            level += code[at + 1]
            at += 2
        low, shift = code[at] % 8, code[at] // 8
        weights[level] = (8 + low) << (shift - 1) if shift else low
        level, at = level + 1, at + 1
    levels = sorted(weights)
    if len(levels) == 1:
        return levels * count
    width = 1 if len(levels) <= 2 else 2 if len(levels) <= 4 else 4 if len(levels) <= 16 else 8
    fields = [
        [symbol >> bits & ((1 << width) - 1) for bits in range(0, 8, width)]
        for symbol in range(256)
    ]
    total, chances = sum(weights.values()), {}
    for symbol, places in enumerate(fields):
        if max(places) < len(levels):
            chance = 1 << 40
            for place in places:
                chance = chance * max((weights[levels[place]] << 16) // total, 1) >> 16
            chances[symbol] = chance
    frequencies = {
        symbol: 1 + chance * (32768 - len(chances)) // sum(chances.values())
        for symbol, chance in chances.items()
    }
    frequencies[max(chances, key=lambda symbol: chances[symbol])] += 32768 - sum(
        frequencies.values()
    )
    slots = [symbol for symbol in frequencies for _ in range(frequencies[symbol])]
    below = {symbol: slots.index(symbol) for symbol in frequencies}
    symbols = -(-count // (8 // width))
    lanes = 1 if symbols < 2048 else 4 if symbols < 16384 else 16
    states = np.frombuffer(code, "<u4", lanes, at).tolist()
    words = np.frombuffer(code, "<u2", offset=at + 4 * lanes).tolist()
    numbers: list[int] = []
    for turn in range(symbols):
        state = states[turn % lanes]
        symbol = slots[state % 32768]
        state = frequencies[symbol] * (state // 32768) + state % 32768 - below[symbol]
        states[turn % lanes] = state if state >= 65536 else state * 65536 + words.pop(0)
        numbers += [levels[place] for place in fields[symbol]]
    assert states == [65536] * lanes
    assert not words
    return numbers[:count]


def drawn(size: int, levels: int, seed: int, *, spread: int = 1) -> Array:
    """Return numbers about as unlike in number as an exponential's."""
    generator = np.random.default_rng(seed)
    numbers = np.minimum(generator.exponential(levels / 5, size), levels - 1).astype(np.int64)
    return (numbers * spread + (3 if spread > 1 else 0)).astype(np.uint8)


@settings(max_examples=60, deadline=None)
@given(
    size=st.sampled_from([0, 1, 2, 7, 8, 9, 500, 2049, 9000]),
    levels=st.sampled_from([1, 2, 3, 4, 5, 15, 16, 17, 80]),
    spread=st.sampled_from([1, 3]),
    seed=st.integers(0, 99),
)
def test_symbols_come_back(size: int, levels: int, spread: int, seed: int) -> None:
    numbers = drawn(size, levels, seed, spread=spread)
    code = written(numbers)
    for found in read(code, size):
        np.testing.assert_array_equal(found, numbers)
    if size:
        assert decoded_slowly(code.tobytes(), size) == numbers.tolist()


@pytest.mark.parametrize("levels", [2, 3, 9, 14, 60, 256])
def test_many_symbols_take_hardly_more_than_their_entropy(levels: int) -> None:
    numbers = drawn(200_000, levels, 1)
    code = written(numbers)
    counts = np.bincount(numbers)
    shares = counts[counts > 0] / numbers.size
    least_bits = -float((shares * np.log2(shares)).sum()) * numbers.size
    assert code.size * 8 < 1.01 * least_bits
    for found in read(code, numbers.size):
        np.testing.assert_array_equal(found, numbers)


def test_rare_numbers_among_many() -> None:
    numbers = np.zeros(100_000, np.uint8)
    numbers[[5, 70_000]] = 1, 255
    code = written(numbers)
    assert code.size < 300
    for found in read(code, numbers.size):
        np.testing.assert_array_equal(found, numbers)


@pytest.mark.parametrize(
    "levels",
    [
        [126, 127],
        [125, 126, 127],
        [240, 250, 255],
        [0, 128],
        [9, 24],
        [7, 9, 12, 15, 22],
        list(range(240, 256)),
        list(range(60, 77)),
        [*range(50, 58), *range(178, 186)],
        [*range(50, 59), *range(178, 187)],
        list(range(256)),
    ],
    ids=lambda levels: f"{len(levels)} from {levels[0]} to {levels[-1]}",
)
def test_levels_near_each_other_and_apart(levels: list[int]) -> None:
    generator = np.random.default_rng(7)
    for size in (1, 6, 15, 33, 4096, 4100, 40_003):
        places = np.minimum(generator.exponential(len(levels) / 5, size), len(levels) - 1)
        numbers = np.array(levels, np.uint8)[places.astype(np.int64)]
        # where all that is looked at first is alike
        numbers[4096:] = np.roll(numbers[4096:], 5)
        numbers[: size // 2] = levels[-1]
        for found in read(written(numbers), size):
            np.testing.assert_array_equal(found, numbers)


@pytest.mark.parametrize("every", [2, 3, 7, 40, 300, 5_000])
@pytest.mark.parametrize("others", [1, 20])
def test_frequencies_of_all_sizes_divide_exactly(every: int, others: int) -> None:
    numbers = np.zeros(30_000, np.uint8)
    numbers[::every] = np.resize(np.arange(1, others + 1), numbers[::every].size)
    code = written(numbers)
    for found in read(code, numbers.size):
        np.testing.assert_array_equal(found, numbers)
    assert decoded_slowly(code.tobytes(), numbers.size) == numbers.tolist()


def test_damaged_codes_are_refused_or_read_alike() -> None:
    generator = np.random.default_rng(5)
    outcomes: Counter[str] = Counter()
    for case in range(600):
        size = int(generator.choice([1, 9, 60, 400]))
        code = written(drawn(size, int(generator.integers(1, 30)), case)).copy()
        for _ in range(int(generator.integers(1, 3))):
            code[generator.integers(0, code.size)] ^= 1 << generator.integers(0, 8)
        if case % 5 == 0:
            code = code[: generator.integers(0, code.size + 1)]
        if case % 7 == 0:
            code = np.append(code, np.zeros(2, np.uint8))
        compiled, plain = read(code, size)
        assert isinstance(compiled, str) == isinstance(plain, str)
        if isinstance(plain, str):
            outcomes["refused"] += 1
        else:
            np.testing.assert_array_equal(compiled, plain)
            outcomes["read"] += 1
    assert outcomes["refused"] > 300
    # of few numbers every state may be another code
    assert outcomes["read"] > 5


@pytest.mark.parametrize(
    ("code", "count"),
    [
        (b"", 1),
        (b"\x00\x08", 0),
        (b"\x00", 1),
        (b"\x00\x00", 1),
        (b"\x01\x08\x00", 2),
        (b"\x01\x00\x02\x08", 2),
        (b"\x02\x00\x01\x00\x01\x08", 2),
        (b"\x02\x08\x00\x00\x08", 2),
        (b"\x00\x08\x00", 1),
        # a state below the lowest, a word too few, one too many, half of one
        (b"\x01\x08\x08\xff\xff\x00\x00", 2),
        (b"\x01\x08\x08\x00\x00\x01\x00", 2),
        (b"\x01\x08\x08\x00\x80\x00", 2),
    ],
)
def test_what_is_no_code_is_refused(code: bytes, count: int) -> None:
    for found in read(np.frombuffer(code, np.uint8), count):
        assert isinstance(found, str)
        assert "bytes" in found or "not zero" in found


def values_of(ks: Array, seed: int) -> Array:
    """Values of all sizes; some clipped, some all alike."""
    generator = np.random.default_rng(seed)
    size = int(ks.sum())
    scale = 10.0 ** generator.integers(-44, 38)
    values = (generator.standard_normal(size) * scale).clip(-3e38, 3e38)
    if seed % 3 == 0:
        bound = np.abs(values).mean() if size else 0.0
        values = values.clip(-bound, bound)
    if seed % 5 == 0:
        values = np.copysign(scale, values)
    if seed % 7 == 0:
        values[::3] *= 1e-9
    return values.astype(np.float32)


def rooms(values: Array, ks: Array) -> list[Array]:
    """Return room for bases, steps, signs, levels and decoded values."""
    blocks, several = -(-ks // BLOCK), ks // BLOCK + (ks % BLOCK > 1)
    sizes = [2 * blocks.sum(), 2 * several.sum(), -(-values.size // 8), values.size]
    return [*(np.full(size, 77, np.uint8) for size in sizes), np.empty(values.size, np.float32)]


@settings(max_examples=60, deadline=None)
@given(ks=KS, seed=st.integers(0, 999), ratio=st.sampled_from([1.3, 2.3, 0.02]))
def test_levels_of_both_are_the_same(ks: list[int], seed: int, ratio: float) -> None:
    sizes = np.array(ks, np.int64)
    values = values_of(sizes, seed)
    both = []
    for kind in KINDS:
        made = rooms(values, sizes)
        kind.encode_levels(values, sizes, ratio, *made)
        both.append(made)
    for compiled, plain in zip(*both, strict=True):
        assert compiled.tobytes() == plain.tobytes()
    bases, steps, signs, levels, decoded = both[0]
    assert np.isfinite(decoded).all()
    np.testing.assert_array_equal(np.signbit(decoded), np.signbit(values))
    for kind in KINDS:
        again = np.empty_like(decoded)
        kind.decode_levels(np.concatenate([bases, steps]), signs, levels, sizes, again)
        assert again.tobytes() == decoded.tobytes()


@pytest.mark.parametrize("kind", KINDS, ids=["compiled", "numpy"])
def test_scales_and_signs_that_do_not_fit_are_refused(kind: Any) -> None:
    ks = np.array([1, 4097, 5])
    values = values_of(ks, 1)
    bases, steps, signs, levels, _ = made = rooms(values, ks)
    kind.encode_levels(values, ks, 1.3, *made)
    scales = np.concatenate([bases, steps])
    for wrong in ([4103], [1, 4097], [1, 4097, 6], [-1, 4097, 7], [2**62, 2**62, 5], []):
        with pytest.raises(ValueError, match="bytes"):
            kind.decode_levels(scales, signs, levels, np.array(wrong, np.int64), values)
    for few, others in ((scales[:-1], signs), (scales, signs[:-1]), (scales[:0], signs)):
        with pytest.raises(ValueError, match="bytes"):
            kind.decode_levels(few, others, levels, ks, values)
    signs[-1] |= 128
    with pytest.raises(ValueError, match="not zero"):
        kind.decode_levels(scales, signs, levels, ks, values)
    signs[-1] &= 127
    scales[:2] = np.array([0x7F80], np.uint16).view(np.uint8)
    with pytest.raises(ValueError, match="not finite"):
        kind.decode_levels(scales, signs, levels, ks, values)
