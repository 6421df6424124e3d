"""A reader of IDX files (the format of MNIST), safe on broken and hostile ones."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

# far above any IDX file of unsigned bytes that a training example reads
MAX_BYTES = 1 << 30
_UNSIGNED_BYTE = 0x08


class IdxError(Exception):
    """A file is not the IDX file that was expected."""


def read_idx(path: Path, *, ndim: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Return the unsigned bytes of an IDX file as an array of `ndim` dimensions.

    A name that ends in .gz is decompressed, never beyond what the header declares.
    Raises IdxError, naming the file, on another type, rank or length, and on bytes past the end.
    """
    try:
        with _open(path) as file:
            return _read(file, path, ndim)
    except (OSError, EOFError, zlib.error) as error:
        raise IdxError(f"{path}: cannot be read: {error}") from error


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return cast("BinaryIO", gzip.open(path, "rb"))
    return path.open("rb")


def _read(file: BinaryIO, path: Path, ndim: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    header = file.read(4 + 4 * ndim)
    expected = bytes([0, 0, _UNSIGNED_BYTE, ndim])
    if header[:4] != expected:
        raise IdxError(
            f"{path}: starts with {header[:4].hex() or 'nothing'}: expected {expected.hex()}, "
            f"an IDX file of unsigned bytes in {ndim} dimensions"
        )
    if len(header) < 4 + 4 * ndim:
        raise IdxError(f"{path}: ends within its header of {4 + 4 * ndim} bytes")
    shape = tuple(int(size) for size in np.frombuffer(header, dtype=">u4", offset=4))
    size_bytes = math.prod(shape)
    if size_bytes > MAX_BYTES:
        raise IdxError(f"{path}: declares shape {shape}: expected at most {MAX_BYTES} bytes")
    body = file.read(size_bytes + 1)
    if len(body) != size_bytes:
        held = "more" if len(body) > size_bytes else f"only {len(body)}"
        raise IdxError(f"{path}: shape {shape} takes {size_bytes} bytes: the file holds {held}")
    # a copy, since torch wants memory that it may write to
    return np.frombuffer(body, dtype=np.uint8).reshape(shape).copy()
