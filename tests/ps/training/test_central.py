"""The central model against one optimizer, and its state against a model that never stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from topq_dist.compress.aggregate import write_sum
from topq_dist.compress.codec.frame import Frame, decode_frame
from topq_dist.compress.compressor import TopKCompressor
from topq_dist.compress.sparsify.segments import uniform_segments
from topq_dist.ps.model.flat import FlatModel
from topq_dist.ps.model.spec import ModelSpec, TensorSpec
from topq_dist.ps.model.update import apply_update
from topq_dist.ps.protocol.config import GroupRule, TrainingConfig
from topq_dist.ps.protocol.errors import InvalidError, NonFiniteError
from topq_dist.ps.protocol.types import START, Push, Update, UpdateKind
from topq_dist.ps.training.central import CentralModel

Shapes = Sequence[tuple[str, tuple[int, ...], torch.dtype]]

MIXED: Shapes = (
    ("a.weight", (40, 33), torch.float32),
    ("b.weight", (257,), torch.float64),
    ("a.bias", (7,), torch.float32),
    ("c.weight", (19, 21), torch.bfloat16),
    ("d.weight", (301,), torch.float16),
)
SINGLE: Shapes = (("a.weight", (40, 33), torch.float32), ("a.bias", (33,), torch.float32))


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    # on tensors this small a second thread only waits
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def spec_of(shapes: Shapes) -> ModelSpec:
    return ModelSpec(tensors=tuple(TensorSpec(name=n, shape=s, dtype=d) for n, s, d in shapes))


def random_model(shapes: Shapes, seed: int = 0) -> FlatModel:
    generator = torch.Generator().manual_seed(seed)
    model = FlatModel(spec_of(shapes))
    for flat in model.flats:
        flat.copy_(torch.randn(flat.shape, generator=generator))
    return model


def push_of(
    model: FlatModel, gradients: Sequence[Tensor], *, q: float = 0.0, lr: tuple[float, ...] = ()
) -> Push:
    frames: list[Frame] = []
    for vector, gradient in zip(model.spec.vectors, gradients, strict=True):
        compressor = TopKCompressor(value_format=None, error_feedback=False)
        segments = uniform_segments(vector.numels, q=q, scope="parameter")
        frame = compressor.compress(gradient, vector.layout, segments).frames[0]
        frames.append(decode_frame(frame, numel=vector.numel))
    return Push(
        worker="w", epoch=1, sequence=1, base=START, frames=tuple(frames), lr=lr, digest=b""
    )


def random_gradients(model: FlatModel, generator: torch.Generator) -> list[Tensor]:
    return [torch.randn(f.shape, generator=generator).to(f.dtype) for f in model.flats]


def random_pushes(
    model: FlatModel, generator: torch.Generator, *, count: int = 2, q: float = 0.9
) -> list[Push]:
    return [push_of(model, random_gradients(model, generator), q=q) for _ in range(count)]


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and bool(
        (one.reshape(-1).view(torch.uint8) == other.reshape(-1).view(torch.uint8)).all()
    )


def apply_to(worker: FlatModel, result: tuple[UpdateKind, tuple[memoryview, ...]]) -> None:
    apply_update(worker, Update(kind=result[0], point=START, payloads=result[1]))


OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("sgd", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ("AdamW", {"lr": 0.01}),
]


@pytest.mark.parametrize(("inner_opt", "options"), OPTIMIZERS)
@pytest.mark.parametrize("count", [1, 3])
def test_whole_pushes_step_as_one_optimizer_on_the_mean_gradient(
    inner_opt: str, options: dict[str, Any], count: int
) -> None:
    model = random_model(SINGLE)
    alone = {name: t.clone() for name, t in model.tensors().items()}
    classes = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
    optimizer = classes[inner_opt.lower()](list(alone.values()), **options)
    central = CentralModel(TrainingConfig(inner_opt=inner_opt, options=options), model.spec, model)
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        each = [random_gradients(model, generator) for _ in range(count)]
        central.apply([push_of(model, gradients) for gradients in each])
        mean = torch.stack([gradients[0] for gradients in each]).mean(0)
        start = 0
        for tensor in alone.values():
            tensor.grad = mean[start : start + tensor.numel()].view(tensor.shape)
            start += tensor.numel()
        optimizer.step()
    for name, tensor in model.tensors().items():
        difference = (tensor - alone[name]).norm() / alone[name].norm()
        assert difference <= 1e-6, name


@pytest.mark.parametrize("shapes", [SINGLE, MIXED])
def test_the_gradient_has_the_bits_of_the_hooks_sum(shapes: Shapes) -> None:
    model = random_model(shapes)
    before = model.clone()
    # an lr of 1 from zero leaves minus the gradient
    for flat in [*model.flats, *before.flats]:
        flat.zero_()
    central = CentralModel(TrainingConfig(inner_opt="sgd", options={"lr": 1.0}), model.spec, model)
    pushes = random_pushes(model, torch.Generator().manual_seed(2), count=3)
    central.apply(pushes)
    for place, flat in enumerate(before.flats):
        frames = [push.frames[place] for push in pushes]
        write_sum(frames, divisor=3, out=flat)
        assert torch.equal(model.flats[place], -flat)


@pytest.mark.parametrize("q", [0.0, 0.5, 0.95, 0.99])
@pytest.mark.parametrize("shapes", [SINGLE, MIXED])
@pytest.mark.parametrize(
    "extra", [{}, {"maximize": True}, {"weight_decay": 0.01}, {"momentum": 0.5, "dampening": 0.1}]
)
def test_a_step_of_sgd_sparse_or_not_has_the_bits_of_torchs_own(
    shapes: Shapes, q: float, extra: dict[str, Any]
) -> None:
    rules = (GroupRule(pattern="*bias", options={"lr": 0.37}),)
    config = TrainingConfig(
        inner_opt="sgd", options={"lr": 0.013, **extra}, groups=rules, momentum="optimizer"
    )
    model = random_model(shapes)
    model.flats[0][:50] = -0.0
    central = CentralModel(config, model.spec, model)
    alone = model.clone()
    views = alone.tensors()
    groups: list[dict[str, Any]] = [
        {"params": [t for name, t in views.items() if "bias" not in name]},
        {"params": [t for name, t in views.items() if "bias" in name], "lr": 0.37},
    ]
    kernels = {"foreach": True} if shapes is MIXED else {"fused": True}
    optimizer = torch.optim.SGD(groups, lr=0.013, **extra, **kernels)
    generator = torch.Generator().manual_seed(3)
    for _ in range(10):
        pushes = random_pushes(model, generator, q=q)
        central.apply(pushes)
        gradient = FlatModel(model.spec)
        for place, flat in enumerate(gradient.flats):
            write_sum([push.frames[place] for push in pushes], divisor=2, out=flat)
        for name, tensor in gradient.tensors().items():
            views[name].grad = tensor
        optimizer.step()
        assert all(map(same_bits, model.flats, alone.flats))


def test_void_pushes_do_not_count_in_the_mean() -> None:
    config = TrainingConfig(inner_opt="sgd", options={"lr": 0.1})
    one, other = random_model(MIXED), random_model(MIXED)
    pushes = random_pushes(one, torch.Generator().manual_seed(4))
    void = Push(worker="v", epoch=1, sequence=1, base=START, frames=(), lr=(), digest=b"")
    CentralModel(config, one.spec, one).apply(pushes)
    CentralModel(config, other.spec, other).apply([void, pushes[0], void, pushes[1]])
    assert all(map(same_bits, one.flats, other.flats))


@pytest.mark.parametrize("downlink", ["exact", "topq", "dense"])
def test_nothing_but_void_pushes_is_no_step(downlink: Any) -> None:
    model = random_model(MIXED)
    config = TrainingConfig(
        inner_opt="sgd", options={"lr": 0.1, "weight_decay": 0.5}, downlink=downlink
    )
    central = CentralModel(config, model.spec, model)
    worker, sha256 = model.clone(), central.sha256()
    void = Push(worker="v", epoch=1, sequence=1, base=START, frames=(), lr=(), digest=b"")
    apply_to(worker, central.apply([void, void]))
    assert central.sha256() == sha256
    assert all(map(same_bits, worker.flats, model.flats))


def test_the_median_of_the_pushes_learning_rates_sets_them() -> None:
    rules = (GroupRule(pattern="a.bias", options={"lr": 0.5, "momentum": 0.25}),)
    model = random_model(SINGLE)
    config = TrainingConfig(inner_opt="sgd", options={"lr": 0.1}, groups=rules)
    central = CentralModel(config, model.spec, model)
    gradients = random_gradients(model, torch.Generator().manual_seed(5))
    rates: list[tuple[float, ...]] = [(), (0.01, 0.02), (0.3, 0.4)]
    central.apply([push_of(model, gradients, lr=lr) for lr in rates])
    weight, bias = central.groups()
    assert (weight.names, bias.names) == (("a.weight",), ("a.bias",))
    assert weight.numbers == {"lr": 0.155, "momentum": 0, "dampening": 0, "weight_decay": 0}
    assert bias.numbers["lr"] == pytest.approx(0.21)
    assert bias.numbers["momentum"] == 0.25


STATEFUL: list[tuple[str, dict[str, Any]]] = [
    ("sgd", {"lr": 0.1}),
    ("sgd", {"lr": 0.1, "momentum": 0.9}),
    # eps: torch's own is zero in fp16, and the step then not finite
    ("adamw", {"lr": 0.01, "eps": 1e-4}),
    ("adam", {"lr": 0.01, "eps": 1e-4, "amsgrad": True, "betas": [0.8, 0.9]}),
    ("asgd", {"lr": 0.01}),
    ("adafactor", {}),
    ("rprop", {}),
    ("nadam", {"eps": 1e-4}),
    ("adagrad", {"initial_accumulator_value": 0.1}),
]


@pytest.mark.parametrize("downlink", ["exact", "topq"])
@pytest.mark.parametrize(("inner_opt", "options"), STATEFUL)
def test_state_goes_round_and_on_bit_for_bit(
    inner_opt: str, options: dict[str, Any], downlink: Any
) -> None:
    own: dict[str, Any] = {"q": 0.9} if downlink == "topq" else {}
    config = TrainingConfig(inner_opt=inner_opt, options=options, downlink=downlink, **own)
    model = random_model(MIXED)
    central = CentralModel(config, model.spec, model)
    generator = torch.Generator().manual_seed(6)
    for _ in range(3):
        central.apply(random_pushes(model, generator))
    tensors, metadata = central.state()
    metadata = json.loads(json.dumps(metadata))
    other = random_model(MIXED, seed=9)
    resumed = CentralModel(config, other.spec, other)
    resumed.load_state(tensors, metadata)
    sha256 = central.sha256()
    assert resumed.sha256() == sha256
    for _ in range(3):
        pushes = random_pushes(model, generator)
        central.apply(pushes)
        resumed.apply(pushes)
    assert resumed.sha256() == central.sha256() != sha256
    assert resumed.workers_raw() == central.workers_raw()
    assert resumed.central_raw() == central.central_raw() == model.raw()


def test_a_copied_state_stays_what_it_was() -> None:
    model = random_model(MIXED)
    config = TrainingConfig(inner_opt="adamw", options={"eps": 1e-4}, downlink="topq")
    central = CentralModel(config, model.spec, model)
    generator = torch.Generator().manual_seed(7)
    central.apply(random_pushes(model, generator))
    sha256 = central.sha256()
    tensors, metadata = central.state()
    central.apply(random_pushes(model, generator))
    assert central.sha256() != sha256
    central.load_state(tensors, metadata)
    assert central.sha256() == sha256


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda tensors, metadata: tensors.pop("model.0"), "nothing as 'model.0'"),
        (lambda tensors, metadata: tensors.update({"held.0": torch.zeros(3)}), "'held.0'"),
        (lambda tensors, metadata: tensors.update({"inner.0.x.y": torch.zeros(3)}), "as 'x.y'"),
        (lambda tensors, metadata: tensors.update({"inner.77.x": torch.zeros(3)}), "inner.77"),
        (lambda tensors, metadata: tensors.update(other=torch.zeros(3)), "'other'"),
        (lambda tensors, metadata: metadata.pop("inner"), "missing"),
        (lambda tensors, metadata: metadata["inner"]["groups"].pop(), "groups"),
        (lambda tensors, metadata: metadata["inner"]["groups"][0].pop("lr"), "other keys"),
        (lambda tensors, metadata: metadata["inner"]["state"].update(z={}), "the model lacks"),
    ],
)
def test_a_state_of_something_else_is_refused_whole(break_it: Any, message: str) -> None:
    model = random_model(MIXED)
    config = TrainingConfig(inner_opt="adamw", options={"eps": 1e-4}, downlink="topq")
    central = CentralModel(config, model.spec, model)
    generator = torch.Generator().manual_seed(8)
    central.apply(random_pushes(model, generator))
    tensors, metadata = central.state()
    central.apply(random_pushes(model, generator))
    sha256 = central.sha256()
    break_it(tensors, metadata)
    with pytest.raises(ValueError, match=message):
        central.load_state(tensors, metadata)
    assert central.sha256() == sha256


def test_what_apply_cannot_take_is_named() -> None:
    model = random_model(MIXED)
    central = CentralModel(TrainingConfig(inner_opt="sgd"), model.spec, model)
    good = push_of(model, random_gradients(model, torch.Generator().manual_seed(9)))
    central.check_push(good)

    def altered(**changes: Any) -> Push:
        return Push(**{**good.__dict__, **changes})

    with pytest.raises(InvalidError, match="1 frames: expected 4"):
        central.check_push(altered(frames=good.frames[:1]))
    with pytest.raises(InvalidError, match="frame 0 is of 257 elements: expected 1327"):
        central.check_push(altered(frames=(good.frames[1], *good.frames[1:])))
    with pytest.raises(InvalidError, match="2 learning rates: expected one for each of 1"):
        central.check_push(altered(lr=(0.1, 0.1)))
    with pytest.raises(InvalidError, match="lr=-1"):
        central.check_push(altered(lr=(-1.0,)))
    with pytest.raises(NonFiniteError, match="lr=nan"):
        central.check_push(altered(lr=(float("nan"),)))
    nothing = torch.zeros(0)
    overflown = Frame(numel=1327, indices=nothing.long(), values=nothing, finite=False)
    with pytest.raises(NonFiniteError, match="frame 0"):
        central.check_push(altered(frames=(overflown, *good.frames[1:])))


def test_values_of_another_model_are_refused() -> None:
    with pytest.raises(ValueError, match="another model"):
        CentralModel(TrainingConfig(inner_opt="sgd"), spec_of(SINGLE), random_model(MIXED))


@pytest.mark.parametrize("inner_opt", ["adafactor", "muon", "adamw", "sgd"])
def test_a_tensor_without_elements_trains_beside_the_others(inner_opt: str) -> None:
    shapes = (("a", (4, 3), torch.float32), ("none", (3, 0), torch.float32))
    config = TrainingConfig(inner_opt=inner_opt)
    with_it, without = random_model(shapes), random_model(shapes[:1])
    models = [CentralModel(config, model.spec, model) for model in (with_it, without)]
    generator = torch.Generator().manual_seed(3)
    for step in range(3):
        gradients = random_gradients(without, generator)
        for central, model in zip(models, (with_it, without), strict=True):
            push = push_of(model, gradients)
            if model is with_it and step == 1:  # as a worker says that has no gradient of it
                push = replace(push, no_gradient=model.spec.no_gradient([False, True]))
            central.apply([push])
    assert same_bits(with_it.flats[0], without.flats[0])
    loaded = CentralModel(config, with_it.spec, FlatModel(with_it.spec))
    loaded.load_state(*models[0].state())
    assert loaded.sha256() == models[0].sha256()
