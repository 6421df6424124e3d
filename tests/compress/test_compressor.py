"""The four stages in a row: what is sent and what is kept add up, whatever the format."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from topq_dist import Compressor, FrameError
from topq_dist.compress.aggregate import average, decode_partition
from topq_dist.compress.codec.values import VALUE_FORMATS
from topq_dist.compress.compressor import TopKCompressor
from topq_dist.compress.layout import Layout
from topq_dist.compress.sparsify.segments import Segment


def dense(compressor: Compressor, frame: Tensor, like: Tensor) -> Tensor:
    return compressor.decompress(frame, torch.empty_like(like, dtype=torch.float32))


@settings(max_examples=150, deadline=None)
@given(
    shape=st.lists(st.integers(0, 12), max_size=3),
    q=st.floats(0, 1),
    value_format=st.sampled_from(VALUE_FORMATS),
    scale=st.sampled_from([1e-30, 1e-8, 1.0, 1e30]),
    seed=st.integers(0, 2**31),
)
def test_sent_and_residual_make_up_gradient_and_previous_residual(
    shape: list[int], q: float, value_format: str, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    compressor = Compressor(q=q, value_format=value_format)
    before = torch.zeros(shape)
    for _ in range(4):
        gradient = torch.randn(shape, generator=generator) * scale
        frame = compressor.compress("w", gradient)
        sent = dense(compressor, frame, gradient)
        residual = compressor.state_dict()["w"]
        compensated = gradient + before
        # the residual is the fp32 difference where something was sent, and the sum elsewhere
        assert torch.equal(residual, torch.where(sent != 0, compensated - sent, compensated))
        if value_format == "fp32":
            assert torch.equal(sent + residual, compensated)
        before = residual


def test_exactly_the_top_q_part_is_sent() -> None:
    gradient = torch.tensor([[0.5, -4.0, 1.0], [3.0, -0.1, 2.0]])
    compressor = Compressor(q=0.5, value_format="fp32")
    sent = dense(compressor, compressor.compress("w", gradient), gradient)
    assert sent.tolist() == [[0, -4, 0], [3, 0, 2]]
    assert compressor.state_dict()["w"].tolist() == [[0.5, 0, 1], [0, pytest.approx(-0.1), 0]]


def test_without_feedback_nothing_is_kept() -> None:
    compressor = Compressor(q=0.5, value_format="fp32", error_feedback=False)
    gradient = torch.tensor([1.0, 2.0])
    for _ in range(2):
        sent = dense(compressor, compressor.compress("w", gradient), gradient)
        assert sent.tolist() == [0, 2]
    assert compressor.state_dict() == {}
    assert gradient.tolist() == [1, 2]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("feedback", [False, True])
def test_a_gradient_that_overflowed_arrives_as_nan_and_leaves_the_residual(
    bad: float, feedback: bool
) -> None:
    compressor = Compressor(q=0.5, error_feedback=feedback)
    compressor.compress("w", torch.tensor([1.0, 2.0, 3.0, 4.0]))
    before = compressor.state_dict()
    overflowed = torch.tensor([1.0, bad, 3.0, 4.0])
    received = dense(compressor, compressor.compress("w", overflowed), overflowed)
    assert not received.isfinite().any()
    after = compressor.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_one_overflowing_segment_keeps_every_residual_of_the_vector() -> None:
    layout = Layout(names=("a", "b"), shapes=((2,), (2, 2)))
    segments = [
        Segment(start=0, rows=1, row_numel=2, k=1),
        Segment(start=2, rows=2, row_numel=2, k=1),
    ]
    compressor = TopKCompressor(value_format="fp32", error_feedback=True)
    compressed = compressor.compress(torch.tensor([1.0, 2.0, 4.0, 3.0, 5.0, 6.0]), layout, segments)
    compressor.residuals.apply(compressed.update)
    assert average(compressed.frames, out=torch.empty(6)).tolist() == [0, 2, 4, 0, 0, 6]
    overflowed = torch.tensor([1.0, 2.0, 4.0, 3.0, math.inf, 6.0])
    compressed = compressor.compress(overflowed, layout, segments)
    compressor.residuals.apply(compressed.update)
    assert not average(compressed.frames, out=torch.empty(6)).isfinite().any()
    state = compressor.residuals.state_dict()
    assert state["a"].tolist() == [1, 0]
    assert state["b"].tolist() == [[0, 3], [5, 0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_feed_back_in_at_least_single_precision(dtype: torch.dtype) -> None:
    gradient = torch.randn(50, generator=torch.Generator().manual_seed(1)).to(dtype)
    compressor = Compressor(q=0.9, value_format="fp32")
    frame = compressor.compress("w", gradient)
    residual = compressor.state_dict()["w"]
    assert residual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    out = compressor.decompress(frame, torch.empty(50, dtype=residual.dtype))
    assert torch.equal(out + residual, gradient.to(residual.dtype))


@pytest.mark.parametrize("value_format", VALUE_FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_format_takes_every_dtype_in_parts(value_format: str, dtype: torch.dtype) -> None:
    gradient = torch.randn(3_000, generator=torch.Generator().manual_seed(4)).to(dtype)
    compressor = TopKCompressor(value_format=value_format, error_feedback=True)
    layout = Layout(names=("w",), shapes=((3_000,),))
    segment = Segment(start=0, rows=1, row_numel=3_000, k=300)
    compressed = compressor.compress(gradient, layout, [segment], parts=3)
    received = decode_partition(compressed.frames, numel=3_000)
    compressor.residuals.apply(compressed.update)
    total = compressor.residuals.home(layout).clone()
    for frame in received:
        frame.add_to(total)
    torch.testing.assert_close(total, gradient.to(total.dtype), rtol=1e-6, atol=1e-6)


def test_state_moves_to_another_compressor() -> None:
    one, other = Compressor(q=0.9), Compressor(q=0.9)
    gradient = torch.randn(100, generator=torch.Generator().manual_seed(2))
    one.compress("w", gradient)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.compress("w", gradient), other.compress("w", gradient))


def test_average_divides_and_adds_in_the_order_of_the_frames() -> None:
    compressor = Compressor(q=0.0, value_format="fp32", error_feedback=False)
    gradients = [torch.tensor([1.0, 2.0**-24]), torch.tensor([2.0, 1.0]), torch.tensor([6.0, 1.0])]
    frames = [compressor.compress(str(i), gradient) for i, gradient in enumerate(gradients)]
    shares = [gradient / 3 for gradient in gradients]
    assert torch.equal(average(frames, out=torch.ones(2)), shares[0] + shares[1] + shares[2])


def test_bad_input_names_the_parameter() -> None:
    with pytest.raises(ValueError, match=r"q=1.5: expected a number in \[0, 1\]"):
        Compressor(q=1.5)
    with pytest.raises(ValueError, match="value_format='fp8'"):
        Compressor(value_format="fp8")
    compressor = Compressor()
    with pytest.raises(TypeError, match=r"torch.int64"):
        compressor.compress("w", torch.ones(3, dtype=torch.int64))
    compressor.compress("w", torch.ones(3))
    with pytest.raises(ValueError, match=r"'w' has shape \(3,\)"):
        compressor.compress("w", torch.ones(4))


def test_a_bad_frame_leaves_out_as_it_was() -> None:
    compressor = Compressor()
    frame = compressor.compress("w", torch.ones(300))
    out = torch.full((300,), 7.0)
    frame[-1] += 1
    with pytest.raises(FrameError):
        compressor.decompress(frame, out)
    assert out.tolist() == [7.0] * 300


def test_a_pickled_compressor_goes_on_as_the_original() -> None:
    gradient = torch.randn(100, generator=torch.Generator().manual_seed(2))
    original = Compressor(q=0.9)
    original.compress("w", gradient)
    copied = pickle.loads(pickle.dumps(original))  # noqa: S301
    for _ in range(2):
        assert torch.equal(original.compress("w", gradient), copied.compress("w", gradient))
        assert torch.equal(original.state_dict()["w"], copied.state_dict()["w"])


def test_gradients_that_are_dense_but_not_in_memory_order_are_taken() -> None:
    matrix = torch.randn(6, 7, generator=torch.Generator().manual_seed(3))
    for gradient in (
        matrix.t(),
        matrix[::2],
        torch.ones(()).expand(5, 4),
        torch.conj(matrix).neg(),
    ):
        compressor = Compressor(q=0.0, value_format="fp32")
        out = dense(compressor, compressor.compress("w", gradient), gradient.contiguous())
        assert torch.equal(out, gradient)


@pytest.mark.parametrize(
    "gradient", [None, [1.0], torch.ones(3).to_sparse(), torch.ones(3, device="meta")]
)
def test_what_is_no_dense_gradient_is_refused(gradient: Any) -> None:
    with pytest.raises(TypeError, match="gradient"):
        Compressor().compress("w", gradient)


@pytest.mark.parametrize(
    "residual",
    [None, 1.0, torch.ones(3, dtype=torch.int64), torch.full((3,), math.nan), torch.ones(3).half()],
)
def test_what_is_no_residual_is_refused_and_nothing_changes(residual: Any) -> None:
    compressor = Compressor(q=0.5)
    compressor.compress("w", torch.tensor([1.0, 2.0, 3.0]))
    before = compressor.state_dict()["w"]
    with pytest.raises((TypeError, ValueError), match="'v'"):
        compressor.load_state_dict({"w": torch.zeros(3), "v": residual})
    assert torch.equal(compressor.state_dict()["w"], before)


@pytest.mark.parametrize(
    "out",
    [
        torch.zeros(6)[::2],
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(3, requires_grad=True),
        torch.zeros(3, device="meta"),
    ],
)
def test_what_a_gradient_cannot_be_written_into_is_refused(out: Tensor) -> None:
    frame = Compressor().compress("w", torch.ones(3))
    with pytest.raises(ValueError, match="out has"):
        Compressor().decompress(frame, out)


def test_a_name_that_is_no_string_and_a_switch_that_is_no_bool_are_refused() -> None:
    name: Any = 7
    with pytest.raises(TypeError, match="name=7: expected a string"):
        Compressor().compress(name, torch.ones(3))
    switch: Any = "no"
    with pytest.raises(TypeError, match="error_feedback='no': expected True or False"):
        Compressor(error_feedback=switch)


def test_a_shape_may_change_where_no_residual_is_kept() -> None:
    compressor = Compressor(q=0.0, value_format="fp32", error_feedback=False)
    for shape in ((3,), (2, 5), (), (3,)):
        gradient = torch.randn(shape)
        frame = compressor.compress("w", gradient)
        assert torch.equal(compressor.decompress(frame, torch.empty(shape)), gradient)
    keeping = Compressor(q=0.5)
    keeping.compress("w", torch.randn(3))
    keeping.load_state_dict({})
    keeping.compress("w", torch.randn(4))
    with pytest.raises(ValueError, match=r"'w' has shape \(4,\): expected \(3,\)"):
        keeping.compress("w", torch.randn(3))
