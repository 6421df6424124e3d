"""The mean of frames without a dense vector, against the mean of their dense vectors."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from topq_dist.compress.aggregate import average, sparse_mean
from topq_dist.compress.codec.frame import Frame, FrameError, decode_frame, encode_frame
from topq_dist.compress.codec.values import quantize
from topq_dist.compress.layout import Layout
from topq_dist.compress.partition import BlockCyclicPartition
from topq_dist.compress.reduce import PartReducer
from topq_dist.compress.residual import Residuals

NUMEL = 40
# some add up to zero, and some not to the same in another order
VALUES = st.sampled_from([-2.0, -1.0, 0.0, 0.1, 1.0, 2.0, 1e7])
SPARSE = st.dictionaries(st.integers(0, NUMEL - 1), VALUES)


def frame_of(elements: dict[int, float], numel: int = NUMEL, value_format: str = "fp32") -> Tensor:
    indices = torch.tensor(sorted(elements), dtype=torch.int64)
    values = torch.tensor([elements[int(index)] for index in indices], dtype=torch.float64)
    return encode_frame(numel, indices, quantize(values, value_format))


def mean_of(frames: list[Tensor], numel: int = NUMEL) -> Frame:
    return sparse_mean([decode_frame(frame, numel=numel) for frame in frames])


@given(
    drawn=st.lists(SPARSE, min_size=1, max_size=5), value_format=st.sampled_from(["fp32", "fp64"])
)
def test_the_sparse_mean_is_the_dense_one(drawn: list[dict[int, float]], value_format: str) -> None:
    frames = [frame_of(elements, value_format=value_format) for elements in drawn]
    dtype = torch.float64 if value_format == "fp64" else torch.float32
    mean = mean_of(frames)
    assert mean.values.dtype == dtype
    dense = average(frames, out=torch.empty(NUMEL, dtype=dtype))
    assert mean.indices.tolist() == dense.nonzero().flatten().tolist()
    assert torch.equal(mean.values, dense[mean.indices])


def test_whole_vectors_and_empty_ones_have_a_mean() -> None:
    whole = frame_of(dict.fromkeys(range(NUMEL), 4.0))
    assert mean_of([whole, frame_of({}), whole, frame_of({})]).values.eq(2.0).all()
    assert mean_of([frame_of({}), frame_of({})]).indices.tolist() == []
    assert mean_of([frame_of({}, numel=0)], 0).indices.tolist() == []


def test_vectors_longer_than_what_is_added_up_at_once_have_a_mean() -> None:
    numel = 100_003
    generator = torch.Generator().manual_seed(3)
    vectors = [torch.randn(numel, generator=generator) for _ in range(3)]
    frames = []
    for vector in vectors:
        indices = torch.randperm(numel, generator=generator)[:2_000].sort().values
        frames.append(encode_frame(numel, indices, quantize(vector[indices])))
    dense = average(frames, out=torch.empty(numel))
    mean = mean_of(frames, numel)
    assert torch.equal(mean.indices, dense.nonzero().flatten())
    assert torch.equal(mean.values, dense[mean.indices])


@pytest.mark.parametrize("terms", [400, 3_000, 40_000, 100_003])
@pytest.mark.parametrize("value_format", ["fp32", "bf16", "int8", "int4"])
def test_long_vectors_sparse_or_dense_have_a_mean(terms: int, value_format: str) -> None:
    numel = 100_003
    generator = torch.Generator().manual_seed(3)
    frames = []
    for _ in range(3):
        indices = torch.randperm(numel, generator=generator)[:terms].sort().values
        values = torch.randn(terms, generator=generator)
        frames.append(encode_frame(numel, indices, quantize(values, value_format)))
    dense = average(frames, out=torch.empty(numel))
    mean = mean_of(frames, numel)
    assert torch.equal(mean.indices, dense.nonzero().flatten())
    assert torch.equal(mean.values, dense[mean.indices])


def test_an_index_out_of_place_is_an_error() -> None:
    bad = Frame(numel=100_000, indices=torch.tensor([99_000, 3]), values=torch.ones(2), finite=True)
    with pytest.raises(IndexError, match="100000"):
        sparse_mean([bad])


def test_a_frame_of_another_vector_is_not_reduced_with_ours() -> None:
    layout = Layout(names=("a",), shapes=((NUMEL,),))
    with pytest.raises(FrameError, match="40"):
        PartReducer(Residuals()).reduce(
            [frame_of({3: 1.0}), frame_of({3: 1.0}, numel=41)], layout, part=0, parts=1
        )


def test_a_damaged_frame_is_not_believed_to_be_non_finite() -> None:
    layout = Layout(names=("a",), shapes=((NUMEL,),))
    damaged = frame_of({})
    damaged[5] = 1
    with pytest.raises(FrameError):
        PartReducer(Residuals()).reduce([frame_of({3: 1.0}), damaged], layout, part=0, parts=1)


LARGEST = float(torch.finfo(torch.float32).max)


@pytest.mark.parametrize(
    ("values", "error_feedback", "finite"),
    [
        ([LARGEST] * 3, True, False),
        ([LARGEST] * 3, False, True),
        ([LARGEST, -LARGEST, LARGEST / 2], True, True),
        # rounded, as many of them add up to infinity
        ([LARGEST] * 10, True, False),
        ([LARGEST] * 10, False, False),
        # a 25th of it, rounded, is too much 25 times
        ([LARGEST, *[0.0] * 24], True, False),
    ],
)
def test_a_mean_past_what_a_residual_can_hold_is_not_finite(
    values: list[float], error_feedback: bool, finite: bool
) -> None:
    layout = Layout(names=("a",), shapes=((NUMEL,),))
    # "fp64" sums hold more than an fp32 residual
    value_format = "fp64" if error_feedback else "fp32"
    residuals = Residuals()
    residual = residuals.flat(layout, dtype=torch.float32, device=torch.device("cpu"))
    # one is sent, and the other left
    elements = [{1: values[0], 2: values[0] / 2}, *({1: value} for value in values[1:])]
    frames = [frame_of(drawn, value_format=value_format) for drawn in elements]
    reducer = PartReducer(residuals if error_feedback else None)
    reduced = reducer.reduce(frames, layout, part=0, parts=1)
    sent = decode_frame(reduced.frame, numel=NUMEL)
    residuals.apply(reduced.update)
    assert sent.finite == finite
    assert residual.isfinite().all()
    if finite:
        residual.div_(len(values))
        sent.add_to(residual)
        torch.testing.assert_close(residual, average(frames, out=torch.empty(NUMEL)))
    else:
        assert not residual.any()


@given(
    drawn=st.lists(SPARSE, min_size=2, max_size=4),
    part=st.integers(0, 1),
    value_format=st.sampled_from(["fp32", "fp16", "int2", "fp64"]),
)
def test_a_reduced_frame_and_the_residual_of_its_rank_are_the_mean(
    drawn: list[dict[int, float]], part: int, value_format: str
) -> None:
    layout = Layout(names=("a", "b"), shapes=((500,), (600, 1)))
    partition = BlockCyclicPartition(numel=layout.numel, count=2)
    numel = partition.numel_of(part)
    frames = [frame_of(elements, numel=numel, value_format=value_format) for elements in drawn]
    mean = average(frames, out=torch.empty(numel, dtype=torch.float64))
    residuals = Residuals()
    residual = residuals.flat(layout, dtype=torch.float64, device=torch.device("cpu"))
    reduced = PartReducer(residuals).reduce(frames, layout, part=part, parts=2)
    assert not residual.any()
    sent = decode_frame(reduced.frame, numel=numel)
    most = int(np.ceil(np.mean([len(elements) for elements in drawn])))
    assert sent.indices.numel() == min(most, int(mean.float().count_nonzero()))
    residuals.apply(reduced.update)
    left = residual[partition.to_global(part, torch.arange(numel))] / len(frames)
    assert residual.count_nonzero() == left.count_nonzero()
    sent.add_to(left)
    torch.testing.assert_close(left, mean, rtol=1e-6, atol=1e-6 * float(mean.abs().max()))
    # what was not sent at all is nowhere larger than what was
    unsent = mean.index_fill(0, sent.indices, 0.0).abs()
    if sent.indices.numel():
        assert unsent.max() <= mean[sent.indices].abs().min()


def test_without_error_feedback_a_reduced_frame_is_the_mean() -> None:
    layout = Layout(names=("a",), shapes=((NUMEL,),))
    frames = [frame_of({1: 3.0, 2: 1.0, 30: 5.0}), frame_of({2: -1.0, 7: 4.0})]
    reduced = PartReducer(None).reduce(frames, layout, part=0, parts=1)
    sent = decode_frame(reduced.frame, numel=NUMEL)
    # an element that adds up to zero is not worth its place
    assert sent.indices.tolist() == [1, 7, 30]
    assert sent.values.tolist() == [1.5, 2.0, 2.5]
    assert reduced.update is None
