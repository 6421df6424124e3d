import math
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from topq_dist.compress.codec.frame import Frame
from topq_dist.compress.residual import update_residual
from topq_dist.compress.sparsify.magnitude import Selection
from topq_dist.compress.sparsify.topk import Selector, select_rows
from topq_dist.compress.sparsify.topk_torch import select_with_torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
RESIDUAL_DTYPE = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}
SIGNED = {2: torch.int16, 4: torch.int32, 8: torch.int64}


pytestmark = pytest.mark.usefixtures("one_thread")


# half of torch's threads work: one, two and three
@pytest.fixture(params=[1, 4, 6])
def threads(request: pytest.FixtureRequest, one_thread: None) -> int:
    torch.set_num_threads(request.param)
    return int(request.param)


def bits(vector: Tensor) -> Tensor:
    return vector.view(SIGNED[vector.dtype.itemsize])


def same_numbers(one: Tensor, other: Tensor) -> bool:
    # which of the many NaNs a conversion makes depends on where in the vector it is
    return bool(((bits(one) == bits(other)) | (one.isnan() & other.isnan())).all())


def sorted_magnitudes(values: Tensor) -> Tensor:
    return values.abs().double().sort().values


def assert_is_top_k(picked: Selection, vector: Tensor, k: int) -> None:
    assert picked.indices.dtype == torch.int64
    assert picked.indices.shape == picked.values.shape == (k,)
    assert bool((picked.indices.diff() > 0).all())
    if k:
        assert int(picked.indices[0]) >= 0
        assert int(picked.indices[-1]) < vector.numel()
    assert same_numbers(picked.values, vector[picked.indices])
    expected = torch.topk(vector.abs(), k, sorted=False).values
    assert torch.equal(
        sorted_magnitudes(picked.values).nan_to_num(nan=math.inf),
        sorted_magnitudes(expected).nan_to_num(nan=math.inf),
    )
    assert int(picked.values.isnan().sum()) == int(expected.isnan().sum())
    assert picked.finite == bool(torch.isfinite(vector).all())


def draw_vector(generator: torch.Generator, numel: int, dtype: torch.dtype, kind: int) -> Tensor:
    """One of several hard shapes of data, each with its own trap."""
    normal = torch.randn(numel, generator=generator)
    uniform = torch.rand(numel, generator=generator)
    match kind:
        case 0 | 1 | 2:
            vector = normal
        case 3:  # scales that leave any warm threshold useless
            vector = normal * 10.0 ** float(torch.randint(-6, 5, (1,), generator=generator))
        case 4:  # one value everywhere
            vector = torch.full((numel,), float(normal.sum()) or 1.0)
        case 5:  # zeros, of both signs, nearly everywhere
            vector = torch.where(uniform < 0.01, normal, normal * 0.0)
        case 6:  # heavy ties
            vector = (normal * 2.0).round()
        case 7:  # denormals of fp32, and of fp64 after the cast
            vector = normal * 1e-42
        case 8:  # heavy tail
            vector = normal / (uniform + 1e-4)
        case _:  # NaN and infinity among the rest
            vector = normal.clone()
            vector[uniform < 0.002] = math.nan
            vector[uniform > 0.998] = -math.inf
    return vector.to(dtype)


def draw_numel(generator: torch.Generator) -> int:
    """Mostly small, some past the size where searching begins, a few up to a million."""
    draw = float(torch.rand(1, generator=generator))
    top = 7.0 if draw < 0.9 else 12.0 if draw < 0.985 else math.log(1_000_000)
    return int(math.exp(float(torch.rand(1, generator=generator)) * top)) - 1


