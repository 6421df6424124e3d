"""No gradient is not a gradient of zeros: what nobody has used stays as it is at the server."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ps.client.test_optimizer import connect
from ps.client.test_shard import planned
from ps.servers import Options, serving
from ps.training.test_central import push_of, random_gradients, random_model
from ps.workers import side_by_side
from torch import Tensor, nn

from topq_dist.compress.codec.frame import decode_frame
from topq_dist.compress.compressor import TopKCompressor
from topq_dist.compress.sparsify.segments import Scope, UniformSegments, uniform_segments
from topq_dist.ps.client.replay_log import ReplayLog
from topq_dist.ps.client.server_client import ServerClient
from topq_dist.ps.client.shard import Shard
from topq_dist.ps.protocol.config import TrainingConfig
from topq_dist.ps.protocol.errors import InvalidError
from topq_dist.ps.protocol.types import START, NewPush, Push, push_digest
from topq_dist.ps.training.central import CentralModel
from topq_dist.ps.training.inner_step import density

OPTIMIZERS: dict[str, Options] = {
    "adamw": {"lr": 0.05, "weight_decay": 0.1},
    "sgd": {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    "rmsprop": {"lr": 0.01, "momentum": 0.5},
    "adagrad": {"lr": 0.05, "lr_decay": 0.1},
    "adafactor": {"lr": 0.05},
    "adamax": {"lr": 0.05, "weight_decay": 0.1},
    "asgd": {"lr": 0.05, "t0": 2, "weight_decay": 0.1},
    "nadam": {"lr": 0.05, "weight_decay": 0.1},
    "radam": {"lr": 0.05, "weight_decay": 0.1},
    "rprop": {"lr": 0.05},
}
CLASSES = {
    "adafactor": torch.optim.Adafactor,
    "adagrad": torch.optim.Adagrad,
    "adamax": torch.optim.Adamax,
    "adamw": torch.optim.AdamW,
    "asgd": torch.optim.ASGD,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rmsprop": torch.optim.RMSprop,
    "rprop": torch.optim.Rprop,
    "sgd": torch.optim.SGD,
}


def make_model() -> nn.Sequential:
    generator = torch.Generator().manual_seed(5)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def use(model: nn.Sequential, step: int, layers: tuple[int, ...]) -> None:
    """Leave gradients in these layers, and none in the others."""
    out = torch.full((4, 6), 0.1 * (step + 1))
    for layer in layers:
        out = model[layer](out)
    torch.autograd.backward(out.square().mean())


def used_in(step: int) -> tuple[int, ...]:
    """The last layer goes unused after a while, another one comes in late, then all are there."""
    return (0, 2) if step < 3 else (0,) if step < 6 else (0, 1) if step < 9 else (0, 1, 2)


def vector(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_tensor_that_nobody_used_is_skipped_as_torchs_optimizers_do(
    tmp_path: Path, name: str, mode: str
) -> None:
    alone, model = make_model(), make_model()
    reference = CLASSES[name](alone.parameters(), **OPTIMIZERS[name])
    training = {"inner_opt": name, "options": OPTIMIZERS[name], "mode": mode}
    with serving(tmp_path, training) as server, connect(model, server) as optimizer:
        for step in range(12):
            for one, each in ((alone, reference), (model, optimizer)):
                each.zero_grad()
                use(one, step, used_in(step))
                each.step()
            torch.testing.assert_close(vector(model), vector(alone), rtol=1e-5, atol=1e-6)


def test_it_is_skipped_at_each_of_several_servers(tmp_path: Path) -> None:
    alone, model = make_model(), make_model()
    reference = torch.optim.AdamW(alone.parameters(), **OPTIMIZERS["adamw"])
    training = {"inner_opt": "adamw", "options": OPTIMIZERS["adamw"]}
    with (
        serving(tmp_path / "1", training) as one,
        serving(tmp_path / "2", training) as two,
        connect(model, one, two) as optimizer,
    ):
        for step in range(12):
            for net, each in ((alone, reference), (model, optimizer)):
                each.zero_grad()
                use(net, step, used_in(step))
                each.step()
    torch.testing.assert_close(vector(model), vector(alone), rtol=1e-5, atol=1e-6)


def test_where_only_some_have_none_it_counts_as_zeros(tmp_path: Path) -> None:
    options = OPTIMIZERS["sgd"]
    layers = [(0, 1), (0,)]
    with serving(tmp_path, {"inner_opt": "sgd", "options": options}, start_workers=2) as server:

        def work(worker: int) -> Tensor:
            model = make_model()
            with connect(model, server, worker=worker) as optimizer:
                for step in range(5):
                    optimizer.zero_grad()
                    use(model, step, layers[worker])
                    optimizer.step()
            return vector(model)

        found = side_by_side(2, work)
    alone = make_model()
    reference = torch.optim.SGD(alone.parameters(), **options)
    for step in range(5):
        sums: dict[str, Tensor] = {}
        for each in layers:
            alone.zero_grad()
            use(alone, step, each)
            for key, parameter in alone.named_parameters():
                if parameter.grad is not None:
                    sums[key] = sums.get(key, torch.zeros_like(parameter)) + parameter.grad / 2
        for key, parameter in alone.named_parameters():
            parameter.grad = sums.get(key)
        reference.step()
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], vector(alone), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scope", ["parameter", "bucket"])
@pytest.mark.parametrize("value_format", [None, "int2", "fp16"])
def test_its_residual_stays(scope: Scope, value_format: str | None) -> None:
    parameters: dict[str, Tensor] = {
        name: nn.Parameter(torch.zeros(40)) for name in ("a", "b", "c", "d")
    }
    parameters["wide"] = nn.Parameter(torch.zeros(9, dtype=torch.float64))
    shard = Shard(parameters, TopKCompressor(value_format=value_format, error_feedback=True))
    generator = torch.Generator().manual_seed(0)
    given = dict.fromkeys(parameters, 0.0)

    def compress(absent: list[bool]) -> dict[str, Tensor]:
        for parameter, missing in zip(parameters.values(), absent, strict=True):
            parameter.grad = None
            if not missing:
                parameter.grad = torch.randn(
                    parameter.shape, generator=generator, dtype=parameter.dtype
                )
        assert shard.absent() == absent
        made = shard.compress(planned(shard, 0.9, scope), absent=absent)
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                given[name] += float(parameter.grad.double().sum())
        for part in made:
            shard.compressor.residuals.apply(part.update)
            assert part.own is not None
            sent.append(part.own)
        return shard.compressor.residuals.state_dict()

    sent: list[Any] = []
    before = compress([False] * 5)
    after = compress([False, True, False, True, True])
    for name in ("b", "d", "wide"):
        assert torch.equal(before[name], after[name])
        assert before[name].any()
    for name in ("a", "c"):
        assert not torch.equal(before[name], after[name])
    latest = sent[-2]
    assert not ((latest.indices >= 40) & (latest.indices < 80)).any()
    assert latest.indices.numel() > 0
    assert sent[-1].indices.numel() == 0
    compress([True] * 5)
    compress([False] * 5)
    total = sum(float(frame.values.double().sum()) for frame in sent)
    left = sum(float(r.double().sum()) for r in shard.compressor.residuals.state_dict().values())
    assert total + left == pytest.approx(sum(given.values()), rel=1e-4)


def test_segments_leave_tensors_out() -> None:
    left_out = (False, True, True, False, False)
    each = uniform_segments((10, 20, 30, 40, 50), q=0.9, scope="parameter", left_out=left_out)
    assert [(one.start, one.row_numel, one.k) for one in each] == [
        (0, 10, 1),
        (10, 20, 0),
        (30, 30, 0),
        (60, 40, 4),
        (100, 50, 5),
    ]
    bucket = uniform_segments((10, 20, 30, 40, 50), q=0.9, scope="bucket", left_out=left_out)
    assert [(one.start, one.row_numel, one.k) for one in bucket] == [
        (0, 10, 1),
        (10, 50, 0),
        (60, 90, 9),
    ]
    kept = UniformSegments()
    without = kept.of((3, 4), q=0.5, scope="parameter", left_out=(True, False))
    assert kept.of((3, 4), q=0.5, scope="parameter", left_out=(True, False)) is without
    assert [one.k for one in kept.of((3, 4), q=0.5, scope="parameter")] == [2, 2]
    assert [one.k for one in kept.of((3, 4), q=0.5, scope="parameter", left_out=(False, True))] == [
        2,
        0,
    ]


def test_a_server_that_does_not_know_of_it_is_sent_zeros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[bytes] = []
    begin = ServerClient.begin

    def watched(client: ServerClient, new: NewPush) -> None:
        begun.append(new.no_gradient)
        client.takes_no_gradient = True  # from the second step on
        begin(client, new)

    monkeypatch.setattr(ServerClient, "begin", watched)
    model = make_model()
    training = {"inner_opt": "sgd", "options": {"lr": 0.1}}
    with serving(tmp_path, training) as server, connect(model, server, q=0.9) as optimizer:
        optimizer._clients[0].takes_no_gradient = False
        for step in range(3):
            optimizer.zero_grad()
            use(model, step, (0,))
            optimizer.step()
    assert begun == [b"", b"\x3c", b"\x3c"]


class TestTheServer:
    SHAPES = tuple((f"t{n}", (4,), torch.float32 if n % 2 else torch.float64) for n in range(11))

    def central(self) -> CentralModel:
        model = random_model(self.SHAPES)
        config = TrainingConfig(inner_opt="adamw", options={"lr": 0.1})
        return CentralModel(config, model.spec, model)

    def test_reads_what_a_worker_wrote(self) -> None:
        spec = self.central().spec
        for places in ([], [0], [7, 8], [10], list(range(11))):
            absent = [place in places for place in range(11)]
            said = spec.no_gradient(absent)
            assert len(said) == (2 if places else 0)
            assert spec.without_gradient(said).tolist() == absent

    @pytest.mark.parametrize("said", [b"\x01", b"\x01\x00\x00", b"\x00\x08", b"\x00\x00"])
    def test_refuses_what_fits_no_model_of_11_tensors(self, said: bytes) -> None:
        central = self.central()
        model = random_model(self.SHAPES)
        push = push_of(model, random_gradients(model, torch.Generator().manual_seed(1)))
        with pytest.raises(InvalidError, match="a bit for each of 11 tensors"):
            central.check_push(dataclasses.replace(push, no_gradient=said))

    def test_refuses_elements_of_a_tensor_without_gradient(self) -> None:
        central, model = self.central(), random_model(self.SHAPES)
        push = push_of(model, random_gradients(model, torch.Generator().manual_seed(1)))
        with pytest.raises(InvalidError, match="frame 1 holds elements of 't3'"):
            central.check_push(dataclasses.replace(push, no_gradient=b"\x08\x00"))

    def test_counts_density_over_what_has_a_gradient(self) -> None:
        model = random_model(self.SHAPES)
        push = push_of(model, random_gradients(model, torch.Generator().manual_seed(1)), q=0.5)
        assert density([push.frames]) == 0.5
        assert density([push.frames], [22]) == 1.0
        assert density([push.frames, push.frames], [22, 44]) == 0.75

    def test_takes_a_round_that_has_no_gradient_at_all(self) -> None:
        central, model = self.central(), random_model(self.SHAPES)
        before = [bytes(raw) for raw in central.central_raw()]
        push = push_of(model, [torch.zeros_like(flat) for flat in model.flats], q=1.0)
        push = dataclasses.replace(push, no_gradient=model.spec.no_gradient([True] * 11))
        central.check_push(push)
        for _ in range(2):
            central.apply([push, push])
        assert [bytes(raw) for raw in central.central_raw()] == before
        assert central.state()[1]["inner"]["state"] == {}


def test_the_digest_covers_it_and_a_saved_push_keeps_it() -> None:
    frames = (memoryview(b"frame"),)
    pushes = ReplayLog()
    made = pushes.begin(
        START, NewPush(frames=frames, lr=(0.5,), weight_decay=(0.25,), no_gradient=b"\x05")
    )
    again = ReplayLog.from_state(pushes.state_dict()).pending
    assert again is not None
    assert (again.digest, again.no_gradient, again.weight_decay) == (made.digest, b"\x05", (0.25,))
    digests = {
        push_digest((0.5,), frames, **said)
        for said in (
            {},
            {"no_gradient": b"\x05"},
            {"no_gradient": b"\x04"},
            {"weight_decay": (0.25,)},
            {"momentum": (0.25,)},
        )
    }
    assert len(digests) == 5
    old = pushes.state_dict()
    del old["pending"]["no_gradient"], old["pending"]["weight_decay"]
    read = ReplayLog.from_state(old).pending
    assert read is not None
    assert read.digest == push_digest((0.5,), frames)


def test_bits_lie_as_the_contract_says() -> None:
    spec = random_model(TestTheServer.SHAPES).spec
    said = spec.no_gradient([place in (0, 9) for place in range(11)])
    assert said == bytes([0b0000_0001, 0b0000_0010])
    assert np.flatnonzero(spec.without_gradient(said)).tolist() == [0, 9]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restart_goes_on_where_some_tensors_have_no_state_yet(name: str) -> None:
    shapes = tuple((f"t{n}", (3, 4), torch.float32) for n in range(5))
    generator = torch.Generator().manual_seed(3)

    def central() -> CentralModel:
        config = TrainingConfig(inner_opt=name, options=OPTIMIZERS[name], momentum="optimizer")
        model = random_model(shapes)
        return CentralModel(config, model.spec, model)

    def push(absent: set[int]) -> Push:
        model = random_model(shapes)
        flat = random_gradients(model, generator)[0]
        left_out = [place in absent for place in range(5)]
        for place in absent:
            flat[12 * place : 12 * place + 12] = 0.0
        compressor = TopKCompressor(value_format=None, error_feedback=False)
        (vector,) = model.spec.vectors
        segments = uniform_segments(vector.numels, q=0.0, scope="parameter", left_out=left_out)
        frame = compressor.compress(flat, vector.layout, segments).frames[0]
        made = push_of(model, [flat])
        return dataclasses.replace(
            made,
            frames=(decode_frame(frame, numel=vector.numel),),
            no_gradient=model.spec.no_gradient(left_out),
        )

    never_stopped = central()
    for absent in ({1, 4}, {1, 2}):
        never_stopped.apply([push(absent)])
    tensors, metadata = never_stopped.state()
    restarted = central()
    restarted.load_state(tensors, json.loads(json.dumps(metadata)))
    assert restarted.sha256() == never_stopped.sha256()
    for absent in ({1}, {0}, set()):
        one = push(absent)
        for each in (never_stopped, restarted):
            each.check_push(one)
            each.apply([one])
        assert restarted.sha256() == never_stopped.sha256()
