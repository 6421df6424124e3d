"""The emulated link: what it holds back for how long, and what is said of it."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
from train_jobs import finish, results, start
from training.link import EmulatedLink, moved_bytes
from training.options import parse_comparison, parse_rank
from training.report import Result
from training.speed import break_even_bits_per_s, speed_lines, target_accuracy

STEPS = 12


def result(**changes: object) -> Result:
    dense = Result(
        mode="dense",
        data="digits",
        ranks=2,
        q=None,
        inner_opt="sgd",
        lr=0.1,
        batch_size=32,
        seed=0,
        steps=100,
        parameters=250_000,
        parameters_sha256="0" * 64,
        test_accuracy=0.97,
        test_loss=0.1,
        dense_bytes=100_000_000,
        select_s=None,
        wait_s=None,
        train_s=9.0,
        link="100mbit",
        held_s=8.0,
        accuracies=[(3.0, 0.9), (6.0, 0.966), (9.0, 0.97)],
        losses=[0.1],
        sent_bytes=[100_000_000],
        received_bytes=[100_000_000],
    )
    return replace(dense, **changes)  # type: ignore[arg-type]


def sparse(**changes: object) -> Result:
    given: dict[str, object] = {
        "mode": "topq",
        "q": 0.99,
        "train_s": 2.1,
        "held_s": 0.1,
        "accuracies": [(0.5, 0.9), (1.5, 0.967), (2.1, 0.968)],
        "sent_bytes": [1_000_000],
        "received_bytes": None,
    }
    return result(**(given | changes))


@pytest.mark.parametrize(
    ("mode", "ranks", "expected"),
    [("dense", 2, 100), ("dense", 4, 150), ("topq", 2, 100), ("topq", 4, 300), ("ps", 4, 800)],
)
def test_a_link_carries_what_the_collective_sends(mode: str, ranks: int, expected: int) -> None:
    assert moved_bytes(mode, ranks, 100, 100) == expected  # type: ignore[arg-type]


def test_a_step_waits_as_long_as_its_bytes_take() -> None:
    link = EmulatedLink("100mbit", "dense", 2)
    began_s = time.perf_counter()
    link.hold_back(250_000, 0)
    assert time.perf_counter() - began_s >= 0.02
    assert link.held_s == pytest.approx(0.02)


def test_no_link_holds_nothing_back() -> None:
    link = EmulatedLink("none", "dense", 2)
    link.hold_back(10**12, 10**12)
    assert link.held_s == 0.0


def test_dense_is_faster_beyond_the_rate_at_which_both_take_as_long() -> None:
    dense, other = result(), sparse()
    rate = break_even_bits_per_s(dense, other)

    def step_s(one: Result) -> float:
        moved = moved_bytes(one.mode, one.ranks, one.sent_bytes[-1] / one.steps, 0)
        return (one.train_s - one.held_s) / one.steps + 8 * moved / rate

    assert step_s(dense) == pytest.approx(step_s(other))
    assert break_even_bits_per_s(dense, sparse(train_s=0.5, held_s=0.1)) == float("inf")


def test_says_how_much_sooner_and_when_dense_is_faster() -> None:
    lines = speed_lines([result(), sparse()])
    assert lines == [
        "Links of 100 Mbit were emulated: each exchange waited as long as its bytes take.",
        "top-Q got to 96.5 %, what dense ends with less half a point, 4.0 times sooner.",
        "Dense is the faster one on links beyond 792 Mbit.",
    ]


@pytest.mark.parametrize(
    ("accuracies", "said"),
    [([(0.5, 0.9)], "did not get to 96.5 %"), ([(12.0, 0.97)], "2.0 times later")],
)
def test_does_not_hide_a_run_that_was_worse(
    accuracies: list[tuple[float, float]], said: str
) -> None:
    assert said in " ".join(speed_lines([result(), sparse(accuracies=accuracies)]))


def test_says_nothing_of_one_mode_alone() -> None:
    assert speed_lines([result()]) == speed_lines([sparse()]) == []
    assert target_accuracy([sparse()]) is None


def test_who_has_a_link_unless_told_otherwise() -> None:
    assert parse_comparison([]).training.link == "100mbit"
    assert parse_comparison(["--mode", "ps", "--server", "host:1"]).training.link == "none"
    assert parse_comparison(["--link", "1gbit"]).training.link == "1gbit"
    assert parse_rank([]).training.link == "none"


@pytest.mark.gloo
def test_a_link_changes_the_time_and_nothing_else(tmp_path: Path) -> None:
    found = {}
    for link in ("none", "1gbit"):
        out = tmp_path / link
        arguments = ["--topq-only", "--steps", STEPS, "--out", out, "--link", link]
        code, said, complaints = finish(start(*arguments))
        assert (code, complaints) == (0, "")
        assert ("emulated" in said) == (link == "1gbit")
        found[link] = results(out)["topq"]
    alone, linked = found["none"], found["1gbit"]
    assert linked["parameters_sha256"] == alone["parameters_sha256"]
    assert alone["held_s"] == 0.0
    assert linked["held_s"] == pytest.approx(
        8e-9 * moved_bytes("topq", 2, linked["sent_bytes"][-1], 0)
    )
    assert linked["train_s"] > linked["held_s"]
    assert len(linked["accuracies"]) == STEPS
