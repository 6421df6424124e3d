"""Rice-coded gaps behind a directory of tiles, so that many threads can write and read at once.

The code is that of rice.py. Before it, for each tile of 256 indices, stand two numbers: the bit of
the unary stream at which the tile's codes begin, and the index after the last one of the tile
before. With them a tile is read without what lies before it; the low bits of an index lie at a
place of its own in any case. Both numbers have four bytes, or eight where the vector has more than
2**32 elements, the least significant first.

The Rice parameter follows from the number of indices alone, so that all sizes but that of the unary
stream are known before a vector has been looked at.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from topq_dist.compress.codec import rice
from topq_dist.compress.codec.bits import Bytes
from topq_dist.compress.kernels import gaps_between

TILE_NUMEL = 256


def entry_bytes(numel: int) -> int:
    """Return the bytes of each of the two numbers of a tile."""
    return 4 if numel <= 1 << 32 else 8


def directory_bytes(numel: int, k: int) -> int:
    """Return the bytes of the directory of k indices below `numel`."""
    return -(-k // TILE_NUMEL) * 2 * entry_bytes(numel)


def choose_bits(numel: int, k: int) -> int:
    """Return the b whose longest code of k indices below `numel` is the shortest."""
    return min(range(rice.largest_bits(numel, k) + 1), key=lambda bits: _most_bits(numel, k, bits))


def bound_bytes(numel: int, k: int) -> int:
    """Return the most bytes that any k indices below `numel`, fewer than all, take."""
    if k == 0:
        return 0
    bits = choose_bits(numel, k)
    unary_bytes = (k + ((numel - k) >> bits) + 7) // 8
    return directory_bytes(numel, k) + unary_bytes + rice.low_bytes(k, bits)


def encode(indices: npt.NDArray[np.int64], gaps: rice.Integers, numel: int, bits: int) -> Bytes:
    """Return the code of ascending indices, at least one, and the gaps between them."""
    directory = _directory(indices, gaps, bits).astype(f"<u{entry_bytes(numel)}")
    return np.concatenate([directory.reshape(-1).view(np.uint8), rice.encode_gaps(gaps, bits)])


def decode(code: Bytes, numel: int, k: int, bits: int) -> npt.NDArray[np.int64]:
    """Return the k ascending indices below `numel` that `code` holds, at least one.

    Raises ValueError for anything that `encode` would not have written. Allocates in proportion to
    k and to the code's own length only.
    """
    length = directory_bytes(numel, k)
    if code.size < length:
        raise ValueError(f"{code.size} index bytes: expected a directory of {length}")
    indices = rice.decode_indices(code[length:], numel, k, bits)
    gaps = np.empty(k, np.int64)
    gaps_between(indices, numel, gaps)
    directory = code[:length].copy().view(f"<u{entry_bytes(numel)}").reshape(-1, 2)
    if not (directory == _directory(indices, gaps, bits)).all():
        raise ValueError("the directory of tiles does not fit the indices")
    return indices


def _directory(
    indices: npt.NDArray[np.int64], gaps: rice.Integers, bits: int
) -> npt.NDArray[np.uint64]:
    """Return where each tile begins, in the unary stream and in the vector: (tiles, 2)."""
    starts = np.arange(0, indices.size, TILE_NUMEL)
    lengths = np.add.reduceat((gaps >> bits) + 1, starts, dtype=np.int64)
    first = np.concatenate([[0], indices[starts[1:] - 1] + 1])
    return np.stack([np.cumsum(lengths) - lengths, first], axis=1).astype(np.uint64)


def _most_bits(numel: int, k: int, bits: int) -> int:
    return k * (bits + 1) + ((numel - k) >> bits)
