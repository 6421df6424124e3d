"""One pass over memory, compared with the same in several."""

import contextlib
import gc
import itertools
import math
import signal
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from vectors import DTYPES, drawn

from topq_dist.compress.aggregate import write_sum
from topq_dist.compress.codec.frame import Frame, decode_frame
from topq_dist.compress.compressor import Compressed, TopKCompressor
from topq_dist.compress.kernels import find_reaching
from topq_dist.compress.kernels.scratch import BLOCK_NUMEL
from topq_dist.compress.layout import ChunkedVector, Layout
from topq_dist.compress.named_compressor import Compressor
from topq_dist.compress.residual import update_residual
from topq_dist.compress.sparsify import threshold
from topq_dist.compress.sparsify.segments import Segment
from topq_dist.compress.sparsify.topk import Selector

pytestmark = pytest.mark.usefixtures("one_thread")


def residual_like(gradient: Tensor) -> Tensor:
    wide = torch.float64 if gradient.dtype == torch.float64 else torch.float32
    return torch.zeros(gradient.shape, dtype=wide)


@given(
    seed=st.integers(0, 10_000),
    numel=st.sampled_from([0, 1, 63, 64, 65, 700, 4_097, 9_000, 20_000]),
    fraction=st.sampled_from([0.0, 0.001, 0.01, 0.3, 1.0]),
    dtype=st.sampled_from(DTYPES),
    # from one step to the next: last step's threshold is far too high, or far too low
    scales=st.lists(st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1.0, 1e3]), min_size=1, max_size=4),
)
def test_to_accumulate_and_select_is_to_select_and_to_update(
    seed: int, numel: int, fraction: float, dtype: torch.dtype, scales: list[float]
) -> None:
    k = math.ceil(fraction * numel)
    one, other = Selector(), Selector()
    ours = residual_like(drawn(0, numel, dtype))
    theirs = ours.clone()
    for step, scale in enumerate(scales):
        gradient = drawn(seed + step, numel, dtype, scale=scale)
        untouched = gradient.clone()
        picked = other.select(gradient, k, residual=theirs)
        update_residual(theirs, gradient, picked.indices, picked.values / 3)
        with one.accumulate_and_select(ours, gradient, k) as taken:
            assert taken.finite
            assert torch.equal(taken.indices, picked.indices)
            assert torch.equal(taken.values, picked.values)
            ours[taken.indices] = taken.values / 3
        assert torch.equal(ours, theirs)
        assert torch.equal(gradient, untouched)


