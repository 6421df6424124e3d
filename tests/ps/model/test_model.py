"""The model's layout: what is checked, what goes in and out as bytes, how differences are told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from topq_dist.compress.codec.frame import encode_frame
from topq_dist.compress.codec.values import VALUE_FORMATS, quantize
from topq_dist.ps.model.flat import FlatModel
from topq_dist.ps.model.spec import ModelSpec, TensorSpec
from topq_dist.ps.protocol.errors import InvalidError, ModelDiffersError

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def spec_of(*tensors: tuple[str, tuple[int, ...], torch.dtype]) -> ModelSpec:
    return ModelSpec(tensors=tuple(TensorSpec(name=n, shape=s, dtype=d) for n, s, d in tensors))


SPEC = spec_of(
    ("a.weight", (3, 4), torch.float32),
    ("b", (), torch.bfloat16),
    ("a.bias", (5,), torch.float32),
    ("none", (0, 7), torch.float64),
)


def test_there_is_one_vector_for_each_dtype_in_order_of_occurrence() -> None:
    assert [vector.dtype for vector in SPEC.vectors] == [
        torch.float32,
        torch.bfloat16,
        torch.float64,
    ]
    first = SPEC.vectors[0]
    assert first.layout.names == ("a.weight", "a.bias")
    assert (first.numel, first.numels, first.raw_bytes) == (17, (12, 5), 68)
    assert [vector.numel for vector in SPEC.vectors] == [17, 1, 0]
    assert (SPEC.numel, SPEC.raw_bytes) == (18, 70)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([], "no tensors"),
        ([("", (1,), torch.float32)], "named ''"),
        ([("a", (1,), torch.float32), ("a", (2,), torch.float32)], "'a' comes twice"),
        ([("a", (1,), torch.int64)], "'a' has dtype torch.int64"),
        ([("a", (1,), torch.complex64)], "'a' has dtype"),
        ([("a", (-1,), torch.float32)], r"'a' has shape \(-1,\)"),
        ([("a", (True,), torch.float32)], "'a' has shape"),
        ([("a", (1 << 63, 1 << 63), torch.float32)], "'a' has shape"),
        ([("a", (1 << 40, 1 << 40), torch.float32)], "'a' has shape"),
        ([("a", (1,) * 65, torch.float32)], "'a' has shape"),
        ([(f"a{i}", (1 << 47,), torch.float32) for i in range(3)], "elements of torch.float32"),
    ],
)
def test_what_no_model_has_is_refused(tensors: Any, message: str) -> None:
    with pytest.raises(InvalidError, match=message):
        spec_of(*tensors)


def changed(place: int, **changes: Any) -> ModelSpec:
    tensors = list(SPEC.tensors)
    tensors[place] = replace(tensors[place], **changes)
    return ModelSpec(tensors=tuple(tensors))


@pytest.mark.parametrize(
    ("worker", "message"),
    [
        (
            changed(0, shape=(4, 3)),
            r"tensor 'a\.weight' has shape \(4, 3\) here and \(3, 4\) in the run",
        ),
        (changed(1, dtype=torch.float16), "'b' has dtype torch.float16 here and torch.bfloat16"),
        (changed(2, name="bias"), r"'a\.bias' of the run is missing here"),
        (ModelSpec(tensors=SPEC.tensors[:2]), r"'a\.bias' of the run is missing"),
        (
            ModelSpec(tensors=(*SPEC.tensors, TensorSpec(name="z", shape=(), dtype=torch.float32))),
            "'z' is here and not in the run",
        ),
        (ModelSpec(tensors=SPEC.tensors[::-1]), r"tensor 1 is 'none' here and 'a\.weight' in"),
    ],
)
def test_the_first_difference_is_named(worker: ModelSpec, message: str) -> None:
    with pytest.raises(ModelDiffersError, match=message):
        worker.check_same(SPEC)
    SPEC.check_same(ModelSpec(tensors=SPEC.tensors))


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from(DTYPES)),
        min_size=1,
        max_size=8,
    )
)
def test_values_go_out_as_bytes_and_come_back(tensors: list[tuple[list[int], Any]]) -> None:
    named = [
        (f"t{place}", torch.randn(shape).to(dtype)) for place, (shape, dtype) in enumerate(tensors)
    ]
    spec = ModelSpec.of(named)
    model, other = FlatModel(spec), FlatModel(spec)
    model.copy_from(named)
    other.load_raw(model.raw())
    views = other.tensors()
    assert list(views) == [name for name, _ in named]
    for name, tensor in named:
        assert views[name].shape == tensor.shape
        assert views[name].dtype == tensor.dtype
        assert torch.equal(views[name], tensor)
    raw = b"".join(bytes(vector) for vector in model.raw())
    assert len(raw) == spec.raw_bytes


def test_raw_is_a_view_that_cannot_be_written_to_and_a_clone_is_not_one() -> None:
    model = FlatModel(SPEC)
    raw, clone = model.raw(), model.clone()
    model.tensors()["a.bias"][0] = 1.5
    assert bytes(raw[0][48:52]) == b"\x00\x00\xc0\x3f"
    with pytest.raises(TypeError):
        raw[0][0] = 1
    assert not clone.flats[0].any()


def without_last(raw: list[memoryview]) -> list[memoryview]:
    return raw[:-1]


def with_short_second(raw: list[memoryview]) -> list[memoryview]:
    return [raw[0], raw[1][:-1], raw[2]]


@pytest.mark.parametrize(
    ("damage", "message"),
    [(without_last, "2 raw vectors: expected 3"), (with_short_second, "raw vector 1 has 1 bytes")],
)
def test_bytes_of_other_lengths_change_nothing(
    damage: Callable[[list[memoryview]], list[memoryview]], message: str
) -> None:
    full, model = FlatModel(SPEC), FlatModel(SPEC)
    full.flats[0].fill_(1.0)
    with pytest.raises(InvalidError, match=message):
        model.load_raw(damage(full.raw()))
    assert not model.flats[0].any()


def test_copy_from_another_model_changes_nothing() -> None:
    model = FlatModel(SPEC)
    named = [(name, torch.ones_like(tensor)) for name, tensor in model.tensors().items()]
    with pytest.raises(ModelDiffersError, match="'none' of the run is missing"):
        model.copy_from(named[:-1])
    assert not model.flats[0].any()
    model.copy_from(named)
    assert bool((model.flats[0] == 1).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [1, 9, 1000])
def test_no_frame_is_longer_than_the_bound(dtype: torch.dtype, numel: int) -> None:
    bound = spec_of(("a", (numel,), dtype)).max_frame_bytes
    for value_format in VALUE_FORMATS:
        for k in {0, 1, numel // 2, numel - 1, numel}:
            indices = torch.randperm(numel)[:k].sort().values
            frame = encode_frame(numel, indices, quantize(torch.randn(k), value_format))
            assert frame.numel() <= bound
