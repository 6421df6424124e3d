"""The k largest magnitudes of each row of a matrix, exactly k of them, found by numpy's partition.

Torch and numpy only, and the table of dtypes.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from topq_dist.dtypes import FLOATS

# elements looked at in one go: their keys stay in a core's L2 cache
_BLOCK = 1 << 17
# numpy's cost for each row outweighs its speed in rows shorter than the first of these, and the
# work for each segment in rows shorter than the second
_SHORT_ROW, _SHORT_CUT_ROW = 32, 256
Integers: TypeAlias = npt.NDArray[np.signedinteger]


def keep_top_(rows: Tensor, k: int) -> None:
    """Zero in place all but the k elements of largest magnitude in each row.

    rows: (N, n), any strides, any floating or complex dtype, any device; may be empty.
    k: in [0, n]. Exactly k elements of each row stay, bit for bit; the others become +0.0.
    NaN ranks above infinity. Which of several equal magnitudes stay is not specified.

    Raises ValueError for rows that are not 2-D or a k outside [0, n].
    """
    if rows.ndim != 2:
        raise ValueError(f"rows of shape {tuple(rows.shape)}: expected two dimensions")
    n_rows, n = rows.shape
    if not 0 <= k <= n:
        raise ValueError(f"k={k}: expected an integer in [0, {n}], the length of a row")
    if k == n or n_rows == 0:
        return
    if k == 0:
        rows.zero_()
    elif rows.device.type == "cpu" and rows.dtype in FLOATS and n >= _SHORT_ROW:
        _keep_top_on_cpu_(rows, k)
    else:
        columns = torch.topk(rows.abs(), k, dim=1, sorted=False).indices
        kept = rows.gather(1, columns)
        rows.zero_().scatter_(1, columns, kept)


def _keep_top_on_cpu_(rows: Tensor, k: int) -> None:
    """Do `keep_top_` by numpy, whose partition is vectorised; see benchmarks/optimizer_step.py."""
    rows[:0].zero_()  # writes made through numpy are not counted: this lets autograd notice them
    dense = rows.detach().contiguous()
    bits = dense.view(FLOATS[rows.dtype].signed).numpy()
    height = max(1, _BLOCK // rows.shape[1])
    for start in range(0, rows.shape[0], height):
        block = bits[start : start + height]
        top = top_indices(block, k)
        flat = block.reshape(-1)
        kept = flat[top]
        flat.fill(0)
        flat[top] = kept
    if dense.data_ptr() != rows.data_ptr():
        rows.copy_(dense)


def top_indices(bits: Integers, k: int) -> npt.NDArray[np.intp]:
    """Return the flat indices, in no order, of the k largest magnitudes in each row.

    bits: (N, n), IEEE floats read as signed integers of their size. k: in [1, n].

    Few elements need a closer look. Cut a row into segments and take the largest element of
    each, its peak. The k segments of highest peak hold k elements no smaller than the lowest of
    these peaks, and every element larger than it: the row's top k can be chosen among them.
    """
    n_rows, n = bits.shape
    magnitude = np.iinfo(bits.dtype).max  # every bit but the sign
    n_chunks = -(-n // _BLOCK)
    length = _segment_length(n, k)
    per_chunk = n // (n_chunks * length)  # segments
    if length == 1 or n_chunks * per_chunk < k:
        return _partition_indices(bits & magnitude, k)

    # element i of a chunk is in segment i modulo per_chunk, so that halves can be folded together
    chunk = per_chunk * length
    peaks = np.empty((n_rows, n_chunks, per_chunk), bits.dtype)
    for c in range(n_chunks):
        keys = bits[:, c * chunk : (c + 1) * chunk] & magnitude
        half = chunk // 2
        while half >= per_chunk:
            keys = np.maximum(keys[:, :half], keys[:, half : 2 * half])
            half //= 2
        peaks[:, c] = keys

    row = np.arange(n_rows)[:, None]
    peaks = peaks.reshape(n_rows, -1)
    highest = _partition_indices(peaks, k)
    floor = peaks.reshape(-1)[highest].min()
    segment = highest.reshape(n_rows, k) - row * peaks.shape[1]
    first = segment + segment // per_chunk * (chunk - per_chunk)
    inside = (first[:, None, :] + np.arange(0, chunk, per_chunk)[:, None]).reshape(n_rows, -1)
    after = np.broadcast_to(np.arange(n_chunks * chunk, n), (n_rows, n - n_chunks * chunk))
    candidates: npt.NDArray[np.intp] = np.concatenate([inside, after], axis=1) + row * n

    keys = bits.reshape(-1)[candidates] & magnitude
    if n_rows == 1:
        above = np.flatnonzero(keys >= floor)
        candidates, keys = candidates[:, above], keys[:, above]
    return candidates.reshape(-1)[_partition_indices(keys, k)]


def _segment_length(n: int, k: int) -> int:
    """Return a power of two near sqrt(n / k), which balances the two partitions that follow."""
    return 1 if n < _SHORT_CUT_ROW else 1 << int(math.log2(n / k) / 2)


def _partition_indices(keys: Integers, k: int) -> npt.NDArray[np.intp]:
    """Return the flat indices of the k largest keys in each row of (N, n), ascending."""
    n_rows, n = keys.shape
    chosen = keys >= np.partition(keys, n - k, axis=1)[:, n - k, None]
    indices = np.flatnonzero(chosen)
    if indices.size > n_rows * k:
        tied = np.flatnonzero(np.count_nonzero(chosen, axis=1) > k)
        # slower than partition, but it leaves some of several equal keys out
        columns = np.argpartition(keys[tied], n - k, axis=1)[:, n - k :]
        chosen[tied] = False
        chosen[tied[:, None], columns] = True
        indices = np.flatnonzero(chosen)
    return indices
