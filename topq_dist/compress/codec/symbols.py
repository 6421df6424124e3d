"""Entropy coding of small numbers that are unlike in number: as many bits as those frequencies say.

Range asymmetric numeral systems (Duda, "Asymmetric numeral systems", arXiv:1311.2540) in 1, 4 or 16
interleaved lanes (Giesen, "Interleaved entropy coders", arXiv:1402.3392). A symbol is a byte of
fields, each a number's place among those that there are: 8 of 1 bit where there are two, 4 of 2, 2
of 4, or 1. What a code holds, in order:

- the highest number, a byte;
- of each number up to it the weight, a byte: how many there are, cut to four bits and where they
  stand. Instead of a run of weights of none, 0 and its length;
- where there is more than one number: each lane's state, 4 bytes, and words of 2 bytes that lanes
  read from there on, in turn. Reading ends with all words and in the states that writing began
  with, or the code is not one.

Frequencies follow from the weights by whole numbers alone: both sides have the same.
"""

from __future__ import annotations

import numpy as np

from topq_dist.compress import kernels
from topq_dist.compress.codec.bits import Bytes

_LANES = 16
_LONGEST_WEIGHTS = 384


def most_bytes(count: int) -> int:
    """Return the most bytes that the code of `count` numbers takes."""
    if not count:
        return 0
    # a weight and a run before it for each number there is, a word for each symbol
    return 1 + min(3 * count, _LONGEST_WEIGHTS) + 4 * (_LANES if count >= 2048 else 1) + 2 * count


def encode_symbols(numbers: Bytes, room: Bytes) -> Bytes:
    """Return the code of `numbers`, a view of `room`, which has scratch_bytes of their count."""
    spelled, code = room[: numbers.size], room[numbers.size :]
    return code[: kernels.write_symbols(numbers, spelled, code)]


def scratch_bytes(count: int) -> int:
    """Return the bytes that encode_symbols needs to work in."""
    return count + most_bytes(count)


def decode_symbols(code: Bytes, count: int) -> Bytes:
    """Return the `count` numbers of a code; ValueError where encode_symbols did not write it."""
    numbers = np.empty(count, np.uint8)
    kernels.read_symbols(code, numbers)
    return numbers
