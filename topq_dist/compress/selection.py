"""Exact top-k by magnitude of a flat vector: exactly k elements, indices ascending.

One step's k-th magnitude is close to the last step's, so a pass over the vector keeps only the few
candidates above a slightly lower threshold, and only those are partitioned. A wrong threshold
costs time, never exactness. Order is that of the bit patterns with the sign cleared: NaN above
infinity, denormals whole. Among equal magnitudes at the k-th place the lowest indices are kept.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from topq_dist.compress.blocks import (
    KEY_DTYPES,
    Candidates,
    Indices,
    Keys,
    add_in_place,
    bits_of,
    find_candidates,
    magnitude_mask,
    number_of,
    peak_magnitude,
)

# up to here a partition of everything is cheaper than a search
_SMALL_NUMEL = 16_384
_SAMPLE_NUMEL = 32_768
_FIRST_SLACK = 0.03
_LARGEST_SLACK = 0.5
_SMALLEST_SLACK = 0.005


class Selection(NamedTuple):
    """The k largest magnitudes: `indices` int64 ascending, `values` of the vector's dtype, (k,).

    `finite` is False where the selected values hold NaN or infinity; from compensate_and_select it
    says that the sum is not finite, nothing is selected and the residual is as it was.
    """

    indices: Tensor
    values: Tensor
    finite: bool


class Selector:
    """Selects from one named vector, step after step; remembers where last step's threshold lay.

    Scratch (one block a thread) is shared by all selectors of a process. Distinct selectors may
    be used from distinct threads at once.
    """

    def __init__(self) -> None:
        self._threshold: float | None = None
        self._slack = _FIRST_SLACK
        self._residual_peak: tuple[int, int, float] | None = None

    def select(self, vector: Tensor, k: int) -> Selection:
        """Return the k elements of `vector` largest in magnitude.

        `vector` is 1-D contiguous of any float dtype, 0 <= k <= its length. Raises ValueError
        otherwise.
        """
        _check_vector("vector", vector)
        _check_k(k, vector.numel())
        return self._select(vector, k, None)

    def sum_is_finite(self, gradient: Tensor, residual: Tensor) -> bool:
        """Return whether gradient + residual holds neither NaN nor infinity, changing nothing.

        Reads the gradient once, and the residual only when something other than this selector has
        written to it, or when magnitudes come near the dtype's largest.
        """
        _check_pair(gradient, residual)
        peak = _peak(gradient)
        if not np.isfinite(peak):
            return False
        if self._residual_peak is None or self._residual_peak[:2] != _identity(residual):
            self._residual_peak = (*_identity(residual), _peak(residual))
        # a rounding of the sum of the peaks is the most that any element's sum can be
        total = torch.tensor(peak, dtype=residual.dtype) + torch.tensor(
            self._residual_peak[2], dtype=residual.dtype
        )
        if bool(torch.isfinite(total)):
            return True
        if not np.isfinite(self._residual_peak[2]):
            return False
        blocks = (slice(at, at + 65_536) for at in range(0, residual.numel(), 65_536))
        return all(bool(torch.isfinite(residual[at] + gradient[at]).all()) for at in blocks)

    def compensate_and_select(
        self, gradient: Tensor, residual: Tensor, k: int, *, checked: bool = False
    ) -> Selection:
        """residual += gradient, then return the k elements of the sum largest in magnitude.

        `gradient` and `residual` are 1-D contiguous of one length on one device; the residual is
        fp64 for an fp64 gradient, else fp32. Where the sum is not finite the residual stays as it
        was; with `checked` the caller has had True from sum_is_finite and it is not asked again.
        The values stay in the residual until `settle` takes them out.
        """
        _check_pair(gradient, residual)
        _check_k(k, residual.numel())
        if not checked and not self.sum_is_finite(gradient, residual):
            nothing = torch.zeros(0, dtype=torch.int64, device=residual.device)
            return Selection(nothing, nothing.to(residual.dtype), finite=False)
        return self._select(residual, k, gradient)

    def settle(self, residual: Tensor, selection: Selection, decoded: Tensor | None = None) -> None:
        """Leave in the residual what the receivers will not get: the value less `decoded`.

        `decoded` is (k,) of any float dtype, or None where values travel as they are.
        """
        if decoded is None:
            rest = torch.zeros_like(selection.values)
        else:
            rest = selection.values - decoded.to(selection.values)
        if residual.device.type == "cpu":
            residual.detach().numpy()[selection.indices.numpy()] = rest.numpy()
        else:
            residual.index_copy_(0, selection.indices, rest)

    def _select(self, vector: Tensor, k: int, gradient: Tensor | None) -> Selection:
        if vector.device.type != "cpu":
            return select_with_torch(vector, k, gradient)
        numel = vector.numel()
        if k in (0, numel) or numel <= _SMALL_NUMEL:
            if gradient is not None:
                add_in_place(vector, gradient)
            if k == 0:
                self._residual_peak = None
            everything = np.arange(numel if k else 0, dtype=np.int64)
            return self._finish(vector, everything, bits_of(vector)[: everything.size], k)
        candidates = self._search(vector, k, gradient)
        return self._finish(vector, candidates.indices, candidates.bits, k)

    def _search(self, vector: Tensor, k: int, gradient: Tensor | None) -> Candidates:
        """Return k candidates or more: by last step's threshold, a sample's, or all."""
        limit = 4 * k + 65_536
        if self._threshold is None:
            if gradient is not None:
                add_in_place(vector, gradient)
        else:
            low = self._threshold * (1.0 - self._slack)
            candidates = find_candidates(vector, _key(low, vector), limit, gradient=gradient)
            if candidates.complete and candidates.indices.size >= k:
                self._slack = max(self._slack * 0.98, _SMALLEST_SLACK)
                return candidates
            self._slack = min(self._slack * 2.0, _LARGEST_SLACK)
            if self._threshold == 0.0 and candidates.complete:
                return _with_zeros(candidates, k)
        threshold = _sampled_threshold(vector, k)
        candidates = find_candidates(vector, threshold, limit)
        if candidates.complete and candidates.indices.size >= k:
            return candidates
        if candidates.complete and threshold == 1:
            return _with_zeros(candidates, k)
        bits = bits_of(vector)
        return Candidates(np.arange(bits.size, dtype=np.int64), bits, complete=True)

    def _finish(self, vector: Tensor, indices: Indices, bits: Keys, k: int) -> Selection:
        keys = bits & magnitude_mask(vector.dtype)
        if keys.size > k:
            kth = np.partition(keys, keys.size - k)[keys.size - k]
            keep = keys >= kth
            spare = int(np.count_nonzero(keep)) - k
            if spare:
                keep[(keys == kth).nonzero()[0][-spare:]] = False
            indices, bits = indices.compress(keep), bits.compress(keep)
        elif k:
            kth = keys.min()
            bits = bits.copy()
        if k:
            self._threshold = number_of(int(kth), vector.dtype)
            peak = number_of(int(keys.max()), vector.dtype)
            self._residual_peak = (*_identity(vector), peak)
        values = torch.from_numpy(bits.view(f"i{bits.itemsize}")).view(vector.dtype)
        return Selection(torch.from_numpy(indices), values, finite=not k or bool(np.isfinite(peak)))


def select_with_torch(vector: Tensor, k: int, gradient: Tensor | None = None) -> Selection:
    """Select by torch operations only, on any device; with `gradient`, of vector += gradient."""
    if gradient is not None:
        vector += gradient
    indices = _torch_keys(vector).topk(k, sorted=False).indices.sort().values
    values = vector.index_select(0, indices)
    return Selection(indices, values, finite=bool(torch.isfinite(values).all()))


def select_rows(matrix: Tensor, k: int) -> Selection:
    """Return exactly k elements of every row, the largest in magnitude, as flat indices.

    `matrix` is (N, n), contiguous, of any float dtype. The result holds N * k elements, ascending.
    Raises ValueError otherwise.
    """
    if matrix.dim() != 2 or not matrix.is_contiguous() or matrix.dtype not in KEY_DTYPES:
        raise ValueError(
            f"matrix has shape {tuple(matrix.shape)}, strides {matrix.stride()} and dtype "
            f"{matrix.dtype}: expected a contiguous (N, n) of one of {[*KEY_DTYPES]}"
        )
    rows, row_numel = matrix.shape
    _check_k(k, row_numel)
    if k == row_numel:
        indices = torch.arange(matrix.numel(), device=matrix.device)
    elif k == 0 or rows == 0:
        indices = torch.zeros(0, dtype=torch.int64, device=matrix.device)
    else:
        within = _torch_keys(matrix).topk(k, dim=1, sorted=False).indices.sort(dim=1).values
        starts = torch.arange(rows, device=matrix.device) * row_numel
        indices = (within + starts[:, None]).reshape(-1)
    values = matrix.reshape(-1).index_select(0, indices)
    return Selection(indices, values, finite=bool(torch.isfinite(values).all()))


def _torch_keys(vector: Tensor) -> Tensor:
    signed = {2: torch.int16, 4: torch.int32, 8: torch.int64}[vector.dtype.itemsize]
    return vector.detach().view(signed) & torch.iinfo(signed).max


def _peak(vector: Tensor) -> float:
    if vector.device.type == "cpu":
        return peak_magnitude(vector)
    return float(torch.linalg.vector_norm(vector, torch.inf)) if vector.numel() else 0.0


def _identity(residual: Tensor) -> tuple[int, int]:
    # the version counts torch's own writes: a rescaled or loaded residual is measured again
    return residual.data_ptr(), residual._version


def _key(number: float, vector: Tensor) -> int:
    """Return the key of a magnitude, never below that of the smallest number above zero."""
    return max(1, int(bits_of(torch.tensor([number], dtype=vector.dtype))[0]))


def _sampled_threshold(vector: Tensor, k: int) -> int:
    """Return a key that somewhat more than k of the vector's keys reach, by a regular sample."""
    # an odd stride, or a power-of-two row length would show the sample one column only
    stride = max(1, vector.numel() // _SAMPLE_NUMEL) | 1
    sample = bits_of(vector)[::stride] & magnitude_mask(vector.dtype)
    expected = k / vector.numel() * sample.size
    rank = int(expected + 4.0 * expected**0.5 + 4.0)
    if rank >= sample.size:
        return 1
    return max(1, int(np.partition(sample, sample.size - rank)[sample.size - rank]))


def _with_zeros(candidates: Candidates, k: int) -> Candidates:
    """Fill up to k with zeros, lowest indices first, where every number but zero is a candidate."""
    free = np.ones(k, dtype=bool)
    free[candidates.indices[candidates.indices < k]] = False
    zeros = free.nonzero()[0][: k - candidates.indices.size]
    indices = np.concatenate([candidates.indices, zeros])
    bits = np.concatenate([candidates.bits, np.zeros(zeros.size, dtype=candidates.bits.dtype)])
    order = np.argsort(indices)
    return Candidates(indices[order], bits[order], complete=True)


def _check_vector(name: str, vector: Tensor) -> None:
    if vector.dim() != 1 or not vector.is_contiguous() or vector.dtype not in KEY_DTYPES:
        raise ValueError(
            f"{name} has shape {tuple(vector.shape)} and dtype {vector.dtype}: expected one "
            f"contiguous dimension of one of {[*KEY_DTYPES]}"
        )


def _check_pair(gradient: Tensor, residual: Tensor) -> None:
    _check_vector("gradient", gradient)
    _check_vector("residual", residual)
    expected = torch.float64 if gradient.dtype == torch.float64 else torch.float32
    if residual.dtype != expected or residual.shape != gradient.shape:
        raise ValueError(
            f"residual has shape {tuple(residual.shape)} and dtype {residual.dtype}: expected "
            f"{tuple(gradient.shape)} of {expected} for a gradient of {gradient.dtype}"
        )
    if residual.device != gradient.device:
        raise ValueError(
            f"residual is on {residual.device}: expected the gradient's {gradient.device}"
        )


def _check_k(k: int, numel: int) -> None:
    if not 0 <= k <= numel:
        raise ValueError(f"k={k!r}: expected a number in [0, {numel}]")
