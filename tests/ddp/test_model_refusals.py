"""Refusals of what cannot take the hook: when it is registered, with what to do instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hook_cases import loss_of, small_model
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecision
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from topq_dist import Compressor, TopQGradientOptimizer, TopQState, register_topq_hook, topq_hook
from topq_dist.ddp.model_checks import check_parameters
from topq_dist.ps import ParameterServerOptimizer

alone = pytest.mark.usefixtures("alone")


def refused(model: Any, **options: Any) -> str:
    with pytest.raises((TypeError, ValueError)) as caught:
        register_topq_hook(model, **options)
    return str(caught.value)


@alone
def test_the_python_reducer_names_optimize_ddp() -> None:
    fuses = torch._inductor.config._fuse_ddp_communication
    with torch._dynamo.config.patch(optimize_ddp="python_reducer"):
        model = DistributedDataParallel(small_model())
        torch._inductor.config._fuse_ddp_communication = fuses
        said = refused(model)
        state = TopQState(small_model())
    assert "optimize_ddp='python_reducer'" in said
    assert "'ddp_optimizer'" in said
    # what a state is given that was made before the model
    bucket: Any = (torch.ones(3), torch.ones(3))
    with pytest.raises(TypeError, match=r"given a tuple: expected a bucket.*python_reducer"):
        topq_hook(state, bucket)


@alone
def test_ddps_own_mixed_precision_names_autocast() -> None:
    precision = MixedPrecision(param_dtype=torch.bfloat16)
    model = DistributedDataParallel(small_model(), mixed_precision=precision)  # type: ignore[arg-type]
    said = refused(model)
    assert "mixed_precision=" in said
    assert "torch.autocast" in said


@alone
def test_optimizers_in_the_backward_pass() -> None:
    module = small_model()
    # what _apply_optimizer_in_backward leaves, whose module imports what torch has deprecated
    next(module.parameters())._in_backward_optimizers = []  # type: ignore[attr-defined]
    said = refused(DistributedDataParallel(module))
    assert "_apply_optimizer_in_backward" in said
    assert "step them after it" in said


@alone
def test_a_plain_model_and_a_wrapper_that_is_not_ddp_name_the_state() -> None:
    for model in (small_model(), nn.DataParallel(small_model())):
        said = refused(model)
        assert f"ddp_model is a {type(model).__name__}" in said
        assert "TopQState(model, ...)" in said
        assert "register_comm_hook" in said
    nothing: Any = "a model"
    with pytest.raises(TypeError, match=r"ddp_model is a str: expected a Distributed"):
        TopQState(nothing)
    group = torch.distributed.group.WORLD
    with pytest.raises(ValueError, match="process_group with a Distributed"):
        TopQState(DistributedDataParallel(small_model()), process_group=group)


class OwnDispatch(Tensor):
    """A tensor that says for itself what is done to it."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any, **__: Any) -> Any:  # type: ignore[override]
        raise AssertionError(f"{func} was called")


def odd_tensors() -> dict[str, tuple[Tensor, str]]:
    mesh = init_device_mesh("cpu", (1,))
    values = torch.randn(8, 8)
    wrapper: Any = Tensor._make_wrapper_subclass
    quantized = torch.quantize_per_tensor(values, 0.1, 0, torch.qint8)
    return {
        "sharded": (distribute_tensor(values, mesh, [Shard(0)]), r"DTensor.*to_local\(\)"),
        "replicated": (distribute_tensor(values, mesh, [Replicate()]), r"DTensor.*to_local\(\)"),
        "own": (wrapper(OwnDispatch, (8, 8)), r"OwnDispatch.*plain tensor"),
        "meta": (torch.empty(8, 8, device="meta"), r"meta.*to_empty\(\)"),
        "quantized": (quantized, r"quantized.*dequantize\(\)"),
        "sparse": (values.to_sparse(), r"layout torch.sparse_coo.*to_dense\(\)"),
    }


