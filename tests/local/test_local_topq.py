"""LocalTopQ on gloo ranks: voids, errors alike on all ranks, buffers, wrappers, resumed runs."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hook_cases import small_model
from local_cases import backward, equal, inner_optimizer, local, numbers, train
from ranks import error_of, run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from topq_dist import LocalTopQ

pytestmark = [pytest.mark.gloo, pytest.mark.usefixtures("one_thread")]
EXCHANGES = ("allgather", "split", "hierarchical")
STREAMED: dict[str, Any] = {"every": 4, "q": 0.8, "fragments": 3, "overlap": 2}


def kept(steps: LocalTopQ) -> dict[str, Any]:
    """Return what a void round must leave as it is."""
    state = steps.state_dict()
    return {key: state[key] for key in ("outer", "residuals", "velocity", "base")}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(equal(one[key], other[key]) for key in one)


def voids(rank: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for exchange in EXCHANGES:
        per_node = 2 if exchange == "hierarchical" else None
        model, steps = local(
            rank,
            every=1,
            q=0.8,
            outer_momentum=0.5,
            exchange=exchange,
            ranks_per_node=per_node,
        )
        train(model, steps, rank, 0, 3)
        before, own = kept(steps), numbers(model)
        wrong = model.get_parameter("2.weight")
        backward(model, 3, rank)
        if rank == 1:
            assert wrong.grad is not None
            wrong.grad[0, 0] = torch.inf
        steps.step()
        results[f"{exchange}, nothing lost"] = same(before, kept(steps))
        results[f"{exchange}, own steps stay"] = not equal(own, numbers(model))
        results[f"{exchange}, void"] = steps.void_rounds
        if rank == 1:
            # whoever finds a rank with parameters that are lost can have it begin anew
            outer = steps.state_dict()["outer"]
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(outer[name])
            steps.optimizer.state.clear()
        train(model, steps, rank, 4, 6)
        results[f"{exchange}, after"] = numbers(model)
    with torch.no_grad():
        wrong = next(model.parameters())
        wrong.fill_(torch.nan if rank == 1 else 1.0)
    before, own = kept(steps), numbers(model)
    results["end"] = error_of(steps.synchronize)
    results["end, nothing lost"] = same(before, kept(steps))
    results["end, own"] = bool(torch.equal(wrong, own["0.weight"])) or rank == 1
    return results


def test_a_change_that_is_not_finite_voids_the_round_on_every_rank(tmp_path: Path) -> None:
    ranks = run_ranks(4, voids, tmp_path)
    for exchange in EXCHANGES:
        for rank in ranks:
            assert rank[f"{exchange}, nothing lost"], exchange
            assert rank[f"{exchange}, own steps stay"]
            assert rank[f"{exchange}, void"] == 1
            assert equal(rank[f"{exchange}, after"], ranks[0][f"{exchange}, after"])
        assert all(bool(one.isfinite().all()) for one in ranks[0][f"{exchange}, after"].values())
    for rank in ranks:
        assert rank["end"].startswith("RuntimeError: ranks cannot be made equal")
        assert rank["end, nothing lost"]
        assert rank["end, own"]


def disagree(rank: int) -> dict[str, Any]:
    def started(**options: Any) -> str:
        usual = {"every": 2, "q": 0.9}
        return error_of(lambda: local(0, **(usual | options)))

    results: dict[str, Any] = {
        "q": started(q=0.9 + 0.01 * rank),
        "every": started(every=2 + rank),
        "one is wrong": started(every=2 * (1 - rank)),
        "outer_lr": started(outer_lr=1.0 - 0.1 * rank),
    }
    model = small_model() if rank == 0 else nn.Sequential(nn.Linear(13, 40))
    results["model"] = error_of(lambda: LocalTopQ(model, inner_optimizer(model), every=2, q=0.9))
    late, steps = local(0, every=2, q=0.9)
    before = numbers(late)
    backward(late, 0, rank)
    steps.step()
    steps.q = 0.9 + 0.01 * rank
    backward(late, 1, rank)
    results["later"] = error_of(steps.step)
    results["later, outer as it was"] = equal(
        steps.state_dict()["outer"], {n: before[n] for n, _ in late.named_parameters()}
    )
    wrong: Any = {
        "model": lambda: LocalTopQ("no", steps.optimizer, every=2, q=0.9),  # type: ignore[arg-type]
        "optimizer": lambda: LocalTopQ(late, "no", every=2, q=0.9),  # type: ignore[arg-type]
        "other's": lambda: LocalTopQ(small_model(), steps.optimizer, every=2, q=0.9),
        "exchange": lambda: local(0, every=2, q=0.9, exchange="dense"),
        "group": lambda: local(0, every=2, q=0.9, process_group="all"),
        "format": lambda: local(0, every=2, q=0.9, value_format="int3"),
        "decay": lambda: local(0, every=2, q=0.9, residual_decay=1.5),
        "nodes": lambda: local(0, every=2, q=0.9, exchange="hierarchical", ranks_per_node=3),
        "fragments": lambda: local(0, every=2, q=0.9, fragments=7),
        "ddp": lambda: LocalTopQ(DistributedDataParallel(late), steps.optimizer, every=2, q=0.9),
    }
    return results | {f"wrong {name}": error_of(action) for name, action in wrong.items()}


def test_ranks_that_disagree_end_in_one_error_on_all(tmp_path: Path) -> None:
    ranks = run_ranks(2, disagree, tmp_path)
    for result in ranks:
        for case, words in (
            ("q", "q=0.91"),
            ("every", "every=3"),
            ("outer_lr", "lr=0.9"),
            ("model", "ranks disagree"),
            ("later", "q=0.91"),
        ):
            assert result[case].startswith("ExchangeError"), result[case]
            assert words in result[case]
        assert result["later, outer as it was"]
        for case, words in (
            ("model", "TypeError: model is a str"),
            ("optimizer", "TypeError: optimizer is a str"),
            ("other's", "ValueError: optimizer has parameters of shapes"),
            ("exchange", "ValueError: exchange='dense': expected one of 'allgather'"),
            ("group", "ValueError: process_group='all'"),
            ("format", "ValueError: value_format='int3'"),
            ("decay", "ValueError: residual_decay=1.5"),
            ("nodes", "ValueError: ranks_per_node=3"),
            ("fragments", "ValueError: fragments=7: expected at most 6"),
            ("ddp", "ValueError: process_group has the ranks"),
        ):
            assert result[f"wrong {case}"].startswith(words), result[f"wrong {case}"]
    assert ranks[1]["one is wrong"].startswith("ValueError: every=0")
    assert ranks[0]["one is wrong"].startswith("ExchangeError: rank 1 could not make its part")


def normed(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(13, 8), nn.BatchNorm1d(8), nn.Linear(8, 5))
    model.register_buffer("mask", torch.full((2,), float(seed) - torch.inf))
    return model


class Counting(nn.Linear):
    """A module that puts another tensor in its buffer's place at every step."""

    def __init__(self) -> None:
        super().__init__(13, 5)
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen = self.seen + inputs.mean().detach()
        return super().forward(inputs)


