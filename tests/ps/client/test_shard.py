"""A worker's parameters: what they are given back, in full and where they have changed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from topq_dist.compress.compressor import TopKCompressor
from topq_dist.compress.native import library
from topq_dist.compress.planned_segments import PlannedSegments
from topq_dist.compress.sparsify.segments import Scope
from topq_dist.ps.client import shard as shard_module
from topq_dist.ps.client.shard import Shard


def make_shard() -> Shard:
    torch.manual_seed(0)
    parameters: dict[str, Tensor] = {
        "a": nn.Parameter(torch.randn(7, 3)),
        "empty": nn.Parameter(torch.randn(0, 2)),
        "half": nn.Parameter(torch.randn(5).bfloat16()),
        "scalar": nn.Parameter(torch.randn(())),
        "b": nn.Parameter(torch.randn(30)),
    }
    return Shard(parameters, TopKCompressor(value_format=None, error_feedback=True))


def planned(shard: Shard, q: float, scope: Scope = "parameter") -> PlannedSegments:
    """Return the segments of all its vectors."""
    shapes = {name: tuple(parameter.shape) for name, parameter in shard.parameters.items()}
    return PlannedSegments(q, scope, shapes)


def change(shard: Shard, generator: torch.Generator) -> list[Tensor]:
    """Change a few elements of each vector of the model, and return where."""
    changed = []
    for flat in shard.model.flats:
        count = int(torch.randint(flat.numel() + 1, (1,), generator=generator))
        where = torch.randperm(flat.numel(), generator=generator)[:count].sort().values
        flat[where] = torch.randn(count, generator=generator).to(flat.dtype)
        changed.append(where)
    return changed


def check(shard: Shard) -> None:
    for name, value in shard.model.tensors().items():
        assert torch.equal(shard.parameters[name], value), name


def test_changes_reach_the_parameters_wherever_they_are() -> None:
    shard, generator = make_shard(), torch.Generator().manual_seed(1)
    shard.write_back()
    for step in range(40):
        changed = [change(shard, generator) for _ in range(step % 3)]
        shard.write_back(changed)
        check(shard)


def test_only_what_changed_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    shard, generator = make_shard(), torch.Generator().manual_seed(2)
    shard.write_back()
    monkeypatch.setattr(shard, "write", lambda _: pytest.fail("all was written"))
    shard.write_back([change(shard, generator)])
    check(shard)


def test_what_somebody_else_wrote_is_undone() -> None:
    shard, generator = make_shard(), torch.Generator().manual_seed(3)
    shard.write_back()
    with torch.no_grad():
        shard.parameters["b"].clamp_(-0.1, 0.1)
    shard.write_back([change(shard, generator)])
    check(shard)
    shard.parameters["a"].data = torch.zeros(7, 3)
    shard.write_back([])
    check(shard)
    with torch.no_grad():
        shard.parameters["a"].data = torch.zeros(3, 7).t()
    shard.write_back([change(shard, generator)])
    check(shard)


def test_autograd_knows_that_a_parameter_was_written_to() -> None:
    shard = make_shard()
    shard.write_back()
    b = shard.parameters["b"]
    loss = (b * b).sum()
    where = torch.tensor([21 + 1 + 4])
    shard.model.flats[0][where] = 5.0
    shard.write_back([[where, torch.zeros(0, dtype=torch.int64)]])
    assert b[4] == 5.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(loss)


def test_gradients_are_read_where_they_lie_as_if_they_had_been_gathered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shards = read, at_once, gathered = make_shard(), make_shard(), make_shard()
    generator = torch.Generator().manual_seed(4)
    for _ in range(5):
        for name, parameter in read.parameters.items():
            gradient = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.grad = gradient
            at_once.parameters[name].grad = gradient.clone()
            # the same numbers, with gaps between them
            gaps = torch.stack([gradient, gradient], dim=-1)[..., 0]
            gathered.parameters[name].grad = gaps
        frames = []
        for shard in shards:
            # those of a model of large tensors are read in place
            monkeypatch.setattr(shard_module, "_SMALL_NUMEL", 0 if shard is read else 4_096)
            made = shard.compress(planned(shard, 0.6))
            for part in made:
                shard.compressor.residuals.apply(part.update)
            frames.append([frame.tolist() for part in made for frame in part.frames])
        assert frames[0] == frames[1] == frames[2]
    residuals = [shard.compressor.residuals.state_dict() for shard in shards]
    for name in read.parameters:
        assert torch.equal(residuals[0][name], residuals[1][name])
        assert torch.equal(residuals[0][name], residuals[2][name])
    assert not read._gathered
    assert at_once._gathered
    assert gathered._gathered


def test_changes_reach_the_parameters_without_the_library_as_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(library, "LIBRARY", None)
    test_changes_reach_the_parameters_wherever_they_are()


@pytest.mark.skipif(library.LIBRARY is None, reason="the library has not been built")
def test_an_index_past_the_parameters_is_refused() -> None:
    shard = make_shard()
    shard.write_back()
    numel = shard.model.flats[0].numel()
    with pytest.raises(IndexError, match="an index"):
        shard.write_back([[torch.tensor([0, numel]), torch.zeros(0, dtype=torch.int64)]])


def test_coherence_is_measured_with_the_residual_as_it_is_added() -> None:
    found = []
    for decay in (1.0, 0.25):
        compressor = TopKCompressor(
            value_format=None, error_feedback=True, residual_decay=decay, bound=None
        )
        shard = Shard({"a": nn.Parameter(torch.zeros(30))}, compressor)
        shard.parameters["a"].grad = torch.linspace(0.1, 1.0, 30)
        (first,) = shard.compress(planned(shard, 0.5))
        shard.compressor.residuals.apply(first.update)
        (second,) = shard.compress(planned(shard, 0.5), measures_coherence=True)
        found.append(second.coherence)
    assert found[0].aligned > 0
    assert found[1].aligned == pytest.approx(0.25 * found[0].aligned)
    assert found[1].energy == found[0].energy


def test_a_parameter_without_a_gradient_counts_as_zeros() -> None:
    shard = make_shard()
    shard.parameters["b"].grad = torch.ones(30)
    (singles, halves) = shard.compress(planned(shard, 0.0))
    assert singles.own is not None
    assert halves.own is not None
    assert singles.own.values.sum() == 30
    assert halves.own.values.sum() == 0


@pytest.mark.parametrize("scope", ["parameter", "bucket"])
def test_a_parameter_in_another_order_of_memory_is_the_same_to_the_server(scope: Scope) -> None:
    """Frames, residuals and values are in logical order, whatever the order of either in memory."""
    torch.manual_seed(0)
    values = {"conv": torch.randn(8, 6, 3, 3), "matrix": torch.randn(40, 30), "b": torch.randn(9)}
    gradients = [{name: torch.randn_like(one) for name, one in values.items()} for _ in range(3)]

    def turned(tensor: Tensor) -> Tensor:
        last = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
        return tensor.clone(memory_format=last) if tensor.ndim != 2 else tensor.t().clone().t()

    sent = []
    for lie in (Tensor.clone, turned):
        for lie_gradient in (Tensor.clone, turned):
            shard = Shard(
                {name: nn.Parameter(lie(one)) for name, one in values.items()},
                TopKCompressor(value_format="fp32", error_feedback=True),
            )
            frames = []
            for step in gradients:
                for name, parameter in shard.parameters.items():
                    parameter.grad = lie_gradient(step[name])
                (made,) = shard.compress(planned(shard, 0.9, scope))
                shard.compressor.residuals.apply(made.update)
                frames.append(made.frames[0].clone())
            shard.model.flats[0].copy_(torch.arange(float(shard.model.flats[0].numel())))
            shard.write_back()
            residuals = shard.compressor.residuals.state_dict()
            sent.append((frames, residuals, dict(shard.parameters)))
    for frames, residuals, parameters in sent[1:]:
        assert all(torch.equal(one, two) for one, two in zip(frames, sent[0][0], strict=True))
        for name in values:
            assert torch.equal(residuals[name], sent[0][1][name])
            assert torch.equal(parameters[name], sent[0][2][name])
