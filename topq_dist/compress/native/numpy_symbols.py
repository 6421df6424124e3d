"""The kernels of entropy coding in numpy; see numpy_kernels.py for what holds of all of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from topq_dist.compress.native.numpy_codec import largest_magnitudes, sums_of_rows
from topq_dist.compress.native.numpy_kernels import Array, quiet

# values that share a base and a step, and the highest of their levels
_BLOCK = 4096
_MOST_LEVEL = 255
# symbol_coding.c says what these are
_SCALE_BITS, _LOWEST = 15, 1 << 16
_TAKEN = "values do not take the bytes that they have"


@quiet
def encode_levels(
    values: Array,
    ks: Array,
    ratio: float,
    bases: Array,
    steps: Array,
    signs: Array,
    levels: Array,
    decoded: Array,
) -> None:
    """Write values as signs and levels."""
    magnitudes = largest_magnitudes(values)
    sizes = _block_sizes(ks)
    scales = np.zeros((2, sizes.size), np.float32)
    for block, (size, stop) in enumerate(zip(sizes, np.cumsum(sizes), strict=True)):
        where = slice(stop - size, stop)
        levels[where], scales[:, block] = _levels_of(magnitudes[where], ratio)
    both = (scales.view(np.uint32) >> 16).astype("<u2")
    bases[:] = both[0].view(np.uint8)
    steps[:] = both[1, sizes > 1].view(np.uint8)
    signs[:] = np.packbits(np.signbit(values), bitorder="little")
    decoded[:] = _values_of(levels, np.signbit(values), scales, sizes)


@quiet
def decode_levels(scales: Array, signs: Array, levels: Array, ks: Array, values: Array) -> None:
    """Undo encode_levels; raise ValueError for scales or signs that are none of so many values."""
    if (ks.size and (ks.min() < 0 or ks.max() > values.size)) or ks.sum() != values.size:
        raise ValueError(_TAKEN)
    sizes = _block_sizes(ks)
    several = sizes > 1
    if scales.size != 2 * (sizes.size + several.sum()) or signs.size != -(-values.size // 8):
        raise ValueError(_TAKEN)
    negative, padding = np.split(np.unpackbits(signs, bitorder="little"), [values.size])
    if padding.any():
        raise ValueError("values end in bits that are not zero")
    both = np.zeros((2, sizes.size), np.uint32)
    both[0], both[1, several] = np.split(scales.copy().view("<u2"), [sizes.size])
    values[:] = _values_of(levels, negative, (both << 16).view(np.float32), sizes)
    if not np.isfinite(values).all():
        raise ValueError("a value is not finite")


def write_symbols(levels: Array, scratch: Array, payload: Array) -> int:
    """Write numbers of a byte in entropy code; return how many bytes that took."""
    if not levels.size:
        return 0
    counts = np.bincount(levels, minlength=256)
    codes = [_weight_code(count) for count in counts[: int(levels.max()) + 1].tolist()]
    out, model = bytearray([len(codes) - 1]), _model(codes)
    for level, after in zip(model.levels, [-1, *model.levels], strict=False):
        if level > after + 1:
            out += bytes([0, level - after - 1])
        out.append(codes[level])
    if len(model.levels) > 1:
        out += _coded(model, levels)
    payload[: len(out)] = np.frombuffer(out, np.uint8)
    return len(out)


def read_symbols(payload: Array, levels: Array) -> None:
    """Undo write_symbols; raise ValueError for a payload that is none of so many numbers."""
    raw = payload.tobytes()
    if not levels.size:
        if raw:
            raise ValueError(_TAKEN)
        return
    codes, head = _read_weights(raw)
    model = _model(codes)
    if len(model.levels) > 1:
        levels[:] = _decoded(model, raw[head:], levels.size)
    elif len(raw) == head:
        levels[:] = model.levels[0]
    else:
        raise ValueError(_TAKEN)


class _Model(NamedTuple):
    """Symbols of fields of `width` bits, which are places in `levels`."""

    levels: list[int]
    width: int
    frequencies: list[int]
    below: list[int]

    def fields_of(self, symbols: Array) -> Array:
        """Return the fields of symbols, (symbols, fields)."""
        return symbols[:, None] >> np.arange(0, 8, self.width) & ((1 << self.width) - 1)

    def lanes(self, symbols: int) -> int:
        return 1 if symbols < 2048 else 4 if symbols < 16384 else 16


def _model(codes: list[int]) -> _Model:
    levels = [level for level, code in enumerate(codes) if code]
    weights = [_weight_of(codes[level]) for level in levels]
    total = sum(weights)
    shares = [max((weight << 16) // total, 1) for weight in weights]
    width = next(bits for bits in (1, 2, 4, 8) if len(levels) <= 1 << bits)
    absent = [None] * ((1 << width) - len(levels))
    chances: list[int | None] = [1 << 40]
    for _ in range(8 // width):
        chances = [
            None if share is None or chance is None else chance * share >> 16
            for share in (*shares, *absent)
            for chance in chances
        ]
    possible = [chance for chance in chances if chance is not None]
    room, total = (1 << _SCALE_BITS) - len(possible), sum(possible)
    frequencies = [0 if chance is None else 1 + chance * room // total for chance in chances]
    frequencies[chances.index(max(possible))] += (1 << _SCALE_BITS) - sum(frequencies)
    below = [0, *np.cumsum(frequencies).tolist()[:-1]]
    return _Model(levels, width, frequencies, below)


def _weight_code(count: int) -> int:
    shift = max(count.bit_length() - 4, 0)
    high = count >> shift
    return (shift + 1) * 8 + high - 8 if high > 7 else count


def _weight_of(code: int) -> int:
    return code if code < 8 else (8 + code % 8) << (code // 8 - 1)


def _read_weights(raw: bytes) -> tuple[list[int], int]:
    """Return the weights' codes, and where they end."""
    codes: list[int] = []
    at = 1
    while raw and len(codes) <= raw[0]:
        run = 0
        if raw[at : at + 1] == b"\0":
            run = raw[at + 1] if at + 1 < len(raw) else 0
            at += 2
            if not run or len(codes) + run > raw[0]:
                raise ValueError(_TAKEN)
        if at >= len(raw) or not raw[at]:
            raise ValueError(_TAKEN)
        codes += [0] * run + [raw[at]]
        at += 1
    if not codes:
        raise ValueError(_TAKEN)
    return codes, at