def buffers(rank: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    counting = Counting()
    steps = LocalTopQ(counting, inner_optimizer(counting), every=2, q=0.5)
    train(counting, steps, rank, 0, 2)
    results["replaced"] = counting.seen
    for rule in ("first", "own"):
        for overlap in (0, 1):
            model = normed(rank)
            steps = LocalTopQ(
                model,
                inner_optimizer(model),
                every=2,
                q=0.5,
                buffers=rule,
                overlap=overlap,
            )
            results[f"{rule}, start"] = numbers(model)
            train(model, steps, rank, 0, 2 + overlap)
            results[f"{rule}, {overlap}"] = numbers(model)
            steps.synchronize()
            results[f"{rule}, {overlap}, end"] = numbers(model)
    return results


def test_buffers_have_a_rule(tmp_path: Path) -> None:
    first, second = run_ranks(2, buffers, tmp_path)
    names = ("1.running_mean", "1.running_var", "1.num_batches_tracked", "mask")
    assert bool(first["replaced"].any())
    assert torch.equal(first["replaced"], second["replaced"])
    for rule in ("first", "own"):
        assert equal(first[f"{rule}, start"], second[f"{rule}, start"])
    for overlap in (0, 1):
        for end in ("", ", end"):
            one, other = (r[f"first, {overlap}{end}"] for r in (first, second))
            # beside the exchange the first rank has gone on with its own
            alike = [torch.equal(one[name], other[name]) for name in names]
            assert alike == [bool(end) or not overlap] * 3 + [True]
            mine, theirs = (r[f"own, {overlap}{end}"] for r in (first, second))
            assert not torch.equal(mine["1.running_mean"], theirs["1.running_mean"])
            assert torch.equal(mine["0.weight"], theirs["0.weight"]) or not (end or not overlap)


def resumed(rank: int, folder: Path) -> dict[str, Any]:
    """Save in the middle of rounds, and go on in another model and in the same one."""
    results: dict[str, Any] = {}
    cases: dict[str, dict[str, Any]] = {
        "plain": {"every": 3, "q": 0.8},
        "streamed": STREAMED,
        "blended": {**STREAMED, "blend": 0.5, "outer_momentum": 0.9, "outer_lr": 0.5},
        "averages": {"every": 3, "q": 0.0, "overlap": 1},
    }
    for case, options in cases.items():
        model, steps = local(0, **options)
        train(model, steps, rank, 0, 7)
        file = folder / f"{case}{rank}.pt"
        torch.save({"local": steps.state_dict(), "optimizer": steps.optimizer.state_dict()}, file)
        everyone = steps.state_dict(all_ranks=True)
        train(model, steps, rank, 7, 14)
        other, resumed_steps = local(rank + 5, **options)
        saved = torch.load(file, weights_only=True)
        resumed_steps.load_state_dict(saved["local"])
        resumed_steps.optimizer.load_state_dict(saved["optimizer"])
        # at once, with what was under way still under way
        again = resumed_steps.state_dict()
        assert len(again["under_way"]) == len(saved["local"]["under_way"])
        train(other, resumed_steps, rank, 7, 14)
        results[case] = equal(numbers(model), numbers(other))
        results[f"{case}, state"] = same(kept(steps), kept(resumed_steps))
        results[f"{case}, stats"] = resumed_steps.stats().steps == 14
        if rank == 0:
            torch.save(everyone, folder / f"{case}.pt")
            assert len(everyone["ranks"]) == 2
        broken = saved["local"] | {"outer": {}}
        results[f"{case}, broken"] = error_of(partial(resumed_steps.load_state_dict, broken))
        results[f"{case}, untouched"] = same(kept(steps), kept(resumed_steps))
        foreign = saved["local"] | {"rank": 1 - rank}
        results[f"{case}, foreign"] = error_of(partial(resumed_steps.load_state_dict, foreign))
        steps.synchronize()
        results[f"{case}, end"] = numbers(model)
    return results


def on_three(rank: int, folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for case, options in (("plain", {"every": 3, "q": 0.8}), ("streamed", STREAMED)):
        model, steps = local(0, **options)
        saved = torch.load(folder / f"{case}.pt", weights_only=True)
        steps.load_state_dict(saved)
        state = steps.state_dict()
        results[case] = {"state": kept(steps), "parameters": numbers(model), "step": state["step"]}
        train(model, steps, rank, 7, 10)
        steps.synchronize()
        results[f"{case}, end"] = numbers(model)
    return results


def test_a_run_is_resumed_whole_and_on_other_ranks_with_all_residuals(tmp_path: Path) -> None:
    ranks = run_ranks(2, resumed, tmp_path, tmp_path)
    for result in ranks:
        for case in ("plain", "streamed", "blended", "averages"):
            for part in ("", ", state", ", stats", ", untouched"):
                assert result[f"{case}{part}"], (case, part)
            assert "state has no outer of" in result[f"{case}, broken"]
            assert "state has rank" in result[f"{case}, foreign"]
            assert "state_dict(all_ranks=True)" in result[f"{case}, foreign"]
            assert equal(result[f"{case}, end"], ranks[0][f"{case}, end"])
    three = run_ranks(3, on_three, tmp_path / "three", tmp_path)
    for case in ("plain", "streamed"):
        saved = torch.load(tmp_path / f"{case}.pt", weights_only=True)["ranks"]
        for result in three:
            assert equal(result[case]["state"]["outer"], saved[0]["outer"])
            assert equal(result[case]["parameters"], three[0][case]["parameters"])
            assert result[case]["step"] == 7
            assert equal(result[f"{case}, end"], three[0][f"{case}, end"])
        for name, outer in saved[0]["outer"].items():
            brought: Tensor = sum(one["residuals"][name] for one in saved)
            there = sum(r[case]["state"]["residuals"].get(name, 0) for r in three)
            assert torch.equal(torch.as_tensor(there), brought)
            mean = sum(one["parameters"][name] for one in saved) / 2
            torch.testing.assert_close(three[0][case]["parameters"][name], mean)
            assert outer.shape == mean.shape


def odd_models() -> dict[str, nn.Module]:
    mixed = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3))
    mixed.register_parameter("wide", nn.Parameter(torch.randn(3, dtype=torch.float64)))
    mixed.register_parameter("narrow", nn.Parameter(torch.randn(3, dtype=torch.float16)))
    tied = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 3, 1, bias=False))
    tied[1].weight = tied[0].weight
    rows = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    rows.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    half = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)).bfloat16()
    return {"mixed": mixed, "tied": tied, "channels last": rows, "bf16": half}


