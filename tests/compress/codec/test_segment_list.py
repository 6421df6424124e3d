"""Segments: low-bit blocks begin anew with each, and a frame says where."""

from __future__ import annotations

import hashlib
from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch
from fuzz_frames import seal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from topq_dist.compress.aggregate import decode_partition
from topq_dist.compress.codec.frame import (
    HEADER_BYTES,
    FrameError,
    decode_frame,
    encode_frame,
    max_frame_bytes,
    peek_header,
)
from topq_dist.compress.codec.segment_list import decode_ks, encode_ks
from topq_dist.compress.codec.values import BLOCK_NUMELS, VALUE_FORMATS, quantize
from topq_dist.compress.compressor import TopKCompressor
from topq_dist.compress.layout import Layout
from topq_dist.compress.reduce import PartReducer
from topq_dist.compress.sparsify.segments import Segment, uniform_segments

LOW = st.sampled_from(list(BLOCK_NUMELS))
KS = st.lists(st.one_of(st.integers(0, 5), st.integers(0, 400), st.just(4097)), max_size=12)


def some_values(count: int, seed: int) -> Tensor:
    """Values whose size changes much from place to place."""
    generator = torch.Generator().manual_seed(seed)
    scales = 10.0 ** torch.randint(-3, 3, (count // 50 + 1,), generator=generator)
    return torch.randn(count, generator=generator) * scales.repeat_interleave(50)[:count]


def altered(frame: Tensor, at: int, new: bytes) -> bytes:
    raw = bytearray(frame.numpy().tobytes())
    raw[at : at + len(new)] = new
    seal(raw)
    return bytes(raw)


@settings(max_examples=300, deadline=None)
@given(ks=KS, value_format=LOW, spread=st.integers(1, 30), seed=st.integers(0, 2**31))
def test_a_segment_is_rounded_as_if_it_were_alone(
    ks: list[int], value_format: str, spread: int, seed: int
) -> None:
    k = sum(ks)
    values, indices, numel = some_values(k, seed), torch.arange(k) * spread, k * spread
    quantized = quantize(values, value_format, segment_ks=ks)
    encoded = encode_frame(numel, indices, quantized)
    frame = decode_frame(encoded, numel=numel)
    assert torch.equal(frame.indices, indices)
    assert frame.values.numpy().tobytes() == quantized.decoded.numpy().tobytes()
    for start, stop in pairwise([0, *accumulate(ks)]):
        alone = quantize(values[start:stop], value_format).decoded
        assert torch.equal(alone, frame.values[start:stop])
    longest = max_frame_bytes(numel, k, value_format, segments=len(ks))
    assert peek_header(encoded).frame_bytes == encoded.numel() <= longest
    if sum(one > 0 for one in ks) < 2:
        plain = encode_frame(numel, indices, quantize(values, value_format))
        assert torch.equal(plain, encoded)


@pytest.mark.parametrize("value_format", [f for f in VALUE_FORMATS if f not in BLOCK_NUMELS])
def test_other_formats_have_no_segments(value_format: str) -> None:
    values = some_values(30, 1)
    plain = encode_frame(30, torch.arange(30), quantize(values, value_format))
    segmented = encode_frame(
        30, torch.arange(30), quantize(values, value_format, segment_ks=[10, 20])
    )
    assert torch.equal(plain, segmented)


@pytest.mark.parametrize(
    ("value_format", "sha256"),
    [
        ("int8", "943c09c25b0523d2de656120b9569e00"),
        ("int4", "9c7542de54c7ad0b58847c74e548c372"),
        # before the means of a block of fewer values were those of its values alone: b42a9b0d7100
        ("int2", "beb9879bc691fa0c046463a796111c9c"),
        ("ec1", "d2fea0d37b70b9bf3a44ad89e913d277"),
        ("ec2", "e64969982d9692412d0440992c2718f0"),
        ("ecfp16", "7e6f475db46797ef2f0b34f3caf3f082"),
        ("ecbf16", "9f7f006f93bca6e4c54b8ee8027456f2"),
    ],
)
def test_frames_of_one_segment_are_those_of_older_versions(value_format: str, sha256: str) -> None:
    digest = hashlib.sha256()
    for k in (0, 1, 5, 128, 129, 300, 5000):
        scrambled = np.arange(1, k + 1, dtype=np.uint64) * np.uint64(2654435761) % np.uint64(2**32)
        values = (scrambled.astype(np.float64) / 2**31 - 1).astype(np.float32)
        values += np.sign(values) * np.float32(0.5)
        at = torch.arange(k) * 10
        frame = encode_frame(10 * k + 1, at, quantize(torch.from_numpy(values), value_format))
        digest.update(frame.numpy().tobytes())
    assert digest.hexdigest()[:32] == sha256


@pytest.mark.parametrize("ks", [[1, 1], [3], [-1, 4], [[3]], [2**40, 3 - 2**40]])
def test_segments_that_do_not_fit_are_refused(ks: list[int]) -> None:
    if ks == [3]:
        encode_frame(9, torch.arange(3), quantize(torch.ones(3), "int2", segment_ks=ks))
        return
    with pytest.raises(ValueError, match="expected a sum of 3"):
        encode_frame(9, torch.arange(3), quantize(torch.ones(3), "int2", segment_ks=ks))


@given(ks=st.lists(st.integers(1, 2**32), min_size=2, max_size=50))
def test_lists_come_back(ks: list[int]) -> None:
    listed = encode_ks(np.array(ks, np.int64))
    assert decode_ks(listed, sum(ks)).tolist() == ks
    assert listed.size <= sum(1 + (one.bit_length() - 1) // 7 for one in ks)
    with pytest.raises(ValueError, match="do not add up"):
        decode_ks(listed, sum(ks) - 1)


@given(raw=st.binary(max_size=12), k=st.integers(0, 300))
def test_no_other_list_is_read(raw: bytes, k: int) -> None:
    listed = np.frombuffer(raw, np.uint8)
    try:
        ks = decode_ks(listed, k)
    except ValueError:
        return
    assert ks.size >= 2
    assert ks.sum() == k
    assert encode_ks(ks).tobytes() == raw


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "0 whole numbers"),
        (b"\x05", "1 whole numbers"),
        (b"\x02\x83", "1 whole numbers"),
        (b"\x02\x02\x81", "2 whole numbers"),
        (b"\x05\x00", "zero, or longer"),
        (b"\x02\x83\x00", "zero, or longer"),
        (b"\x02\x83\x80\x80\x80\x80\x01", "over 5 bytes"),
        (b"\x02\x83\x80\x80\x80\x01", "do not add up to 5"),
        (b"\x02\x04", "do not add up to 5"),
    ],
)
def test_bad_lists_are_named(raw: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_ks(np.frombuffer(raw, np.uint8), 5)


INT4 = encode_frame(
    200, torch.arange(0, 200, 2), quantize(torch.linspace(1, 2, 100), "int4", segment_ks=[30, 70])
)
LIST = HEADER_BYTES + 8 + peek_header(INT4).index_bytes


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (altered(INT4, 5, b"\x00"), "bytes: expected a frame of"),
        (altered(INT4, 5, b"\x03"), "flags 3"),
        (altered(INT4, 6, b"\x00"), "flags 2 with value format fp32: it has no segments"),
        (INT4.numpy().tobytes()[:39], "39 bytes: expected a header of 40"),
        (altered(INT4, 32, b"\x00"), "0 bytes of segments with 100 values"),
        (altered(INT4, 32, b"\xff" * 4), "4294967295 bytes of segments"),
        (altered(INT4, 36, b"\x01"), "1 blocks of segments"),
        (altered(INT4, 36, b"\x65"), "101 blocks of segments"),
        (altered(INT4, 36, b"\x03"), "bytes: expected a frame of"),
        (altered(INT4, LIST, b"\x1f"), "segments do not add up to 100"),
        (altered(INT4, LIST, b"\x00\x64"), "zero, or longer"),
        (altered(INT4, LIST, b"\x80"), "1 whole numbers"),
    ],
    ids=range(12),
)
def test_each_bad_field_is_named(raw: bytes, message: str) -> None:
    with pytest.raises(FrameError, match=message):
        decode_frame(raw, numel=200)


