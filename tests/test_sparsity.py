"""Top-Q itself, checked against a slow reading of its definition and against rai_toolbox."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from topq_dist import sparsity, validation


@pytest.mark.parametrize(
    ("q", "numel", "k"),
    [(0.5, 5, 2), (0.5, 7, 4), (0.3, 5, 4), (0.95, 10, 1), (0.0, 9, 9), (1.0, 9, 0), (0.7, 0, 0)],
)
def test_k_is_rounded_half_to_even(q: float, numel: int, k: int) -> None:
    assert sparsity.k_from_q(q, numel) == k


@pytest.mark.parametrize(
    ("shape", "param_ndim", "batch"),
    [
        ((3, 5, 2), 0, (30, 1)),
        ((3, 5, 2), 1, (15, 2)),
        ((3, 5, 2), 2, (3, 5, 2)),
        ((3, 5, 2), 3, (1, 3, 5, 2)),
        ((3, 5, 2), None, (1, 3, 5, 2)),
        ((3, 5, 2), -1, (3, 5, 2)),
        ((3, 5, 2), -2, (15, 2)),
        ((3, 5, 2), -3, (30, 1)),
        ((4,), -1, (4, 1)),
        ((4,), 0, (4, 1)),
        ((4,), 1, (1, 4)),
        ((), None, (1, 1)),
        ((), 0, (1, 1)),
        ((0, 5), 1, (0, 5)),
        ((0, 5), None, (1, 0, 5)),
        ((2, 0), -1, (2, 0)),
    ],
)
def test_batch_and_row_shapes(
    shape: tuple[int, ...], param_ndim: int | None, batch: tuple[int, ...]
) -> None:
    assert sparsity.batch_shape(shape, param_ndim) == batch
    assert sparsity.row_shape(shape, param_ndim) == (batch[0], math.prod(batch[1:]))


@pytest.mark.parametrize(("shape", "param_ndim"), [((), -1), ((), 1), ((3,), 2), ((3, 4), -3)])
def test_param_ndim_beyond_the_shape_is_refused(shape: tuple[int, ...], param_ndim: int) -> None:
    with pytest.raises(ValueError, match=rf"param_ndim={param_ndim}: expected at most"):
        sparsity.batch_shape(shape, param_ndim)


def test_draw_takes_one_number_and_stays_in_range() -> None:
    generator, twin = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    for q, dq in ((0.5, 0.2), (0.95, 0.2), (0.01, 0.2), (0.0, 1.0), (1.0, 0.3)):
        low, high = max(0.0, q - dq), min(1.0, q + dq)
        unit = torch.rand(1, generator=twin)
        drawn = sparsity.draw_q(q, dq, generator)
        assert low <= drawn <= high
        assert drawn == float((high - low) * unit + low)
    assert torch.equal(generator.get_state(), twin.get_state())


@pytest.mark.parametrize(("q", "dq"), [(0.9, 0.0), (0.5, 1e-20), (1.0, 0.0)])
def test_draw_takes_nothing_where_nothing_can_vary(q: float, dq: float) -> None:
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    assert sparsity.draw_q(q, dq, generator) == q
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("value", ["0.5", None, True, 1j, torch.tensor(0.5), [0.5]])
def test_what_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match=r"q=.*expected a number"):
        validation.check_fraction("q", value)


@pytest.mark.parametrize("value", [-0.1, 1.1, 7, math.nan, math.inf])
def test_what_is_no_fraction_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"q=.*expected a"):
        validation.check_fraction("q", value)


@pytest.mark.parametrize("value", [0, 1, 0.5, np.float32(0.5), np.float64(0.25), Fraction(1, 3)])
def test_every_kind_of_real_number_is_a_fraction(value: float) -> None:
    assert validation.check_fraction("q", value) == float(value)


@pytest.mark.parametrize("value", [1.0, "1", True, torch.tensor(1)])
def test_param_ndim_of_another_type_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match=r"param_ndim=.*expected an integer or None"):
        sparsity.check_param_ndim(value)