def odd(rank: int) -> dict[str, Any]:
    torch.manual_seed(rank)
    results: dict[str, Any] = {}
    for options in ({}, {"overlap": 1}, {"overlap": 1, "blend": 0.5}):
        for name, model in odd_models().items():
            first = next(model.parameters())
            dtype = torch.bfloat16 if name == "bf16" else torch.float32
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
            steps = LocalTopQ(model, optimizer, every=2, q=0.5, **options)
            started = first.detach().clone()
            for step in range(6):
                generator = torch.Generator().manual_seed(10 * step + rank)
                inputs = torch.randn(2, 3, 9, 9, generator=generator).to(dtype)
                loss = model(inputs).float().square().mean()
                for other in model.parameters():
                    if other.dtype != dtype:
                        loss = loss + other.float().square().sum()
                optimizer.zero_grad()
                loss.backward()
                steps.step()
            steps.synchronize()
            assert not torch.equal(started, first)
            results[f"{name} {options}"] = numbers(model)
    return results


def test_tensors_of_any_dtype_and_order_end_alike(tmp_path: Path) -> None:
    first, second = run_ranks(2, odd, tmp_path)
    assert len(first) == 12
    for case, found in first.items():
        assert equal(found, second[case]), case
        assert all(bool(one.isfinite().all()) for one in found.values())