def test_blocks_must_be_those_of_the_list() -> None:
    two = encode_frame(
        400, torch.arange(300), quantize(torch.ones(300), "int8", segment_ks=[150, 150])
    )
    assert peek_header(two).blocks == 4
    at = HEADER_BYTES + 8 + peek_header(two).index_bytes
    # as many values, in three blocks; each list of as many bytes
    with pytest.raises(FrameError, match="segments of 3 blocks: expected 4"):
        decode_frame(altered(two, at, encode_ks(np.array([128, 172])).tobytes()), numel=400)


def named(sizes: dict[str, int]) -> Layout:
    return Layout(names=tuple(sizes), shapes=tuple((size,) for size in sizes.values()))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 900), min_size=1, max_size=6),
    order=st.randoms(use_true_random=False),
    value_format=LOW,
    q=st.sampled_from([0.0, 0.5, 0.9, 0.97]),
)
def test_a_bucket_rounds_alike_in_whatever_order(
    sizes: list[int], order: object, value_format: str, q: float
) -> None:
    gradients = {str(i): some_values(size, 7 * i) for i, size in enumerate(sizes)}
    names = list(gradients)
    order.shuffle(names)  # type: ignore[attr-defined]
    sent = []
    for chosen in (list(gradients), names):
        layout = named({name: gradients[name].numel() for name in chosen})
        compressor = TopKCompressor(value_format=value_format, error_feedback=True, bound=2.0)
        for _ in range(2):
            flat = torch.cat([gradients[name] for name in chosen])
            segments = uniform_segments(
                [gradients[n].numel() for n in chosen], q=q, scope="parameter"
            )
            compressed = compressor.compress(flat, layout, segments)
            compressor.residuals.apply(compressed.update)
        dense = torch.zeros(layout.numel)
        decode_frame(compressed.frames[0], numel=layout.numel).add_to(dense)
        state = compressor.residuals.state_dict()
        there = dict(zip(chosen, layout.slices(), strict=True))
        sent.append({name: (dense[there[name]], state[name]) for name in gradients})
    for name in gradients:
        for one, other in zip(sent[0][name], sent[1][name], strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("value_format", VALUE_FORMATS)
def test_parts_and_their_means_keep_segments_apart(value_format: str) -> None:
    # a scale of both would round the second's values to nothing, or to the first's
    sizes = {"large": 4_000, "small": 4_000, "none": 0}
    layout, numel = named(sizes), 8_000
    generator = torch.Generator().manual_seed(3)
    gradient = some_values(numel, 3).sign() * (1 + torch.rand(numel, generator=generator))
    gradient[4_000:] *= 1e-6
    segments = uniform_segments(tuple(sizes.values()), q=0.9, scope="parameter")
    compressors = [TopKCompressor(value_format=value_format, error_feedback=True) for _ in range(2)]
    compressed = [one.compress(gradient, layout, segments, parts=2) for one in compressors]
    reduced = [
        PartReducer(compressors[part].residuals).reduce(
            [one.frames[part] for one in compressed], layout, part=part, parts=2
        )
        for part in range(2)
    ]
    for frames in (compressed[0].frames, [one.frame for one in reduced]):
        dense = torch.zeros(numel)
        for frame in decode_partition(frames, numel=numel):
            frame.add_to(dense)
        where = dense.nonzero().flatten()
        assert where.numel() == 800
        assert bool((dense[where] / gradient[where] - 1).abs().max() < 0.1)
    has_segments = [peek_header(frame).segment_bytes > 0 for frame in compressed[0].frames]
    assert has_segments == [value_format in BLOCK_NUMELS] * 2


def test_a_mean_keeps_segments_apart_that_no_frame_has_two_of() -> None:
    # of its first part one rank sends values of "large" alone, the other of "small" alone
    layout = named({"large": 1_018, "small": 1_018})
    segments = [
        Segment(start=0, rows=1, row_numel=1_018, k=3),
        Segment(start=1_018, rows=1, row_numel=1_018, k=9),
    ]
    gradients = torch.zeros(2, 2_036)
    for gradient, large, small in zip(gradients, (0, 509), (1_018 + 509, 1_018), strict=True):
        gradient[large : large + 3] = torch.tensor([10.0, 20.0, 30.0])
        gradient[small : small + 9] = 1e-6
    compressors = [TopKCompressor(value_format="int2", error_feedback=True) for _ in range(2)]
    compressed = [
        one.compress(gradient, layout, segments, parts=2)
        for one, gradient in zip(compressors, gradients, strict=True)
    ]
    assert all(one.in_segments for one in compressed)
    frames = [one.frames[0] for one in compressed]
    assert not any(peek_header(frame).segment_bytes for frame in frames)
    mean = PartReducer(compressors[0].residuals).reduce(
        frames, layout, part=0, parts=2, in_segments=True
    )
    assert peek_header(mean.frame).segment_bytes == 2
    values = decode_frame(mean.frame, numel=1_018).values
    # the frame of a part has half of the values on average: "small" has three of them
    torch.testing.assert_close(values[-3:], torch.full((3,), 5e-7), rtol=0.1, atol=0)


def test_rows_of_a_parameter_are_one_segment() -> None:
    gradient = some_values(600, 5)
    layout = named({"a": 400, "b": 200})
    segments = [
        Segment(start=0, rows=40, row_numel=10, k=2),
        Segment(start=400, rows=1, row_numel=200, k=20),
    ]
    compressor = TopKCompressor(value_format="int2", error_feedback=False)
    header = peek_header(compressor.compress(gradient, layout, segments).frames[0])
    assert (header.segment_bytes, header.blocks) == (2, 2)
