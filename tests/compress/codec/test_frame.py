import math
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from topq_dist.compress.codec import rice
from topq_dist.compress.codec.frame import (
    HEADER_BYTES,
    FrameError,
    decode_frame,
    encode_frame,
    encode_non_finite_frame,
    max_frame_bytes,
    peek_header,
)
from topq_dist.compress.codec.indices import IndexCoding
from topq_dist.compress.codec.values import VALUE_FORMATS, quantize

FORMATS = st.sampled_from(VALUE_FORMATS)


def random_indices(numel: int, k: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(
        np.sort(np.random.default_rng(seed).choice(numel, k, replace=False, shuffle=False))
    )


def sealed(frame: Tensor | bytes) -> bytes:
    """The same bytes with a checksum that fits."""
    raw = frame.numpy().tobytes() if isinstance(frame, Tensor) else frame
    crc = zlib.crc32(raw[HEADER_BYTES:], zlib.crc32(raw[:28]))
    return raw[:28] + crc.to_bytes(4, "little") + raw[HEADER_BYTES:]


def altered(frame: Tensor, at: int, new: bytes) -> bytes:
    raw = frame.numpy().tobytes()
    return sealed(raw[:at] + new + raw[at + len(new) :])


@given(
    numel=st.integers(0, 3000),
    density=st.floats(0, 1),
    clustered=st.booleans(),
    seed=st.integers(0, 2**32),
    value_format=FORMATS,
)
@settings(max_examples=500, deadline=None)
def test_round_trip(
    numel: int, density: float, clustered: bool, seed: int, value_format: str
) -> None:
    k = round(density * numel)
    indices = torch.arange(k) + (numel - k) // 2 if clustered else random_indices(numel, k, seed)
    values = torch.randn(k, generator=torch.Generator().manual_seed(seed))
    quantized = quantize(values, value_format)
    encoded = encode_frame(numel, indices, quantized)
    frame = decode_frame(encoded, numel=numel)
    assert frame.finite
    assert frame.numel == numel
    assert torch.equal(frame.indices, indices)
    assert torch.equal(frame.values, quantized.decoded)
    header = peek_header(encoded)
    assert header.frame_bytes == encoded.numel() <= max_frame_bytes(numel, k, value_format)
    assert (header.numel, header.k, header.value_format) == (numel, k, value_format)
    # one content, one frame
    assert torch.equal(encode_frame(numel, indices, quantize(values, value_format)), encoded)


@given(
    numel=st.integers(1, 2**48),
    gaps=st.lists(st.integers(0, 2**40), max_size=30),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=300, deadline=None)
def test_sparse_indices_of_huge_vectors(numel: int, gaps: list[int], seed: int) -> None:
    positions = np.cumsum([gap + 1 for gap in gaps]) - 1 if gaps else np.zeros(0)
    indices = torch.from_numpy(positions[positions < numel].astype(np.int64))
    values = torch.randn(indices.numel(), generator=torch.Generator().manual_seed(seed))
    encoded = encode_frame(numel, indices, quantize(values))
    frame = decode_frame(encoded, numel=numel)
    assert torch.equal(frame.indices, indices)
    assert torch.equal(frame.values, values)
    assert encoded.numel() <= max_frame_bytes(numel, indices.numel(), "fp32")


@pytest.mark.parametrize(
    ("numel", "indices", "coding"),
    [
        (0, [], IndexCoding.ALL),
        (7, range(7), IndexCoding.ALL),
        (7, [], IndexCoding.RAW),
        (2**31 - 1, [2**31 - 2], IndexCoding.RAW),
        (2**33, [0, 2**33 - 1], IndexCoding.RICE),
        (1000, range(0, 1000, 2), IndexCoding.BITMAP),
        (100_000, range(0, 100_000, 100), IndexCoding.RICE),
        (100_000, range(500), IndexCoding.RICE),
    ],
)
def test_the_smallest_coding_is_picked(
    numel: int, indices: list[int] | range, coding: IndexCoding
) -> None:
    at = torch.tensor(list(indices), dtype=torch.int64)
    frame = encode_frame(numel, at, quantize(torch.ones(at.numel())))
    assert peek_header(frame).index_coding is coding
    assert torch.equal(decode_frame(frame, numel=numel).indices, at)


@given(
    gaps=st.lists(st.integers(0, 5000), min_size=1, max_size=60),
    spare=st.integers(0, 100_000),
)
@settings(max_examples=300, deadline=None)
def test_the_rice_parameter_is_the_cheapest_there_is(gaps: list[int], spare: int) -> None:
    numel = sum(gaps) + len(gaps) + spare
    array = np.array(gaps, dtype=np.int32)
    bits, size = rice.best_bits(array, numel)
    sizes = {
        other: (len(gaps) + sum(gap >> other for gap in gaps) + 7) // 8
        + rice.low_bytes(len(gaps), other)
        for other in range(20)
    }
    assert rice.encode_gaps(array, bits).size == size == sizes[bits]
    # whole bytes of the two streams can hide a bit or two of the exact cost
    assert size <= min(sizes.values()) + 1


@pytest.mark.parametrize(("density", "most_over"), [(0.01, 0.01), (0.001, 0.015)])
def test_frame_size_against_the_entropy_of_the_index_set(density: float, most_over: float) -> None:
    numel = 25_560_000
    k = round(density * numel)
    indices = random_indices(numel, k, seed=7)
    choices = math.lgamma(numel + 1) - math.lgamma(k + 1) - math.lgamma(numel - k + 1)
    least_bits = choices / math.log(2) + 16 * k
    frame = encode_frame(numel, indices, quantize(torch.ones(k), "fp16"))
    assert least_bits <= frame.numel() * 8 <= least_bits * (1 + most_over)
    assert frame.numel() <= max_frame_bytes(numel, k, "fp16") <= frame.numel() * 1.03


def test_a_non_finite_frame_makes_the_result_nan() -> None:
    frame = encode_non_finite_frame(5, "fp16")
    assert frame.numel() == HEADER_BYTES
    decoded = decode_frame(frame, numel=5)
    assert not decoded.finite
    assert decoded.indices.numel() == decoded.values.numel() == 0
    out = torch.zeros(5)
    decoded.add_to(out)
    assert bool(out.isnan().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value_format", ["fp32", "fp64", "fp16"])
def test_frames_add_up(dtype: torch.dtype, value_format: str) -> None:
    out, expected = torch.zeros(2000, dtype=dtype), torch.zeros(2000, dtype=dtype)
    for seed in range(3):
        indices, values = random_indices(2000, 300, seed), torch.arange(300) / 8.0
        decode_frame(
            encode_frame(2000, indices, quantize(values, value_format)), numel=2000
        ).add_to(out)
        expected[indices] += values.to(dtype)
    assert torch.equal(out, expected)
    with pytest.raises(ValueError, match=r"out has shape \(3,\): expected \(7,\)"):
        decode_frame(encode_non_finite_frame(7), numel=7).add_to(torch.zeros(3))


def test_bytes_views_and_slots() -> None:
    encoded = encode_frame(100, torch.tensor([3, 70]), quantize(torch.tensor([1.0, -2.0])))
    raw = encoded.numpy().tobytes()
    for buffer in (raw, bytearray(raw), memoryview(raw), encoded):
        assert decode_frame(buffer, numel=100).indices.tolist() == [3, 70]
    # odd offsets: nothing in a frame needs alignment
    assert decode_frame(memoryview(b"x" + raw)[1:], numel=100).values.tolist() == [1.0, -2.0]
    slot = torch.full((len(raw) + 9,), 255, dtype=torch.uint8)
    slot[: len(raw)] = encoded
    assert peek_header(slot).frame_bytes == len(raw)
    assert decode_frame(slot, numel=100, padded=True).indices.tolist() == [3, 70]
    with pytest.raises(FrameError, match=f"{len(raw) + 9} bytes: expected a frame of {len(raw)}"):
        decode_frame(slot, numel=100)


def test_decoded_values_are_in_memory_of_their_own() -> None:
    encoded = encode_frame(10, torch.tensor([1, 2]), quantize(torch.tensor([1.0, 2.0])))
    frame = decode_frame(encoded, numel=10)
    encoded.zero_()
    assert frame.values.tolist() == [1.0, 2.0]
    assert frame.indices.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("numel", "indices", "values", "message"),
    [
        (10, [1, 1], [1.0, 1.0], "not strictly ascending"),
        (10, [5, 2], [1.0, 1.0], "not strictly ascending"),
        (10, [2, 10], [1.0, 1.0], r"indices from 2 to 10: expected \[0, 10\)"),
        (10, [-1, 2], [1.0, 1.0], r"indices from -1 to 2"),
        (10, [1, 2], [1.0], r"indices has shape \(2,\) and values \(1,\)"),
        (1, [0, 1], [1.0, 1.0], "2 indices: expected at most 1"),
        (10, [1], [math.nan], "values holds NaN or infinity"),
        (-1, [], [], "numel=-1"),
        (2**48 + 1, [], [], "numel=281474976710657"),
    ],
)
def test_bad_content_is_refused(
    numel: int, indices: list[int], values: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        encode_frame(
            numel, torch.tensor(indices, dtype=torch.int64), quantize(torch.tensor(values))
        )


def test_bad_arguments_are_named() -> None:
    one = torch.tensor([0])
    with pytest.raises(ValueError, match="value_format='fp8'"):
        encode_frame(1, one, quantize(torch.ones(1), "fp8"))
    with pytest.raises(ValueError, match=r"indices has dtype torch.float32"):
        encode_frame(1, torch.zeros(1), quantize(torch.ones(1)))
    with pytest.raises(ValueError, match=r"values has dtype torch.int64"):
        encode_frame(1, one, quantize(one))
    with pytest.raises(ValueError, match=r"k=3: expected a number in \[0, numel=2\]"):
        max_frame_bytes(2, 3, "fp32")
    for buffer in (
        torch.zeros(40),
        torch.zeros(4, 10, dtype=torch.uint8),
        memoryview(b"ab" * 40)[::2],
    ):
        with pytest.raises(FrameError, match="expected"):
            decode_frame(buffer, numel=1)
    with pytest.raises(FrameError, match="buffer is a str"):
        decode_frame("TOPQ", numel=1)  # type: ignore[arg-type]


GOOD = encode_frame(1000, torch.arange(0, 1000, 50), quantize(torch.linspace(1, 2, 20), "fp16"))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "0 bytes: expected a header of 32"),
        (GOOD.numpy().tobytes()[:-1], "bytes: expected a frame of"),
        (GOOD.numpy().tobytes() + b"\0", "bytes: expected a frame of"),
        (altered(GOOD, 0, b"NOPE"), "begins with b'NOPE'"),
        (altered(GOOD, 4, b"\x02"), "frame version 2: this library reads version 1"),
        (altered(GOOD, 5, b"\x02"), "flags 2"),
        (altered(GOOD, 5, b"\x01"), "a non-finite frame with 20 values"),
        (
            altered(GOOD, 6, bytes([len(VALUE_FORMATS)])),
            f"value format {len(VALUE_FORMATS)}: expected one below {len(VALUE_FORMATS)}",
        ),
        (altered(GOOD, 6, b"\x00"), "exponent -13 with value format fp32"),
        (altered(GOOD, 7, b"\x05"), "index coding 5"),
        (altered(GOOD, 7, b"\x00"), "index coding ALL with 20 of 1000"),
        (altered(GOOD, 7, b"\x01"), "Rice parameter"),
        (altered(GOOD, 8, b"\x3f"), "Rice parameter 63 is too large"),
        (altered(GOOD, 9, b"\x7f"), "exponent 127"),
        (altered(GOOD, 10, b"\x01"), "reserved field 1"),
        (altered(GOOD, 16, (999).to_bytes(8, "little")), "frame of 999 elements: expected 1000"),
        (altered(GOOD, 16, b"\xff" * 8), "elements: expected k <= numel"),
        (altered(GOOD, 24, b"\xff" * 4), "4294967295 of 1000 elements"),
    ],
    ids=range(18),
)
def test_each_bad_field_is_named(raw: bytes, message: str) -> None:
    with pytest.raises(FrameError, match=message):
        decode_frame(raw, numel=1000)


