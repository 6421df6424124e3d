"""IDX files: what is read, and that broken and hostile ones are refused."""

import gzip
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from training.data import read_idx
from training.errors import DataError


def idx_bytes(array: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.tobytes()


IMAGES = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)
GOOD = idx_bytes(IMAGES)


@pytest.mark.parametrize("shape", [(3, 4, 5), (0, 4, 5), (1, 1, 1)])
def test_reads_plain_and_compressed(tmp_path: Path, shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    plain, packed = tmp_path / "a", tmp_path / "a.gz"
    plain.write_bytes(idx_bytes(array))
    packed.write_bytes(gzip.compress(idx_bytes(array)))
    for path in (plain, packed):
        read = read_idx(path, ndim=3)
        assert read.dtype == np.uint8
        np.testing.assert_array_equal(read, array)
        read[...] = 0


BROKEN = {
    "empty": (b"", "starts with nothing"),
    "not IDX": (b"\x89PNG\r\n\x1a\n" + GOOD, "starts with 89504e47"),
    "floats": (b"\0\0\x0d\x03" + GOOD[4:], "starts with 00000d03"),
    "other rank": (b"\0\0\x08\x01" + GOOD[4:], "starts with 00000801"),
    "cut header": (GOOD[:9], "ends within its header"),
    "cut body": (GOOD[:-1], "the file holds only 59"),
    "trailing bytes": (GOOD + b"x", "the file holds more"),
    "hostile sizes": (GOOD[:4] + b"\xff" * 12 + GOOD[16:], "expected at most"),
}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN)
def test_refuses_broken_files(tmp_path: Path, content: bytes, message: str) -> None:
    plain, packed = tmp_path / "a", tmp_path / "a.gz"
    plain.write_bytes(content)
    packed.write_bytes(gzip.compress(content))
    for path in (plain, packed):
        with pytest.raises(DataError, match=message) as error_info:
            read_idx(path, ndim=3)
        assert str(path) in str(error_info.value)


@pytest.mark.parametrize("damage", ["cut", "flipped", "not gzip"])
def test_refuses_broken_compression(tmp_path: Path, damage: str) -> None:
    content = gzip.compress(GOOD)
    if damage == "cut":
        content = content[:-10]
    if damage == "flipped":
        content = content[:20] + bytes([content[20] ^ 0xFF]) + content[21:]
    if damage == "not gzip":
        content = GOOD
    path = tmp_path / "a.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.gz"):
        read_idx(path, ndim=3)


def test_a_compressed_file_is_not_inflated_beyond_its_header(tmp_path: Path) -> None:
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(GOOD + bytes(1 << 25), compresslevel=1))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="the file holds more"):
            read_idx(path, ndim=3)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1 << 20


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent"):
        read_idx(tmp_path / "absent", ndim=1)


@given(position=st.integers(0, len(GOOD) - 1), byte=st.integers(0, 255), cut=st.integers(0, 80))
def test_a_mutated_file_is_refused_or_read_as_it_stands(
    tmp_path_factory: pytest.TempPathFactory, position: int, byte: int, cut: int
) -> None:
    content = (GOOD[:position] + bytes([byte]) + GOOD[position + 1 :])[: len(GOOD) - cut]
    path = tmp_path_factory.getbasetemp() / "mutated"
    path.write_bytes(content)
    try:
        read = read_idx(path, ndim=3)
    except DataError:
        return
    assert idx_bytes(read) == content