def test_ten_thousand_vectors_against_torch_topk() -> None:
    generator = torch.Generator().manual_seed(20)
    checked = 0
    while checked < 10_000:
        numel = draw_numel(generator)
        dtype = DTYPES[int(torch.randint(4, (1,), generator=generator))]
        with_residual = bool(torch.randint(2, (1,), generator=generator))
        density = 10.0 ** -(float(torch.rand(1, generator=generator)) * 3.0)
        residual = torch.zeros(numel, dtype=RESIDUAL_DTYPE[dtype]) if with_residual else None
        # one selector through changes of kind and scale
        selector = Selector()
        for _ in range(5):
            kind = int(torch.randint(10, (1,), generator=generator))
            gradient = draw_vector(generator, numel, dtype, kind)
            share = density if kind else float(torch.rand(1, generator=generator))
            k = round(share * numel)
            total = gradient if residual is None else residual + gradient
            picked = selector.select(gradient, k, residual=residual)
            assert_is_top_k(picked, total, k)
            if residual is not None and picked.finite:
                update_residual(residual, gradient, picked.indices, torch.zeros_like(picked.values))
            checked += 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_operations_select_the_same_magnitudes(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    for kind in range(10):
        for numel, k in ((0, 0), (1, 1), (7, 0), (1000, 10), (20_000, 20_000), (50_000, 400)):
            gradient = draw_vector(generator, numel, dtype, kind)
            assert_is_top_k(select_with_torch(gradient, k), gradient, k)
            residual = torch.randn(numel, generator=generator).to(RESIDUAL_DTYPE[dtype])
            picked = select_with_torch(gradient, k, residual=residual)
            assert_is_top_k(picked, residual + gradient, k)


def test_any_number_of_threads_selects_the_same(threads: int) -> None:
    generator = torch.Generator().manual_seed(5)
    selector, residual = Selector(), torch.zeros(1_500_000)
    for step in range(6):
        gradient = draw_vector(generator, residual.numel(), torch.float32, 0) * 4.0 ** (step % 3)
        picked = selector.select(gradient, 15_000, residual=residual)
        assert_is_top_k(picked, residual + gradient, 15_000)
        expected = residual + gradient
        expected[picked.indices] = 0.0
        update_residual(residual, gradient, picked.indices, torch.zeros(15_000))
        assert torch.equal(residual, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_gradients_across_block_edges(dtype: torch.dtype, threads: int) -> None:
    generator = torch.Generator().manual_seed(6)
    gradient = draw_vector(generator, 700_001, dtype, 8)
    residual = torch.randn(700_001, generator=generator)
    picked = Selector().select(gradient, 7_000, residual=residual)
    assert_is_top_k(picked, residual + gradient, 7_000)
    expected = residual + gradient
    expected[picked.indices] = 0.25
    update_residual(residual, gradient, picked.indices, torch.full((7_000,), 0.25))
    assert torch.equal(residual, expected)


@pytest.mark.parametrize("numel", [5, 40_000, 600_000])
def test_of_equal_magnitudes_the_lowest_indices_are_kept(numel: int) -> None:
    vector = torch.ones(numel)
    vector[::2] = -1.0
    vector[numel - 2] = 3.0
    selector = Selector()
    for k in (1, 3, 4):
        expected = [*range(k - 1), numel - 2]
        assert selector.select(vector, k).indices.tolist() == expected


def test_zeros_fill_up_from_the_front() -> None:
    vector = torch.zeros(100_000)
    vector[[4, 70_000]] = torch.tensor([-1e-45, 2.0])
    selector = Selector()
    for _ in range(3):
        picked = selector.select(vector, 6)
        assert picked.indices.tolist() == [0, 1, 2, 3, 4, 70_000]
        assert_is_top_k(picked, vector, 6)


def test_a_vector_of_few_different_magnitudes() -> None:
    generator = torch.Generator().manual_seed(9)
    vector = torch.randint(1, 4, (900_000,), generator=generator).float()
    selector = Selector()
    for k in (5, 9_000, 299_000, 301_000, 800_000):
        picked = selector.select(vector, k)
        assert_is_top_k(picked, vector, k)
        lowest = float(picked.values.min())
        tied = (vector == lowest).nonzero().view(-1)
        kept = picked.indices[picked.values == lowest]
        assert torch.equal(kept, tied[: kept.numel()])


@pytest.mark.parametrize("numel", [0, 1, 300, 300_000])
def test_nothing_and_everything(numel: int, threads: int) -> None:
    vector = torch.arange(numel, dtype=torch.float32)
    nothing = Selector().select(vector, 0)
    assert nothing.indices.numel() == nothing.values.numel() == 0
    assert nothing.finite
    everything = Selector().select(vector, numel)
    assert torch.equal(everything.indices, torch.arange(numel))
    assert torch.equal(everything.values, vector)
    # what is returned must not change with the vector
    vector += 1.0
    assert torch.equal(everything.values, vector - 1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("k", [0, 1, 500, 50_000])
def test_one_number_that_is_not_finite_is_always_reported(bad: float, k: int) -> None:
    gradient, residual = torch.randn(50_000), torch.randn(50_000)
    selector = Selector()
    assert selector.select(gradient, k, residual=residual).finite
    gradient[49_999] = bad
    before = residual.clone()
    assert not selector.select(gradient, k, residual=residual).finite
    assert not select_with_torch(gradient, k, residual=residual).finite
    assert torch.equal(residual, before)
    # and the next step is as good as any
    gradient[49_999] = 0.0
    assert_is_top_k(selector.select(gradient, k, residual=residual), gradient + residual, k)


def test_a_sum_that_overflows_is_not_finite() -> None:
    gradient, residual = torch.full((3,), 3e38), torch.full((3,), 3e38)
    assert not Selector().select(gradient, 1, residual=residual).finite


@given(
    rows=st.integers(0, 40),
    row_numel=st.integers(1, 50),
    seed=st.integers(0, 2**32),
    kind=st.integers(0, 9),
    dtype=st.sampled_from(DTYPES),
    with_residual=st.booleans(),
    data=st.data(),
)
@settings(max_examples=300, deadline=None)
def test_exactly_k_of_every_row(
    rows: int,
    row_numel: int,
    seed: int,
    kind: int,
    dtype: torch.dtype,
    with_residual: bool,
    data: st.DataObject,
) -> None:
    k = data.draw(st.integers(0, row_numel))
    generator = torch.Generator().manual_seed(seed)
    matrix = draw_vector(generator, rows * row_numel, dtype, kind).view(rows, row_numel)
    residual = torch.randn(matrix.shape, generator=generator) if with_residual else None
    if residual is not None:
        residual = residual.to(RESIDUAL_DTYPE[dtype])
    picked = select_rows(matrix, k, residual=residual)
    total = matrix if residual is None else residual + matrix
    assert_is_top_k_of_rows(picked, total, k)


def assert_is_top_k_of_rows(picked: Selection, total: Tensor, k: int) -> None:
    rows, row_numel = total.shape
    assert picked.finite == bool(torch.isfinite(total).all())
    assert picked.indices.numel() == rows * k
    assert bool((picked.indices.diff() > 0).all())
    if k == 0:
        return
    within = picked.indices.view(rows, k) - torch.arange(rows)[:, None] * row_numel
    assert bool(((within >= 0) & (within < row_numel)).all())
    assert same_numbers(picked.values, total.reshape(-1)[picked.indices])
    got = picked.values.view(rows, k).abs().double().nan_to_num(nan=math.inf).sort().values
    expected = total.abs().topk(k, dim=1).values.double().nan_to_num(nan=math.inf).sort().values
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("rows", "row_numel", "k"),
    [(1, 700_000, 7000), (3, 300_000, 2999), (700, 1000, 10), (600_000, 1, 1), (300_000, 2, 1)],
)
def test_rows_of_every_length(rows: int, row_numel: int, k: int, threads: int) -> None:
    generator = torch.Generator().manual_seed(8)
    for kind in (0, 6):
        matrix = draw_vector(generator, rows * row_numel, torch.float32, kind)
        residual = torch.randn(matrix.shape, generator=generator).round()
        matrix, residual = matrix.view(rows, row_numel), residual.view(rows, row_numel)
        picked = select_rows(matrix, k, residual=residual)
        assert_is_top_k_of_rows(picked, matrix + residual, k)
        by_torch = select_with_torch(
            matrix.view(-1), k, residual=residual.view(-1), row_numel=row_numel
        )
        assert_is_top_k_of_rows(by_torch, matrix + residual, k)


def test_selectors_in_several_threads_do_not_disturb_each_other() -> None:
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            generator = torch.Generator().manual_seed(seed)
            selector = Selector()
            for step in range(8):
                vector = draw_vector(generator, 400_000, torch.float32, 0) * (step + 1)
                assert_is_top_k(selector.select(vector, 4000), vector, 4000)
        except BaseException as failure:  # noqa: BLE001
            failures.append(failure)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


FORK = """
import os, sys, torch
from topq_dist.compress.sparsify.topk import Selector
torch.set_num_threads(4)
vector = torch.randn(600_000)
expected = Selector().select(vector, 6000).indices
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(Selector().select(vector, 6000).indices, expected) else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(sys, "getdlopenflags"), reason="needs fork")
def test_a_forked_child_selects_and_nothing_hangs_at_exit() -> None:
    assert subprocess.run([sys.executable, "-c", FORK], timeout=120, check=False).returncode == 0


@pytest.mark.parametrize(
    ("gradient", "k", "residual", "message"),
    [
        (torch.zeros(2, 2), 1, None, r"gradient has shape \(2, 2\)"),
        (torch.zeros(4, dtype=torch.int64), 1, None, "gradient has .*int64"),
        (torch.zeros(8)[::2], 1, None, "contiguous"),
        (torch.zeros(4), 5, None, r"k=5: expected a number in \[0, 4\]"),
        (torch.zeros(4), -1, None, "k=-1"),
        (torch.zeros(4), 1, torch.zeros(5), r"residual has shape \(5,\).*expected \(4,\)"),
        (torch.zeros(4), 1, torch.zeros(4).double(), "residual has .*float64.*expected"),
        (torch.zeros(4).double(), 1, torch.zeros(4), "residual has .*float32.*expected"),
        (torch.zeros(4).half(), 1, torch.zeros(4).half(), "residual has .*float16.*expected"),
    ],
)
def test_bad_input_is_named(
    gradient: Tensor, k: int, residual: Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Selector().select(gradient, k, residual=residual)


def test_bad_matrices_are_named() -> None:
    with pytest.raises(ValueError, match=r"matrix has shape \(4,\)"):
        select_rows(torch.zeros(4), 1)
    with pytest.raises(ValueError, match=r"k=4: expected a number in \[0, 3\]"):
        select_rows(torch.zeros(2, 3), 4)


def test_terms_of_another_dtype_are_refused_and_change_nothing() -> None:
    values = torch.tensor([1.0])
    terms = [Frame(numel=5, indices=torch.tensor([3]), values=values, finite=True)]
    at, value = torch.tensor([1]), torch.tensor([9.0])
    for gradient, residual in (
        (torch.ones(5, dtype=torch.float16), torch.ones(5)),
        (torch.ones(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)),
    ):
        with pytest.raises(ValueError, match="expected one dtype"):
            update_residual(residual, gradient, at, value.to(residual), replace_by=terms)
        assert gradient.tolist() == residual.tolist() == [1.0] * 5