def _coded(model: _Model, levels: Array) -> bytes:
    """Return the state of each lane, and the words that a reader adds to them."""
    place = np.zeros(256, np.int64)
    place[model.levels] = np.arange(len(model.levels))
    each = 8 // model.width
    count = -(-levels.size // each)
    fields = np.zeros((count, each), np.int64)
    fields.reshape(-1)[: levels.size] = place[levels]
    symbols = (fields << np.arange(0, 8, model.width)).sum(axis=1)
    lanes = model.lanes(count)
    states, words = [_LOWEST] * lanes, []
    for at, symbol in zip(range(count - 1, -1, -1), symbols[::-1].tolist(), strict=True):
        state, frequency = states[at % lanes], model.frequencies[symbol]
        if state >> (32 - _SCALE_BITS) >= frequency:
            words.append(state & 0xFFFF)
            state >>= 16
        quotient, rest = divmod(state, frequency)
        states[at % lanes] = (quotient << _SCALE_BITS) + rest + model.below[symbol]
    return np.array(states, "<u4").tobytes() + np.array(words[::-1], "<u2").tobytes()


def _decoded(model: _Model, raw: bytes, count: int) -> Array:
    """Return the numbers that _coded wrote."""
    symbols = -(-count // (8 // model.width))
    lanes = model.lanes(symbols)
    if len(raw) < 4 * lanes or len(raw) % 2:
        raise ValueError(_TAKEN)
    states = np.frombuffer(raw, "<u4", lanes).tolist()
    words = iter(np.frombuffer(raw, "<u2", offset=4 * lanes).tolist())
    if min(states) < _LOWEST:
        raise ValueError(_TAKEN)
    symbol_at = np.repeat(np.arange(len(model.below)), model.frequencies).tolist()
    read, mask = np.empty(symbols, np.int64), (1 << _SCALE_BITS) - 1
    for at in range(symbols):
        state = states[at % lanes]
        slot = state & mask
        read[at] = symbol = symbol_at[slot]
        state = model.frequencies[symbol] * (state >> _SCALE_BITS) + slot - model.below[symbol]
        if state < _LOWEST:
            word = next(words, None)
            if word is None:
                raise ValueError(_TAKEN)
            state = state << 16 | word
        states[at % lanes] = state
    places, padding = np.split(model.fields_of(read).reshape(-1), [count])
    if padding.any():
        raise ValueError("values end in bits that are not zero")
    if next(words, None) is not None or set(states) != {_LOWEST}:
        raise ValueError(_TAKEN)
    numbers: Array = np.array(model.levels, np.uint8)[places]
    return numbers


def _levels_of(magnitudes: Array, ratio: float) -> tuple[Array, tuple[Any, Any]]:
    """Return the levels of a block, and its base and step."""
    number = np.float64(magnitudes.size)
    least, largest = magnitudes.min(), magnitudes.max()
    total = _sum(magnitudes)
    span = np.float64(largest) - np.float64(least)
    wanted = np.float64(ratio) * (total / number - np.float64(least))
    top, per_unit = 0, np.float32(0.0)
    if span > 0.0 and wanted > 0.0:
        whole = int(min(span / wanted, np.float64(_MOST_LEVEL)))
        inverse = (np.float64(whole) + 0.5) / span
        if inverse < 2.0**127:
            top, per_unit = whole, np.float32(inverse)
    levels = np.minimum((magnitudes - least) * per_unit, np.float32(top)).astype(np.int64)
    levels_sum = int(levels.sum())
    spread = magnitudes.size * int((levels * levels).sum()) - levels_sum * levels_sum
    step = np.float32(0.0)
    if spread > 0:
        weighted = _sum(magnitudes.astype(np.float64) * levels)
        slope = (number * weighted - total * np.float64(levels_sum)) / np.float64(spread)
        step = _bf16(np.float32(max(slope, np.float64(0.0))))
    base = (total - np.float64(step) * np.float64(levels_sum)) / number
    return levels, (_bf16(np.float32(max(base, np.float64(0.0))), nearest=True), step)


def _sum(numbers: Array) -> Any:
    row = np.zeros((1, -(-numbers.size // 8) * 8))
    row[0, : numbers.size] = numbers
    return sums_of_rows(row)[0]


def _bf16(number: Any, *, nearest: bool = False) -> Any:
    bits = int(number.view(np.uint32))
    if nearest:
        bits += 0x7FFF + (bits >> 16 & 1)
    return np.uint32(bits & 0xFFFF0000).view(np.float32)


def _block_sizes(ks: Array) -> Array:
    sizes = [size for k in ks.tolist() for size in [_BLOCK] * (k // _BLOCK) + [k % _BLOCK] if size]
    return np.array(sizes, np.int64)


def _values_of(levels: Array, negative: Array, scales: Array, sizes: Array) -> Array:
    base, step = np.repeat(scales, sizes, axis=1)
    numbers = levels.astype(np.float32) * step + base
    signs = negative.astype(np.uint32) << 31
    values: Array = (numbers.view(np.uint32) | signs).view(np.float32)
    return values