@pytest.mark.parametrize("threads", [1, 4, 6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_accumulating_goes_on_past_the_last_candidate_wanted(
    dtype: torch.dtype, threads: int
) -> None:
    torch.set_num_threads(threads)
    numel = 2 * BLOCK_NUMEL + 77
    one, other = Selector(), Selector()
    ours = residual_like(drawn(0, numel, dtype))
    theirs = ours.clone()
    # the second step has many times as many elements above the first one's threshold as have room
    for step, scale in enumerate([1e-2, 1.0, 1e-2]):
        gradient = drawn(2 * step, numel, dtype, scale=scale)
        picked = other.select(gradient, 500, residual=theirs)
        update_residual(theirs, gradient, picked.indices, torch.zeros_like(picked.values))
        with one.accumulate_and_select(ours, gradient, 500) as taken:
            assert torch.equal(taken.indices, picked.indices)
            ours[taken.indices] = 0.0
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(("numel", "k"), [(50, 3), (3 * BLOCK_NUMEL, 900), (50, 50), (50, 0)])
def test_what_is_not_finite_leaves_the_residual_bit_for_bit(
    numel: int, k: int, bad: float, threads: int
) -> None:
    torch.set_num_threads(threads)
    selector, gradient = Selector(), drawn(2, numel, torch.float32)
    residual = drawn(4, numel, torch.float32, scale=1e-6)
    with selector.accumulate_and_select(residual, gradient, k) as taken:
        residual[taken.indices] = 0.0
    residual[-1] = -0.0
    before = residual.clone().view(torch.int32)
    gradient[numel // 2] = bad
    with selector.accumulate_and_select(residual, gradient, k) as taken:
        assert not taken.finite
    assert torch.equal(residual.view(torch.int32), before)


def test_a_sum_may_overflow_where_neither_summand_has() -> None:
    largest = torch.finfo(torch.float32).max
    residual, gradient = torch.zeros(5_000), torch.zeros(5_000)
    residual[7] = gradient[7] = largest
    with Selector().accumulate_and_select(residual, gradient, 5) as taken:
        assert not taken.finite
    assert residual[7] == largest
    assert residual.sum() == largest


def test_a_block_that_raises_leaves_the_residual_as_it_was() -> None:
    residual, gradient = drawn(0, 9_000, torch.float32), drawn(2, 9_000, torch.float32)
    before = residual.clone()

    def interrupted() -> None:
        with Selector().accumulate_and_select(residual, gradient, 9):
            assert not torch.equal(residual, before)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert torch.equal(residual, before)


@pytest.mark.parametrize("threads", [1, 4, 6])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("interrupted", [1, 2, 3])
def test_a_search_that_is_interrupted_leaves_the_residual_as_it_was(
    interrupted: int, dtype: torch.dtype, threads: int
) -> None:
    torch.set_num_threads(threads)
    numel = 4 * BLOCK_NUMEL + 5
    gradient, residual = drawn(2, numel, dtype), drawn(4, numel, torch.float32)
    before = residual.clone()
    calls = itertools.count(1)

    def interrupting(*arguments: Any) -> int:
        found: int = find_reaching(*arguments)
        if next(calls) == interrupted:
            raise KeyboardInterrupt
        return found

    passes = 5 if dtype == torch.float16 else {1: 1, 4: 2, 6: 3}[threads]
    with mock.patch.object(threshold, "find_reaching", interrupting):
        if interrupted > passes:
            return
        with pytest.raises(KeyboardInterrupt):
            Selector().accumulate_and_select(residual, gradient, 900).__enter__()
    assert torch.equal(residual, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_an_interrupt_at_any_time_counts_a_gradient_once_or_not_at_all(dtype: torch.dtype) -> None:
    torch.set_num_threads(4)
    numel = 4 * BLOCK_NUMEL
    gradient = drawn(2, numel, dtype)
    compressor = Compressor(q=0.99)
    for _ in range(3):
        compressor.compress("w", gradient)
    before = compressor.state_dict()
    compressor.compress("w", gradient)
    after = compressor.state_dict()["w"]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def interrupt_after(delay_s: float) -> None:
        time.sleep(delay_s)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    untouched = 0
    # not SIGALRM, with which tests that hang are ended
    previous = signal.signal(signal.SIGUSR1, interrupt)
    # an interrupt within a callback of the collector is printed, not raised
    gc.disable()
    try:
        for step in range(60):
            compressor.load_state_dict(before)
            interrupting = threading.Thread(target=interrupt_after, args=(step * 1e-4,))
            with contextlib.suppress(KeyboardInterrupt):
                interrupting.start()
                compressor.compress("w", gradient)
                interrupting.join()
            interrupting.join()
            residual = compressor.state_dict()["w"]
            untouched += torch.equal(residual, before["w"])
            assert torch.equal(residual, before["w"]) or torch.equal(residual, after)
    finally:
        gc.enable()
        signal.signal(signal.SIGUSR1, previous)
    assert untouched


def test_several_threads_share_a_compressor() -> None:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(20):
            compressor = Compressor(q=0.9)
            with ThreadPoolExecutor(8) as threads:

                def compress(thread: int, compressor: Compressor = compressor) -> None:
                    for name in range(12):
                        compressor.compress(f"{thread}.{name}", torch.ones(20))

                assert list(threads.map(compress, range(8))) == [None] * 8
            assert len(compressor.state_dict()) == 96
    finally:
        sys.setswitchinterval(before)


def test_what_cannot_be_taken_up_changes_nothing() -> None:
    residual, gradient = torch.ones(9), torch.ones(8)
    with pytest.raises(ValueError, match="residual has shape"):
        Selector().accumulate_and_select(residual, gradient, 1).__enter__()
    with pytest.raises(ValueError, match="k=10: expected"):
        Selector().accumulate_and_select(residual, torch.ones(9), 10).__enter__()
    assert residual.tolist() == [1.0] * 9


@pytest.mark.parametrize("value_format", ["fp32", "fp16", "int4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_compressor_sends_what_a_step_in_two_halves_sends(
    value_format: str, dtype: torch.dtype
) -> None:
    numel = 30_000
    layout = Layout(names=("w",), shapes=((numel,),))
    segment = Segment(start=0, rows=1, row_numel=numel, k=300)
    ours = Compressor(q=0.99, value_format=value_format)
    theirs = TopKCompressor(value_format=value_format, error_feedback=True)
    for step in range(4):
        gradient = drawn(2 * step, numel, dtype, scale=10.0**step)
        if step == 2:
            gradient[5] = math.nan
        compressed = theirs.compress(gradient, layout, [segment])
        theirs.residuals.apply(compressed.update)
        assert torch.equal(ours.compress("w", gradient), compressed.frames[0])
        assert torch.equal(ours.state_dict()["w"], theirs.residuals.state_dict()["w"])


def averaged(
    compressor: TopKCompressor,
    compressed: Compressed,
    frames: Sequence[Frame],
    gradient: Tensor,
    *,
    fused: bool,
) -> Tensor:
    if fused:
        compressor.update_and_write(compressed, frames, divisor=len(frames))
        return gradient
    compressor.residuals.apply(compressed.update)
    return write_sum(frames, divisor=len(frames), out=gradient.clone())


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_the_average_is_that_of_a_sum_of_its_own(
    ranks: int, dtype: torch.dtype, feedback: bool, threads: int
) -> None:
    torch.set_num_threads(threads)
    shapes = ((500, 601), (1_000,), (70, 41))
    layout = Layout(names=("a", "b", "c"), shapes=shapes)
    slices = layout.slices()
    value_format = "fp64" if dtype == torch.float64 else "fp16"

    def compress(rank: int) -> tuple[TopKCompressor, Compressed, Tensor]:
        # some send nothing of a tensor, one sends everything of it
        ks = [3_000, 10 * rank, 2_870 if rank == 1 else 0]
        segments = [
            Segment(start=where.start, rows=1, row_numel=where.stop - where.start, k=k)
            for where, k in zip(slices, ks, strict=True)
        ]
        gradient = drawn(2 * rank, layout.numel, dtype)
        compressor = TopKCompressor(value_format=value_format, error_feedback=feedback)
        return compressor, compressor.compress(gradient, layout, segments), gradient

    frames = [compress(rank)[1].frames[0] for rank in range(ranks)]
    results = []
    for fused in (True, False):
        compressor, compressed, gradient = compress(0)
        decoded = [decode_frame(frame, numel=layout.numel) for frame in frames]
        mean = averaged(compressor, compressed, decoded, gradient, fused=fused)
        results.append((mean, compressor.residuals.state_dict()))
    (mean, state), (expected, expected_state) = results
    assert torch.equal(mean, expected)
    assert state.keys() == expected_state.keys()
    assert all(torch.equal(state[name], expected_state[name]) for name in state)


def test_only_a_finite_vector_in_one_piece_can_take_a_sum() -> None:
    layout = Layout(names=("a", "b"), shapes=((2,), (2,)))
    segments = [Segment(start=start, rows=1, row_numel=2, k=1) for start in (0, 2)]
    compressor = TopKCompressor(value_format="fp32", error_feedback=True)
    chunks = [torch.ones(2), torch.ones(2)]
    for gradient in (ChunkedVector(chunks), ChunkedVector([torch.full((4,), math.nan)])):
        compressed = compressor.compress(gradient, layout, segments)
        with pytest.raises(ValueError, match="in one piece"):
            compressor.update_and_write(compressed, [], divisor=1)
    assert [chunk.tolist() for chunk in chunks] == [[1.0, 1.0]] * 2
