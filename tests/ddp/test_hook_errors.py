"""Bad input to the hook: one clear error on every rank, never a hang."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hook_cases import EXCHANGES, loss_of, small_model
from ranks import TIMEOUT_S, error_of, run_ranks
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from topq_dist import TopQGradientOptimizer, register_topq_hook
from topq_dist.hook.momentum import MomentumName

pytestmark = pytest.mark.gloo
METHODS: tuple[MomentumName, ...] = ("feedback", "corrected", "adam")


def ddp(model: nn.Module | None = None, **options: Any) -> DistributedDataParallel:
    return DistributedDataParallel(model or small_model(), **options)


def bad_registrations(_: int) -> dict[str, str]:
    errors = {}
    plain: Any = small_model()
    errors["not ddp"] = error_of(lambda: register_topq_hook(plain, q=0.9))
    for q in (1.5, -0.1, float("nan"), "half", True):
        value: Any = q
        errors[f"q={q}"] = error_of(lambda value=value: register_topq_hook(ddp(), q=value))  # type: ignore[misc]
    scope: Any = "layer"
    errors["scope"] = error_of(lambda: register_topq_hook(ddp(), q=0.9, scope=scope))
    errors["value_format"] = error_of(lambda: register_topq_hook(ddp(), q=0.9, value_format="fp7"))
    model = ddp()
    no_optimizer: Any = model.parameters()
    errors["optimizer"] = error_of(lambda: register_topq_hook(model, no_optimizer, q=0.9))
    another = torch.optim.Adam(small_model().parameters())
    errors["another's"] = error_of(lambda: register_topq_hook(model, another, q=0.9))
    adam = torch.optim.Adam(model.parameters())
    no_method: Any = "nesterov"
    errors["momentum"] = error_of(lambda: register_topq_hook(model, adam, momentum=no_method))
    for method in METHODS:
        errors[f"{method} alone"] = error_of(
            lambda method=method: register_topq_hook(model, momentum=method)  # type: ignore[misc]
        )
        errors[f"{method} without feedback"] = error_of(
            lambda method=method: register_topq_hook(  # type: ignore[misc]
                model, adam, momentum=method, error_feedback=False
            )
        )
    errors["mask_velocity"] = error_of(lambda: register_topq_hook(model, adam, mask_velocity=False))
    rmsprop = torch.optim.RMSprop(model.parameters())
    errors["corrected RMSprop"] = error_of(
        lambda: register_topq_hook(model, rmsprop, momentum="corrected")
    )
    errors["adam RMSprop"] = error_of(lambda: register_topq_hook(model, rmsprop, momentum="adam"))
    amsgrad = torch.optim.Adam(model.parameters(), amsgrad=True)
    errors["amsgrad"] = error_of(lambda: register_topq_hook(model, amsgrad, momentum="adam"))
    diverging = torch.optim.SGD(model.parameters(), lr=0.1)
    diverging.param_groups[0]["momentum"] = 1.0
    errors["momentum=1"] = error_of(lambda: register_topq_hook(model, diverging))
    top_q = TopQGradientOptimizer(model.parameters(), q=0.5, param_ndim=None, lr=0.1)
    errors["q twice"] = error_of(lambda: register_topq_hook(model, top_q, q=0.9))
    others = TopQGradientOptimizer(list(model.parameters())[1:], q=0.5, param_ndim=None, lr=0.1)
    errors["left out"] = error_of(lambda: register_topq_hook(model, others))
    register_topq_hook(model, q=0.9)
    errors["twice"] = error_of(lambda: register_topq_hook(model, q=0.9))
    taken = ddp()
    taken.register_comm_hook(None, allreduce_hook)
    errors["taken"] = error_of(lambda: register_topq_hook(taken, q=0.9))
    sparse = ddp(nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2)))
    errors["sparse"] = error_of(lambda: register_topq_hook(sparse, q=0.9))
    return errors


def test_a_bad_registration_names_what_was_given_and_what_was_expected(tmp_path: Path) -> None:
    (errors,) = run_ranks(1, bad_registrations, tmp_path)
    expected = {
        "not ddp": ("TypeError", "ddp_model", "Sequential", "DistributedDataParallel"),
        "q=1.5": ("ValueError", "q=1.5", "[0, 1]"),
        "q=-0.1": ("ValueError", "q=-0.1", "[0, 1]"),
        "q=nan": ("ValueError", "q=nan", "number"),
        "q=half": ("TypeError", "q='half'", "number"),
        "q=True": ("TypeError", "q=True", "number"),
        "scope": ("ValueError", "scope='layer'", "parameter, bucket"),
        "value_format": ("ValueError", "value_format='fp7'", "fp32"),
        "optimizer": ("TypeError", "generator", "a torch optimizer"),
        "another's": ("ValueError", "none of the 6 trainable parameters", "expected the optimizer"),
        "momentum": ("ValueError", "momentum='nesterov'", "feedback, ", "optimizer"),
        "mask_velocity": ("ValueError", "mask_velocity=False", "expected 'corrected'"),
        "corrected RMSprop": ("ValueError", "RMSprop", "expected SGD", "betas"),
        "adam RMSprop": ("ValueError", "RMSprop", "expected torch's Adam or AdamW"),
        "amsgrad": ("ValueError", "amsgrad=True", "expected False"),
        "momentum=1": ("ValueError", "momentum=1.0", "below 1"),
        "q twice": ("ValueError", "q=0.9", "expected None"),
        "left out": ("ValueError", "0.weight", "every trainable parameter"),
        "twice": ("ValueError", "topq_hook", "without one"),
        "taken": ("ValueError", "allreduce_hook", "without one"),
        "sparse": ("TypeError", "0.weight", "sparse=False"),
    }
    for method in METHODS:
        named = ("ValueError", f"momentum='{method}'", "expected")
        expected[f"{method} alone"] = (*named, "without an optimizer")
        expected[f"{method} without feedback"] = (*named, "error_feedback=False")
    assert errors.keys() == expected.keys()
    for case, parts in expected.items():
        for part in parts:
            assert part in errors[case], (case, errors[case])


def disagreeing_ranks(rank: int) -> dict[str, str]:
    errors = {}
    errors["q"] = error_of(lambda: register_topq_hook(ddp(), q=0.9 if rank else 0.99))
    errors["value_format"] = error_of(
        lambda: register_topq_hook(ddp(), q=0.9, value_format="fp16" if rank else "fp32")
    )
    disagreeing = ddp()
    adam = torch.optim.Adam(disagreeing.parameters(), betas=(0.0, 0.99))
    method: MomentumName = "feedback" if rank else "optimizer"
    errors["momentum"] = error_of(
        lambda: register_topq_hook(disagreeing, adam, q=0.9, momentum=method)
    )
    errors["one rank is wrong"] = error_of(
        lambda: register_topq_hook(ddp(), q=7.0 if rank else 0.5)
    )
    errors["ranks_per_node"] = error_of(
        lambda: register_topq_hook(
            ddp(), q=0.5, exchange="hierarchical", ranks_per_node=2 if rank else 1
        )
    )
    live = ddp()
    top_q = TopQGradientOptimizer(live.parameters(), q=0.5, param_ndim=None, lr=0.1)
    register_topq_hook(live, top_q)
    loss_of(live, 0, rank).backward()  # type: ignore[no-untyped-call]
    top_q.param_groups[0]["q"] = 0.9 if rank else 0.8
    errors["live q"] = error_of(lambda: loss_of(live, 1, rank).backward())  # type: ignore[no-untyped-call]
    for exchange in EXCHANGES:
        for case in ("fails", "differs"):
            per_node = 2 if exchange == "hierarchical" else None
            model = ddp(bucket_cap_mb=0.005)
            top_q = TopQGradientOptimizer(model.parameters(), q=0.5, param_ndim=None, lr=0.1)
            register_topq_hook(model, top_q, exchange=exchange, ranks_per_node=per_node)
            loss_of(model, 0, rank).backward()  # type: ignore[no-untyped-call]
            if rank == 1:
                top_q.param_groups[0]["q"] = 7.0 if case == "fails" else 0.7
            loss = loss_of(model, 1, rank)
            errors[f"{exchange} {case}"] = error_of(loss.backward)
    return errors


def test_ranks_that_disagree_all_raise_at_once(tmp_path: Path) -> None:
    started_s = time.monotonic()
    ranks = run_ranks(2, disagreeing_ranks, tmp_path)
    assert time.monotonic() - started_s < TIMEOUT_S
    for errors in ranks:
        for part in ("ExchangeError", "rank 0 has 'q=0.99", "rank 1 has 'q=0.9 "):
            assert part in errors["q"], errors["q"]
        for part in ("ExchangeError", "value_format=fp32", "value_format=fp16"):
            assert part in errors["value_format"], errors["value_format"]
        for part in ("ExchangeError", "momentum=optimizer", "momentum=feedback"):
            assert part in errors["momentum"], errors["momentum"]
        for part in ("ExchangeError", "rank 0 has 'group 0: q=0.8", "rank 1 has 'group 0: q=0.9"):
            assert part in errors["live q"], errors["live q"]
        for part in ("q=7.0", "expected a number in [0, 1]"):
            assert part in errors["one rank is wrong"]
        for part in ("ranks_per_node=1", "ranks_per_node=2"):
            assert part in errors["ranks_per_node"]
        for exchange in EXCHANGES:
            assert "q=0.5" in errors[f"{exchange} differs"], errors[f"{exchange} differs"]
            assert "q=0.7" in errors[f"{exchange} differs"]
    assert ranks[0]["one rank is wrong"].startswith("ExchangeError: rank 1 could not make its part")
    for exchange in EXCHANGES:
        assert "q=7.0" in ranks[1][f"{exchange} fails"], ranks[1][f"{exchange} fails"]
        assert "rank 1 could not compress" in ranks[0][f"{exchange} fails"]


def unmoving_parameters(_: int) -> list[str]:
    model = ddp()
    optimizer = TopQGradientOptimizer(model.parameters(), q=0.9, param_ndim=-1, lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        register_topq_hook(model, optimizer)
    assert all(warning.filename == __file__ for warning in caught)
    return [str(warning.message) for warning in caught]


def test_a_pairing_in_which_a_parameter_never_moves_warns_once_by_name(tmp_path: Path) -> None:
    ((message,),) = run_ranks(1, unmoving_parameters, tmp_path)
    for name in ("0.bias", "2.bias", "4.bias"):
        assert name in message
    assert "weight" not in message
