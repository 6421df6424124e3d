"""Coherence of gradients that agree, and of such that do not."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from topq_dist.compress.coherence import (
    NO_COHERENCE,
    Coherence,
    CoherenceMean,
    bounded_total,
    measure_coherence,
    measure_energies,
    total,
)
from topq_dist.compress.layout import ChunkedVector, Layout

NUMEL, WAIT = 2_000, 20


def layout_of(*numels: int) -> Layout:
    return Layout(names=tuple(map(str, numels)), shapes=tuple((numel,) for numel in numels))


def steps_of(gradients: list[torch.Tensor]) -> CoherenceMean:
    """Return the mean after steps in which each coordinate waits for WAIT of them, in turn."""
    residual, mean = torch.zeros(NUMEL), CoherenceMean()
    for step, gradient in enumerate(gradients):
        mean.add(measure_coherence(gradient, residual, layout_of(NUMEL)))
        residual += gradient
        residual[step % WAIT :: WAIT] = 0.0
    return mean


def test_gradients_that_agree_are_short_of_what_a_division_takes_off() -> None:
    factor = steps_of([torch.ones(NUMEL)] * 10 * WAIT).rate_factor(1 / WAIT)
    # residuals of 0 to WAIT - 1 gradients, WAIT / 2 of them on average
    assert factor == pytest.approx(math.sqrt(WAIT), rel=0.01)


def test_independent_gradients_want_no_factor() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(NUMEL, generator=generator) for _ in range(10 * WAIT)]
    assert steps_of(noise).rate_factor(1 / WAIT) == pytest.approx(1.0, abs=0.1)


def test_gradients_that_turn_round_do_not_lower_the_rate() -> None:
    turning = [torch.full((NUMEL,), (-1.0) ** step) for step in range(10 * WAIT)]
    assert steps_of(turning).rate_factor(1 / WAIT) == 1.0


@given(
    st.floats(-1e30, 1e30),
    st.floats(0.0, 1e30),
    st.just(0.0) | st.floats(1e-12, 1.0),
)
def test_the_factor_stays_between_one_and_the_rate_of_gradients_sent_whole(
    aligned: float, energy: float, sent_fraction: float
) -> None:
    mean = CoherenceMean()
    mean.add(Coherence(aligned, energy))
    factor = mean.rate_factor(sent_fraction)
    whole = 1.0 / sent_fraction if sent_fraction > 0.0 else 1.0
    assert 1.0 <= factor**2 <= max(1.0, whole) * (1.0 + 1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_sums_that_are_not_finite_say_nothing(bad: float) -> None:
    mean = CoherenceMean()
    mean.add(Coherence(2.0, 1.0))
    before = mean.state()
    mean.add(Coherence(bad, 1.0))
    mean.add(Coherence(1.0, bad))
    assert mean.state() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_sample_of_a_long_vector_says_as_much(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(3_000_001, generator=generator).to(dtype)
    residual = 3.0 * gradient.to(torch.float32) + torch.randn(3_000_001, generator=generator)
    aligned, energy = measure_coherence(gradient, residual, layout_of(3_000_001))
    assert aligned / energy == pytest.approx(3.0, rel=0.01)


def test_bucketing_does_not_show() -> None:
    generator = torch.Generator().manual_seed(0)
    numels = (3, 20_011, 100_003)
    gradients = [torch.randn(numel, generator=generator) for numel in numels]
    residuals = [torch.randn(numel, generator=generator) for numel in numels]
    whole = measure_coherence(torch.cat(gradients), torch.cat(residuals), layout_of(*numels))
    turned = measure_coherence(
        torch.cat(gradients[::-1]), torch.cat(residuals[::-1]), layout_of(*numels[::-1])
    )
    alone = total(
        measure_coherence(one, other, layout_of(numel))
        for one, other, numel in zip(gradients, residuals, numels, strict=True)
    )
    for other in (turned, alone):
        assert other == pytest.approx(whole, rel=1e-12)


def test_sums_add_up() -> None:
    assert total([]) == NO_COHERENCE
    assert total([Coherence(1.0, 2.0), Coherence(-3.0, 4.0)]) == Coherence(-2.0, 6.0)


def test_a_mean_goes_on_where_it_was() -> None:
    mean, other = CoherenceMean(), CoherenceMean()
    mean.add(Coherence(2.0, 1.0))
    other.load_state(other.check_state(mean.state()))
    for one in (mean, other):
        one.add(Coherence(0.5, 1.0))
    assert mean.state() == other.state()
    assert mean.rate_factor(0.1) == other.rate_factor(0.1) > 1.0


@pytest.mark.parametrize("worst", [(1e308, 1.0), (-1e308, 1.0), (1e308, 1e308), (0.0, 1e300)])
def test_no_worker_outweighs_the_others(worst: tuple[float, float]) -> None:
    others = [Coherence(0.5, 1.0)] * 4
    aligned, energy = bounded_total([*others, Coherence(*worst)])
    assert abs(aligned - 2.0) <= 4.0
    assert 4.0 <= energy <= 8.0
    # of two, neither by more than four times
    assert bounded_total([others[0], Coherence(*worst)]).size <= 5.0


def test_workers_that_differ_as_batches_do_are_added_up_as_they_are() -> None:
    given = [Coherence(0.1, 1.0), Coherence(-0.3, 0.7), Coherence(2.0, 2.5), Coherence()]
    assert bounded_total(given) == total(given)
    assert bounded_total([Coherence(1e308, 0.0)]) == Coherence(1e308, 0.0)
    assert bounded_total([]) == Coherence()


@pytest.mark.parametrize("size", [5e-324, 1e-3, 1.0, 1e308])
def test_in_size_one_only_the_direction_is_left(size: float) -> None:
    assert Coherence(-size, 0.0).of_size_one == Coherence(-1.0, 0.0)
    assert Coherence(size, size).of_size_one == Coherence(1.0, 1.0)
    assert NO_COHERENCE.of_size_one == NO_COHERENCE


@pytest.mark.parametrize("numels", [(8_000, 7_000, 40_000), (5, 0, 9_000), (20_000, 20_000, 3)])
def test_a_vector_in_chunks_says_what_it_says_in_one(numels: tuple[int, ...]) -> None:
    layout = Layout(names=("a", "b", "c"), shapes=tuple((numel,) for numel in numels))
    chunks = [torch.randn(numel) for numel in numels]
    whole, residual = torch.cat(chunks), torch.randn(sum(numels))
    in_chunks = measure_coherence(ChunkedVector(chunks), residual, layout)
    assert in_chunks == measure_coherence(whole, residual, layout)


def test_energies_are_about_those_of_all_elements() -> None:
    layout = Layout(names=("a", "b", "c"), shapes=((9_000,), (700, 1_000), (3,)))
    gradient, residual = torch.randn(layout.numel), 3.0 * torch.randn(layout.numel)
    expected = [float(one.double().square().sum()) for one in (residual, gradient)]
    assert measure_energies(gradient, residual, layout) == pytest.approx(expected, rel=0.05)
    chunks = ChunkedVector([gradient[where] for where in layout.slices()])
    assert measure_energies(chunks, residual, layout) == pytest.approx(expected, rel=0.05)