def test_a_flipped_bit_anywhere_is_noticed() -> None:
    raw = GOOD.numpy().tobytes()
    for bit in range(len(raw) * 8):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FrameError):
            decode_frame(flipped, numel=1000)


def bitmap_frame() -> Tensor:
    return encode_frame(11, torch.tensor([0, 2, 4, 6, 8, 9]), quantize(torch.ones(6)))


def raw_frame() -> Tensor:
    frame = encode_frame(2**31 - 1, torch.tensor([2**31 - 2]), quantize(torch.ones(1)))
    assert peek_header(frame).index_coding is IndexCoding.RAW
    return frame


def test_structure_is_checked_whatever_the_checksum_says() -> None:
    assert peek_header(bitmap_frame()).index_coding is IndexCoding.BITMAP
    with pytest.raises(FrameError, match="bitmap holds 7 indices, expected 6"):
        decode_frame(altered(bitmap_frame(), 32, b"\x57"), numel=11)
    with pytest.raises(FrameError, match="bitmap ends in bits that are not zero"):
        decode_frame(altered(bitmap_frame(), 33, b"\x83"), numel=11)
    with pytest.raises(FrameError, match="indices from -1 to -1"):
        decode_frame(altered(raw_frame(), 32, b"\xff" * 4), numel=2**31 - 1)
    infinity = np.float32(np.inf).tobytes()
    with pytest.raises(FrameError, match="a value is not finite"):
        decode_frame(altered(raw_frame(), 36, infinity), numel=2**31 - 1)
    int2 = encode_frame(9, torch.arange(3), quantize(torch.ones(3), "int2"))
    with pytest.raises(FrameError, match="values end in bits that are not zero"):
        decode_frame(altered(int2, int2.numel() - 1, b"\xff"), numel=9)


@pytest.mark.parametrize("coding", list(IndexCoding))
def test_no_allocation_past_what_the_caller_allows(coding: IndexCoding) -> None:
    """A header that claims 2**47 elements, or 4 GB of payload, must cost nothing."""
    header = bytearray(GOOD.numpy().tobytes()[:HEADER_BYTES])
    header[7] = coding
    header[8] = 0
    header[16:24] = (2**47).to_bytes(8, "little")
    header[24:28] = b"\xff" * 4
    header[12:16] = b"\xff" * 4
    claims = [bytes(header), bytes(header) + b"\xff" * 5000]
    header[16:24] = (1000).to_bytes(8, "little")
    header[24:28] = (1000).to_bytes(4, "little")
    claims += [bytes(header), bytes(header) + b"\xff" * 5000]
    tracemalloc.start()
    try:
        for claim in claims:
            for padded in (False, True):
                with pytest.raises(FrameError):
                    decode_frame(sealed(claim), numel=1000, padded=padded)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
