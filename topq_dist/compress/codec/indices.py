"""Ascending index sets as bytes: nothing, raw integers, a bitmap, Rice-coded gaps, tiles of it."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

from topq_dist.compress.codec import rice, tiled
from topq_dist.compress.codec.bits import Bytes, padding_is_zero
from topq_dist.compress.kernels import gaps_between
from topq_dist.compress.locks import ForkSafeLock

Indices = npt.NDArray[np.int64]
_ALL_BELOW: WeakValueDictionary[int, Indices] = WeakValueDictionary()
_MAKING = ForkSafeLock()


class IndexCoding(IntEnum):
    """How a frame's indices are written; the numbers are part of the format."""

    ALL = 0
    RAW = 1
    BITMAP = 2
    RICE = 3
    TILED = 4


class EncodedIndices(NamedTuple):
    """The code of an index set; `rice_bits` is 0 unless the coding is RICE or TILED."""

    coding: IndexCoding
    rice_bits: int
    payload: Bytes


def bound_bytes(numel: int, k: int) -> int:
    """Return the most bytes that encode_indices needs for any k of `numel` indices."""
    if k in (0, numel):
        return 0
    return min(_raw_bytes(numel, k), _bitmap_bytes(numel), rice.bound_bytes(numel, k))


def encode_indices(indices: Indices, numel: int, *, in_tiles: bool = False) -> EncodedIndices:
    """Encode strictly ascending `indices`, each in [0, numel), in the smallest coding.

    in_tiles: in the coding that many threads read at once, where it is not all or nothing. Raises
    ValueError where they are not strictly ascending or out of range.
    """
    k = indices.size
    if k == 0:
        return EncodedIndices(IndexCoding.ALL if numel == 0 else IndexCoding.RAW, 0, _nothing())
    gaps = _gaps(indices, numel)
    if k == numel:
        return EncodedIndices(IndexCoding.ALL, 0, _nothing())
    if in_tiles:
        rice_bits = tiled.choose_bits(numel, k)
        return EncodedIndices(
            IndexCoding.TILED, rice_bits, tiled.encode(indices, gaps, numel, rice_bits)
        )
    rice_bits, rice_bytes = rice.best_bits(gaps, numel)
    # on a tie the one that decodes fastest
    if _raw_bytes(numel, k) <= min(_bitmap_bytes(numel), rice_bytes):
        raw = indices.astype(_raw_dtype(numel)).view(np.uint8)
        return EncodedIndices(IndexCoding.RAW, 0, raw)
    if _bitmap_bytes(numel) <= rice_bytes:
        present = np.zeros(numel, dtype=np.uint8)
        present[indices] = 1
        return EncodedIndices(IndexCoding.BITMAP, 0, np.packbits(present, bitorder="little"))
    code = rice.encode_gaps(gaps, rice_bits, code_bytes=rice_bytes)
    return EncodedIndices(IndexCoding.RICE, rice_bits, code)


def decode_indices(
    payload: Bytes, coding: IndexCoding, rice_bits: int, *, numel: int, k: int
) -> Indices:
    """Return the k strictly ascending indices below `numel` that encode_indices wrote.

    Not to be written into: others may hold the same. Raises ValueError for any other payload.
    Allocates in proportion to `numel` at most.
    """
    if (coding is IndexCoding.ALL) != (k == numel):
        raise ValueError(f"index coding {coding.name} with {k} of {numel} indices")
    if rice_bits and coding not in (IndexCoding.RICE, IndexCoding.TILED):
        raise ValueError(f"Rice parameter {rice_bits} with index coding {coding.name}")
    if coding is IndexCoding.ALL:
        _check_length(payload, 0)
        return _all_below(numel)
    if coding is IndexCoding.RAW:
        _check_length(payload, _raw_bytes(numel, k))
        indices = payload.copy().view(_raw_dtype(numel)).astype(np.int64)
        _gaps(indices, numel)
        return indices
    if k == 0:
        raise ValueError(f"index coding {coding.name} for no indices")
    if coding is IndexCoding.BITMAP:
        _check_length(payload, _bitmap_bytes(numel))
        if not padding_is_zero(payload, numel):
            raise ValueError("bitmap ends in bits that are not zero")
        indices = np.unpackbits(payload, bitorder="little").view(bool).nonzero()[0]
        if indices.size != k:
            raise ValueError(f"bitmap holds {indices.size} indices, expected {k}")
        return indices
    if coding is IndexCoding.TILED:
        return tiled.decode(payload, numel, k, rice_bits)
    return rice.decode_indices(payload, numel, k, rice_bits)


def _all_below(numel: int) -> Indices:
    # shared by all who hold it: it takes twice the room of the values that it is for
    with _MAKING:
        indices = _ALL_BELOW.get(numel)
        if indices is None:
            indices = np.arange(numel, dtype=np.int64)
            _ALL_BELOW[numel] = indices
        return indices


def _gaps(indices: Indices, numel: int) -> rice.Integers:
    if indices.size == 0:
        return indices
    gaps: rice.Integers = np.empty(
        indices.size, np.int64 if numel > np.iinfo(np.int32).max else np.int32
    )
    if not gaps_between(indices, numel, gaps):
        if indices.min() < 0 or indices.max() >= numel:
            raise ValueError(
                f"indices from {indices.min()} to {indices.max()}: expected [0, {numel})"
            )
        raise ValueError("indices are not strictly ascending")
    return gaps


def _raw_dtype(numel: int) -> str:
    return "<i8" if numel > np.iinfo(np.int32).max else "<i4"


def _raw_bytes(numel: int, k: int) -> int:
    return k * (8 if numel > np.iinfo(np.int32).max else 4)


def _bitmap_bytes(numel: int) -> int:
    return (numel + 7) // 8


def _nothing() -> Bytes:
    return np.zeros(0, dtype=np.uint8)


def _check_length(payload: Bytes, expected: int) -> None:
    if payload.size != expected:
        raise ValueError(f"{payload.size} index bytes, expected {expected}")
