"""`topq advise`: alone on a given link, with a user's own factory, and what it refuses."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

import pytest

from topq_dist.advice.command import parse_rate, parse_time
from topq_dist.cli import main

FACTORY = """\
import torch
from torch import nn

def factory():
    model = nn.Linear(64, 64)
    return model, lambda wrapped: wrapped(torch.randn(4, 64)).square().mean()

def broken():
    return nn.Linear(2, 2)

def losing():
    def loss(wrapped):
        raise ValueError("no batch here")
    return nn.Linear(2, 2), loss
"""
ALONE = ("--bandwidth", "10mbit", "--budget", "100ms", "--q", "0.9", "--value-format", "int2")


def run(*words: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(("advise", *words))
    return code, out.getvalue(), err.getvalue()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "advised_factory.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def test_parameters_on_a_given_link_as_json() -> None:
    code, out, err = run("--parameters", "100K", "--world-size", "3", "--json", *ALONE)
    assert code == 0, err
    told = json.loads(out)
    assert 90_000 < told["parameters"] < 110_000
    assert told["link"] == {"bandwidth_bits_per_s": 1e7, "latency_s": 0.0, "world_size": 3}
    assert all(one["compute_s"] == 0 for one in told["predictions"])
    dense = next(one for one in told["predictions"] if one["title"] == "dense")
    assert dense["link_s"] == pytest.approx(8e-7 * 4 / 3 * 4 * told["parameters"])
    assert err.count("measuring ") > 5


def test_a_factory_on_a_given_link_as_text(folder: Path) -> None:
    code, out, _ = run("--model", "advised_factory:factory", "--latency", "1ms", *ALONE)
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "4,160 parameters, 2 ranks; a link of 10 Mbit/s and 1 ms, as given"
    assert lines[2].split() == [
        "method",
        "step",
        "ms",
        "compute",
        "engine",
        "link",
        "kB",
        "a",
        "step",
    ]
    assert any(line.startswith("local steps every=5 q=0.97 int2") for line in lines)
    assert any(line.startswith("Recommended: ") for line in lines)
    assert "accuracy (docs/convergence.md, docs/density.md" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "expected one of --model and --parameters"),
        (("--parameters", "1M"), "no link to measure: expected torchrun, or --bandwidth"),
        (("--parameters", "10", *ALONE), "--parameters=10: expected a thousand at least"),
        (("--parameters", "1000T", *ALONE), "expected a model that this machine has memory for"),
        (("--model", "advised_factory", *ALONE), "expected MODULE:FACTORY"),
        (("--model", "advised_factory:absent", *ALONE), "absent"),
        (
            ("--model", "advised_factory:broken", *ALONE),
            "returned a Linear: expected (model, loss)",
        ),
        (("--parameters", "1M", "--bandwidth", "fast"), "'fast': expected a rate above zero"),
        (("--parameters", "1M", *ALONE, "--q", "2"), "qs=2.0: expected a number in [0, 1]"),
    ],
)
def test_what_is_wrong_is_said_on_one_line(words: tuple[str, ...], said: str, folder: Path) -> None:
    code, out, err = run(*words)
    assert code in (1, 2)
    assert (out, err.count("\n")) == ("", 1)
    assert said in err


def test_under_torchrun_the_link_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = run("--parameters", "1M", "--bandwidth", "1gbit")
    assert (code, "--bandwidth under torchrun" in err) == (2, True)


def test_an_error_of_the_users_own_is_shown_where_it_is(folder: Path) -> None:
    with pytest.raises(ValueError, match="no batch here"):
        run("--model", "advised_factory:losing", *ALONE)


def test_rates_and_times_are_read() -> None:
    assert [parse_rate(text) for text in ("100mbit", "2.5 Gbit/s", "1gbit")] == [
        1e8,
        2.5e9,
        1e9,
    ]
    assert [parse_time(text) for text in ("250us", "1.5ms", "2s")] == [2.5e-4, 1.5e-3, 2.0]
    for text in ("0mbit", "mbit", "1"):
        with pytest.raises(ValueError, match="expected a rate"):
            parse_rate(text)