@alone
@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("kind", ["sharded", "replicated", "own", "meta", "quantized", "sparse"])
def test_tensors_that_are_not_numbers_in_memory_are_refused_everywhere(kind: str) -> None:
    odd, match = odd_tensors()[kind]
    with pytest.raises(TypeError, match=match):
        Compressor(q=0.5).compress("w", odd)
    frame = Compressor(q=0.5).compress("w", torch.randn(8, 8))
    with pytest.raises((TypeError, ValueError), match="out has" if kind == "meta" else match):
        Compressor(q=0.5).decompress(frame, odd)
    with pytest.raises(TypeError, match=match):
        check_parameters(nn.Module(), {odd: "w"})
    if kind in ("quantized", "sparse"):
        # no parameter that is trained can be one
        return
    weight = odd.detach().requires_grad_() if kind == "meta" else odd.requires_grad_()
    with pytest.raises(TypeError, match=match):
        TopQGradientOptimizer([weight], torch.optim.SGD, q=0.5, param_ndim=None, lr=0.1)
    optimizer = TopQGradientOptimizer(small_model().parameters(), q=0.5, param_ndim=None, lr=0.1)
    with pytest.raises(TypeError, match=match):
        optimizer.add_param_group({"params": [weight]})
    with pytest.raises(TypeError, match=match):
        ParameterServerOptimizer([("w", weight)], "127.0.0.1:1", worker="a")


def test_dtypes_without_a_frame_and_parameters_without_a_shape_are_named() -> None:
    lazy = nn.LazyLinear(3)
    with pytest.raises(TypeError, match="weight has no shape yet: run the model once"):
        check_parameters(lazy, {lazy.weight: "weight"})
    for dtype in (torch.complex64, torch.float8_e4m3fn):
        weight = nn.Parameter(torch.ones(3).to(dtype), requires_grad=False)
        with pytest.raises(TypeError, match=f"w has dtype {dtype}: expected a real floating"):
            check_parameters(nn.Module(), {weight: "w"})


class Tied(nn.Module):
    def __init__(self, *, by_module: bool) -> None:
        super().__init__()
        self.first, self.between = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
        self.last = self.first if by_module else nn.Linear(4, 4, bias=False)
        self.last.weight = self.first.weight

    def forward(self, inputs: Tensor) -> Any:
        return self.last(self.between(self.first(inputs)))


@alone
@pytest.mark.parametrize("by_module", [False, True])
def test_a_tied_weight_is_exchanged_unless_it_is_ignored_by_all_of_its_names(
    by_module: bool,
) -> None:
    module = Tied(by_module=by_module)
    module._ddp_params_and_buffers_to_ignore = ["first.weight"]  # type: ignore[assignment]
    model = DistributedDataParallel(module)
    state = register_topq_hook(model, q=0.5, exchange="allgather", momentum="optimizer")
    for _ in range(3):
        model(torch.ones(2, 4)).sum().backward()
    expected = {"between.weight", "between.bias"} | (set() if by_module else {"last.weight"})
    assert state.state_dict()["residuals"].keys() == expected


class OwnWeight(nn.Module):
    """A model with a parameter of its own, whose name has no dot."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.last = nn.Parameter(torch.ones(4)), nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Any:
        return self.last(inputs * self.own)


@alone
@pytest.mark.parametrize(("ignored", "exchanged"), [(".own", False), ("own", True)])
def test_a_parameter_of_the_model_itself_is_ignored_by_the_name_that_torch_goes_by(
    ignored: str, exchanged: bool
) -> None:
    module = OwnWeight()
    module._ddp_params_and_buffers_to_ignore = [ignored]  # type: ignore[assignment]
    model = DistributedDataParallel(module)
    state = register_topq_hook(model, q=0.5, exchange="allgather", momentum="optimizer")
    for _ in range(3):
        model(torch.ones(2, 4)).sum().backward()
    residuals = state.state_dict()["residuals"].keys()
    assert residuals == {"last.weight", "last.bias"} | ({"own"} if exchanged else set())


def compiled(rank: int) -> list[bool]:
    """The hook on a model that is compiled after it, before it, and on one that is not."""
    ends = []
    for how in ("eager", "hook, then compile", "compile, then hook"):
        model: Any = DistributedDataParallel(small_model())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        called: Any = model if how == "eager" else torch.compile(model, backend="aot_eager")
        on: Any = called if how == "compile, then hook" else model
        register_topq_hook(on, q=0.9, exchange="allgather", momentum="optimizer")
        for step in range(3):
            optimizer.zero_grad()
            loss_of(called, step, rank).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        ends.append(torch.cat([one.detach().flatten() for one in model.parameters()]))
    return [bool(torch.allclose(ends[0], other, atol=1e-6)) for other in ends[1:]]


@pytest.mark.gloo
def test_a_compiled_model_takes_it_before_and_after(tmp_path: Path) -> None:
    assert run_ranks(2, compiled, tmp_path) == [[True, True]] * 2
