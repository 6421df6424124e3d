"""The downlink: workers hold the server's bits, or its shadow's, after every update."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from topq_dist.compress.codec.frame import Frame, FrameError, encode_non_finite_frame, peek_header
from topq_dist.compress.kernels import find_differing
from topq_dist.ps.model import update
from topq_dist.ps.model.flat import FlatModel
from topq_dist.ps.model.spec import ModelSpec, TensorSpec
from topq_dist.ps.model.update import apply_update
from topq_dist.ps.protocol.config import TrainingConfig
from topq_dist.ps.protocol.errors import InvalidError
from topq_dist.ps.protocol.types import START, Push, Update, UpdateKind
from topq_dist.ps.training import downlink
from topq_dist.ps.training.central import CentralModel
from topq_dist.ps.training.downlink import (
    ExactDownlink,
    TopQDownlink,
    check_downlink,
    make_downlink,
)

MIXED = (
    ("a.weight", (40, 33), torch.float32),
    ("b.weight", (257,), torch.float64),
    ("a.bias", (7,), torch.float32),
    ("c.weight", (19, 21), torch.bfloat16),
    ("d.weight", (301,), torch.float16),
)
MODELS: dict[str, tuple[tuple[str, tuple[int, ...], torch.dtype], ...]] = {
    "fp32": (("a", (40, 33), torch.float32), ("b", (33,), torch.float32)),
    "fp64": (("a", (1000,), torch.float64),),
    "bf16": (("a", (1000,), torch.bfloat16), ("b", (0,), torch.bfloat16)),
    "fp16": (("a", (1000,), torch.float16),),
    "mixed": MIXED,
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    # on tensors this small a second thread only waits
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_model(tensors: Any, seed: int = 0) -> FlatModel:
    generator = torch.Generator().manual_seed(seed)
    model = FlatModel(
        ModelSpec(tensors=tuple(TensorSpec(name=n, shape=s, dtype=d) for n, s, d in tensors))
    )
    for flat in model.flats:
        flat.copy_(torch.randn(flat.shape, generator=generator))
    return model


def same_bits(one: FlatModel, other: FlatModel) -> bool:
    return [bytes(raw) for raw in one.raw()] == [bytes(raw) for raw in other.raw()]


def received(worker: FlatModel, payloads: tuple[UpdateKind, tuple[memoryview, ...]]) -> UpdateKind:
    kind, parts = payloads
    apply_update(worker, Update(kind=kind, point=START, payloads=parts))
    return kind


def largest_gap(one: FlatModel, other: FlatModel) -> float:
    pairs = zip(one.flats, other.flats, strict=True)
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)


def random_push(model: FlatModel, generator: torch.Generator, *, q: float) -> Push:
    frames = []
    for flat in model.flats:
        k = max(1, round((1 - q) * flat.numel()))
        indices = torch.randperm(flat.numel(), generator=generator)[:k].sort().values
        values = torch.randn(k, generator=generator)
        frames.append(
            Frame(
                numel=flat.numel(),
                indices=indices,
                values=values.to(torch.float64) if flat.dtype == torch.float64 else values,
                finite=True,
            )
        )
    return Push(
        worker="w", epoch=1, sequence=1, base=START, frames=tuple(frames), lr=(), digest=b""
    )


@pytest.mark.parametrize("q", [0.0, 0.5, 0.98])
@pytest.mark.parametrize(
    ("inner_opt", "options"),
    [
        ("sgd", {"lr": 0.1}),
        ("sgd", {"lr": 0.1, "momentum": 0.9}),
        ("sgd", {"lr": 0.1, "maximize": True}),
        ("adamw", {"lr": 0.01, "eps": 1e-4}),
    ],
)
@pytest.mark.parametrize("model_name", ["fp32", "mixed"])
def test_exact_leaves_workers_with_the_servers_bits(
    model_name: str, inner_opt: str, options: dict[str, Any], q: float
) -> None:
    model = random_model(MODELS[model_name])
    worker = model.clone()
    central = CentralModel(TrainingConfig(inner_opt=inner_opt, options=options), model.spec, model)
    generator = torch.Generator().manual_seed(1)
    kinds, sent_before = set(), []
    for _ in range(12):
        payloads = central.apply([random_push(model, generator, q=q) for _ in range(2)])
        sent_before.append((payloads[1], [bytes(part) for part in payloads[1]]))
        kinds.add(received(worker, payloads))
        assert same_bits(worker, model)
    assert central.workers_raw() == central.central_raw()
    if inner_opt == "sgd" and q == 0.98:
        assert kinds == {UpdateKind.SET}
    if inner_opt == "adamw":
        assert UpdateKind.FULL in kinds
    # history holds them: later steps must not have written into them
    for parts, raw in sent_before:
        assert [bytes(part) for part in parts] == raw


def test_exact_after_plain_sgd_looks_only_at_what_was_touched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensors = (("a", (1 << 16,), torch.float32),)
    model = random_model(tensors)
    worker = model.clone()
    central = CentralModel(TrainingConfig(inner_opt="sgd"), model.spec, model)
    looked_at: list[int] = []

    def counting(now: Any, before: Any, room: Any) -> Any:
        looked_at.append(now.size)
        return find_differing(now, before, room)

    def never(*_: Any) -> Any:
        raise AssertionError("the whole model was looked at")

    monkeypatch.setattr(update, "find_differing", counting)
    monkeypatch.setattr(downlink, "changes_between", never)
    monkeypatch.setattr(ExactDownlink, "before_step", never)
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        payloads = central.apply([random_push(model, generator, q=0.99)])
        assert payloads[1][0].nbytes < 655 * 6
        received(worker, payloads)
        assert same_bits(worker, model)
    assert looked_at == [655] * 3


def test_exact_sends_only_what_changed_and_nothing_where_nothing_did() -> None:
    model = random_model(MIXED)
    worker, exact = model.clone(), ExactDownlink(model.spec)
    for _ in range(3):
        exact.before_step(model)
        model.flats[0][5] = -0.0
        model.flats[2][7] += 1
        kind, parts = exact.after_step(model, None)
        received(worker, (kind, parts))
        assert same_bits(worker, model)
    assert [peek_header(part).k for part in parts] == [0, 0, 1, 0]


def test_exact_sets_the_sign_of_zero_and_the_smallest_fp16_beside_the_largest() -> None:
    model = random_model((("a", (5000,), torch.float16),))
    model.flats[0].zero_()
    worker, exact = model.clone(), ExactDownlink(model.spec)
    exact.before_step(model)
    model.flats[0][:4] = torch.tensor([65504.0, 5.960464477539063e-08, -0.0, 2e-5])
    assert received(worker, exact.after_step(model, None)) is UpdateKind.SET
    assert same_bits(worker, model)


@pytest.mark.parametrize("kind", ["exact", "topq"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_travels_whole(kind: Any, value: float) -> None:
    model = random_model(MIXED)
    worker = model.clone()
    own: dict[str, Any] = {"q": 0.9} if kind == "topq" else {}
    down = make_downlink(TrainingConfig(inner_opt="sgd", downlink=kind, **own), model)
    down.before_step(model)
    model.flats[2][3] = value
    assert received(worker, down.after_step(model, None)) is UpdateKind.FULL
    assert same_bits(worker, model)
    assert same_bits(down.held(model), model)
    down.before_step(model)
    model.flats[2][3] = 1.0
    received(worker, down.after_step(model, None))
    assert same_bits(worker, down.held(model))


@pytest.mark.parametrize(
    ("model_name", "value_format"),
    [*((name, None) for name in MODELS), ("mixed", "fp16"), ("mixed", "int4")],
)
def test_topq_leaves_workers_with_the_shadows_bits_near_the_parameters(
    model_name: str, value_format: str | None
) -> None:
    model = random_model(MODELS[model_name])
    worker = model.clone()
    config = TrainingConfig(
        inner_opt="sgd",
        options={"lr": 0.02, "momentum": 0.9},
        downlink="topq",
        q=0.9,
        value_format=value_format,
    )
    central = CentralModel(config, model.spec, model)
    generator = torch.Generator().manual_seed(3)
    early = late = 0.0
    for step in range(200):
        payloads = central.apply([random_push(model, generator, q=0.5)])
        assert received(worker, payloads) is UpdateKind.ADD
        assert [bytes(raw) for raw in worker.raw()] == [bytes(r) for r in central.workers_raw()]
        gap = largest_gap(model, worker)
        if step < 100:
            early = max(early, gap)
        else:
            late = max(late, gap)
    assert 0 < late <= 1.5 * early
    assert not same_bits(worker, model)


@pytest.mark.parametrize("model_name", MODELS)
def test_topq_catches_up_once_the_parameters_rest(model_name: str) -> None:
    model = random_model(MODELS[model_name])
    worker, topq = model.clone(), TopQDownlink(model, q=0.7, value_format=None)
    for flat in model.flats:
        flat.add_(torch.randn(flat.shape))
    for _ in range(30):
        _, parts = topq.after_step(model, None)
        received(worker, (UpdateKind.ADD, parts))
    assert same_bits(worker, topq.held(model))
    assert largest_gap(model, worker) == 0
    assert all(peek_header(part).k == 0 for part in parts)


@pytest.mark.parametrize("model_name", MODELS)
def test_topq_agrees_on_the_sign_of_zero(model_name: str) -> None:
    model = random_model(MODELS[model_name])
    worker, topq = model.clone(), TopQDownlink(model, q=0.0, value_format=None)
    for value in (0.0, 1.0, -0.0):
        for flat in model.flats:
            flat.fill_(value)
        received(worker, topq.after_step(model, None))
        assert same_bits(worker, topq.held(model))


def test_topq_sends_the_largest_part_of_each_tensor() -> None:
    model = random_model(MODELS["fp32"])
    before, topq = model.clone(), TopQDownlink(model, q=0.9, value_format=None)
    model.flats[0].add_(torch.randn(1353))
    gap = model.flats[0] - before.flats[0]
    worker = before.clone()
    received(worker, topq.after_step(model, None))
    moved = (worker.flats[0] != before.flats[0]).nonzero().view(-1)
    expected = [gap[:1320].abs().topk(132).indices, gap[1320:].abs().topk(3).indices + 1320]
    assert torch.equal(moved, torch.cat(expected).sort().values)


def test_dense_sends_all_in_memory_of_its_own() -> None:
    model = random_model(MIXED)
    config = TrainingConfig(inner_opt="sgd", options={"lr": 0.1}, downlink="dense")
    worker, central = model.clone(), CentralModel(config, model.spec, model)
    generator = torch.Generator().manual_seed(4)
    first = central.apply([random_push(model, generator, q=0.9)])
    raw = [bytes(part) for part in first[1]]
    assert received(worker, first) is UpdateKind.FULL
    assert same_bits(worker, model)
    central.apply([random_push(model, generator, q=0.9)])
    assert [bytes(part) for part in first[1]] == raw


def test_a_damaged_update_changes_nothing() -> None:
    model = random_model(MIXED)
    worker, topq = model.clone(), TopQDownlink(model, q=0.5, value_format=None)
    for flat in model.flats:
        flat.add_(1)
    kind, parts = topq.after_step(model, None)
    damaged = bytearray(parts[3])
    damaged[-1] ^= 1
    overflown = encode_non_finite_frame(301, "fp16").numpy().data
    before = worker.clone()
    for wrong, error in [
        ((*parts[:3], memoryview(damaged)), FrameError),
        ((*parts[:3], overflown), FrameError),
        ((*parts[:3], parts[0]), FrameError),
        (parts[:3], InvalidError),
    ]:
        for as_kind in (UpdateKind.ADD, UpdateKind.SET):
            with pytest.raises(error):
                apply_update(worker, Update(kind=as_kind, point=START, payloads=wrong))
    with pytest.raises(InvalidError):
        apply_update(worker, Update(kind=UpdateKind.FULL, point=START, payloads=parts))
    assert same_bits(worker, before)
    assert received(worker, (kind, parts)) is UpdateKind.ADD


def test_settings_with_which_workers_learn_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="q=1 with downlink='topq'"):
        check_downlink(TrainingConfig(inner_opt="sgd", downlink="topq", q=1))
    with pytest.raises(ValueError, match="value_format='fp8'"):
        check_downlink(TrainingConfig(inner_opt="sgd", downlink="topq", value_format="fp8"))