def wrapped(rank: int) -> dict[str, Any]:
    """Two nodes of two ranks: DDP inside, local steps across; and the same with one rank a node."""
    nodes = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    across = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    model = small_model(seed=rank)
    ddp = DistributedDataParallel(model, process_group=nodes[rank // 2])
    steps = LocalTopQ(ddp, inner_optimizer(ddp), every=3, q=0.8, process_group=across[rank % 2])
    train(ddp, steps, rank, 0, 8)
    results: dict[str, Any] = {"ddp": numbers(model), "names": sorted(steps.state_dict()["outer"])}
    # all ranks of a node have one gradient, of which a frame a node is sent
    model = small_model(seed=rank)
    ddp = DistributedDataParallel(model, process_group=nodes[rank // 2])
    steps = LocalTopQ(
        ddp, inner_optimizer(ddp), every=3, q=0.8, exchange="hierarchical", ranks_per_node=2
    )
    train(ddp, steps, rank, 0, 8)
    results["hierarchical"] = numbers(model)
    results["sent"] = steps.stats().sent_bytes
    return results


def node_alone(rank: int) -> dict[str, Tensor]:
    """Do on one rank what a node does: step along the mean gradient of its two."""
    model, steps = local(0, every=3, q=0.8)
    for step in range(8):
        totals: list[Tensor] = []
        for place in (2 * rank, 2 * rank + 1):
            backward(model, step, place)
            grads = [p.grad / 2 for p in model.parameters() if p.grad is not None]
            totals = [t + g for t, g in zip(totals, grads, strict=True)] if totals else grads
        for parameter, total in zip(model.parameters(), totals, strict=True):
            parameter.grad = total
        steps.step()
    return numbers(model)


def test_ddp_inside_a_node_and_local_steps_across(tmp_path: Path) -> None:
    ranks = run_ranks(4, wrapped, tmp_path)
    alone = run_ranks(2, node_alone, tmp_path / "alone")
    for rank, result in enumerate(ranks):
        assert equal(result["ddp"], alone[rank // 2])
        assert result["names"] == ["0.bias", "0.weight", "2.bias", "2.weight", "4.bias", "4.weight"]
        for name, number in result["hierarchical"].items():
            torch.testing.assert_close(number, result["ddp"][name], rtol=1e-3, atol=1e-4)
        assert equal(result["hierarchical"], ranks[rank // 2 * 2]["hierarchical"])
    assert ranks[1]["sent"] < ranks[0]["sent"] / 3


def test_a_rank_alone_and_what_is_said_of_voids(
    alone: dist.ProcessGroup, caplog: pytest.LogCaptureFixture
) -> None:
    model, steps = local(0, every=2, q=0.9, process_group=alone)
    train(model, steps, 0, 0, 4)
    empty = nn.ParameterList([nn.Parameter(torch.zeros(0, 3))])
    nothing = LocalTopQ(
        empty, inner_optimizer(empty), every=1, q=0.9, overlap=0, process_group=alone
    )
    nothing.step()
    nothing.synchronize()
    stats = steps.stats()
    assert stats.steps == 4
    assert stats.dense_bytes == 4 * 4 * sum(p.numel() for p in model.parameters())
    assert stats.ratio > 10
    saved = steps.state_dict()
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with caplog.at_level(logging.WARNING):
        train(model, steps, 0, 4, 26)
    assert steps.void_rounds == 11
    said = [r.message for r in caplog.records if "void on every rank" in r.message]
    # ever more rarely
    for in_a_row, message in zip((1, 2, 4, 8), said, strict=True):
        assert f"{in_a_row} of them in a row" in message
    caplog.clear()
    steps.load_state_dict(saved)
    steps.optimizer.state.clear()
    train(model, steps, 0, 4, 6)
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    train(model, steps, 0, 6, 8)
    assert "1 of them in a row" in caplog.text


def watched(rank: int) -> dict[str, float]:
    model, steps = local(rank, **STREAMED)
    steps.observe()
    train(model, steps, rank, 0, 24)
    return {one.metric.name: one.value for one in steps.readings()}


def test_who_looks_on_sees_what_waits(tmp_path: Path) -> None:
    for seen in run_ranks(2, watched, tmp_path):
        assert seen["topq_steps"] == 24
        assert seen["topq_void_steps"] == 0
        assert 0 < seen["topq_residual_ratio"] < 10
        assert 1 <= seen["topq_oldest_unsent_steps"] <= 6  # rounds of each fragment
        assert seen["topq_encode_seconds"] > 0
