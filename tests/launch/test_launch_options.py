"""The command lines: what they default to, hand on, and refuse."""

import os
import shlex
from pathlib import Path

import pytest
import torch
from training.models import OPTIMIZERS, set_lr
from training.options import parse_comparison, parse_rank, parse_worker
from training.settings import RECIPES


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--q 1.5", ["--q", "'1.5'", "a number in [0, 1]"]),
        ("--q=-0.1", ["--q", "'-0.1'", "a number in [0, 1]"]),
        ("--q nan", ["--q", "'nan'", "a number in [0, 1]"]),
        ("--q much", ["--q", "'much'", "a number in [0, 1]"]),
        ("--data mnist", ["--data", "'mnist'", "digits, fashion-mnist, shakespeare"]),
        ("--inner-opt sdg", ["--inner-opt", "'sdg'", "adamw", "sgd"]),
        ("--inner-opt lbfgs", ["--inner-opt", "'lbfgs'", "adamw", "sgd"]),
        ("--lr 0", ["--lr", "'0'", "above 0"]),
        ("--lr inf", ["--lr", "'inf'", "above 0"]),
        ("--ranks 0", ["--ranks", "'0'", "at least 1"]),
        ("--ranks two", ["--ranks", "'two'", "at least 1"]),
        ("--steps 0", ["--steps", "'0'", "at least 1"]),
        ("--batch-size 0", ["--batch-size", "'0'", "at least 1"]),
        ("--seed=-1", ["--seed", "'-1'", "at least 0"]),
        ("--checkpoint-every 0 --checkpoint d", ["--checkpoint-every", "'0'", "at least 1"]),
        ("--checkpoint-every 7", ["--checkpoint-every 7", "without --checkpoint"]),
        ("--resume", ["--resume", "without --checkpoint"]),
        ("--dense-only --topq-only", ["--dense-only", "--topq-only", "one of them"]),
        ("--dense-only --q 0.5", ["--q 0.5", "without top-Q"]),
        ("--data-dir d", ["--data-dir d", "digits", "no --data-dir"]),
        ("--stepss 4", ["--stepss 4"]),
        ("--mode grpc", ["--mode", "'grpc'", "ddp", "ps"]),
        ("--mode ps --dense-only", ["--dense-only", "--mode ps", "one of them"]),
        ("--server h:1", ["--server h:1", "without --mode ps"]),
        ("--downlink exact", ["--downlink exact", "without --mode ps"]),
        ("--mode ps --downlink some", ["--downlink", "'some'", "exact", "topq", "dense"]),
        ("--mode ps --downlink-q 2", ["--downlink-q", "'2'", "a number in [0, 1]"]),
        ("--mode ps --downlink exact --downlink-q 0.9", ["--downlink-q 0.9", "exact", "topq"]),
        ("--mode ps --server h:1 --downlink exact", ["--downlink exact", "with --server"]),
        ("--mode ps --tls-ca f", ["--tls-ca f", "without --server"]),
        ("--mode ps --server h:1 --tls-ca f --tls-cert c", ["--tls-cert", "--tls-key", "both"]),
        ("--mode ps --server h:1 --tls-cert c --tls-key k", ["--tls-cert c", "--tls-ca", "both"]),
    ],
)
def test_bad_input_is_refused_in_one_line(
    line: str, expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse_comparison(shlex.split(line))
    assert exit_info.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    for part in expected:
        assert part in message


def test_only_the_first_rank_speaks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as exit_info:
        parse_rank(["--q", "7"])
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("data", RECIPES)
def test_defaults_are_the_recipe_of_the_data_set(data: str) -> None:
    comparison = parse_comparison(["--data", data])
    training, recipe = comparison.training, RECIPES[data]
    assert (training.inner_opt, training.lr) == (recipe.inner_opt, recipe.lr)
    assert training.lr_schedule == recipe.lr_schedule
    assert (training.steps, training.batch_size) == (recipe.steps, recipe.batch_size)
    assert (training.q, training.seed, comparison.ranks) == (0.97, 0, 2)
    assert comparison.modes == ("dense", "topq")


def test_another_optimizer_gets_a_learning_rate_that_fits_it() -> None:
    assert parse_comparison(["--inner-opt", "Adam"]).training.lr == 1e-3
    assert parse_comparison(["--data", "shakespeare", "--inner-opt", "NAdam"]).training.lr == 2e-3
    assert parse_comparison(["--inner-opt", "adam", "--lr", "0.5"]).training.lr == 0.5


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--q 0.1 --lr 3e-7 --inner-opt adamw",
        "--lr-schedule linear --lr 0.2",
        "--data shakespeare --data-dir 'a b' --steps 3 --batch-size 5 --seed 9",
        "--checkpoint c --checkpoint-every 4 --resume",
    ],
)
def test_the_ranks_get_the_options_of_the_comparison(line: str) -> None:
    training = parse_comparison(shlex.split(line)).training
    rank = parse_rank(training.arguments("topq"))
    assert rank.training == training
    assert rank.mode == "topq"


def test_a_linear_schedule_goes_down_to_zero() -> None:
    training = parse_comparison(shlex.split("--lr 0.4 --lr-schedule linear --steps 4")).training
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.4)
    rates = []
    for step in range(4):
        set_lr(optimizer, training, step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.4, 0.3, 0.2, 0.1])


def test_a_constant_schedule_leaves_groups_alone() -> None:
    training = parse_comparison(shlex.split("--lr 0.4 --lr-schedule constant")).training
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": 0.7}], lr=0.4)
    set_lr(optimizer, training, 5)
    assert optimizer.param_groups[0]["lr"] == 0.7


def test_dense_ranks_get_no_q() -> None:
    training = parse_comparison(["--q", "0.5", "--steps", "3"]).training
    rank = parse_rank(training.arguments("dense"))
    assert rank.mode == "dense"
    assert rank.training.steps == 3


SERVER = {"TOPQ_SERVER": "a:1, b:2", "RANK": "1", "WORLD_SIZE": "3"}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without what a worker reads from it."""
    for name in [name for name in os.environ if name.startswith("TOPQ_")]:
        monkeypatch.delenv(name)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_a_worker_is_told_by_its_environment(environment: pytest.MonkeyPatch) -> None:
    for name, value in {**SERVER, "TOPQ_TOKEN_FILE": "{worker}.token"}.items():
        environment.setenv(name, value)
    worker = parse_worker([])
    assert (worker.rank, worker.ranks, worker.name) == (1, 3, "worker-1")
    assert worker.connection.servers == ("a:1", "b:2")
    assert worker.connection.file("token_file", worker.name) == Path("worker-1.token")
    assert worker.connection.file("tls_ca", worker.name) is None
    told = parse_worker(shlex.split("--server c:3 --rank 0 --worker w --token-file t"))
    assert (told.rank, told.name, told.connection.servers) == (0, "w", ("c:3",))
    assert told.connection.token_file == "t"  # noqa: S105 - a file's name


def test_the_workers_get_the_options_of_the_comparison(environment: pytest.MonkeyPatch) -> None:
    line = "--mode ps --q 0.9 --server a:1 --server b:2 --tls-ca c --tls-cert d --tls-key e"
    comparison = parse_comparison(shlex.split(line + " --checkpoint f --resume"))
    assert comparison.modes == ("dense", "ps")
    assert comparison.connection is not None
    environment.setenv("RANK", "0")
    environment.setenv("WORLD_SIZE", "2")
    words = [*comparison.training.arguments("ps"), *comparison.connection.arguments()]
    worker = parse_worker(words)
    assert worker.training == comparison.training
    assert worker.connection == comparison.connection
    assert worker.mode == "ps"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--rank 0 --ranks 1", ["--server", "HOST:PORT"]),
        ("--server a:1 --ranks 2", ["--rank", "RANK"]),
        ("--server a:1 --rank 0", ["--ranks", "WORLD_SIZE"]),
        ("--server a:1 --rank 2 --ranks 2", ["--rank 2", "--ranks 2", "smaller"]),
        ("--server a:1 --rank=-1 --ranks 2", ["--rank", "'-1'", "at least 0"]),
    ],
)
def test_a_worker_that_knows_too_little_says_so_in_one_line(
    line: str,
    expected: list[str],
    capsys: pytest.CaptureFixture[str],
    environment: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse_worker(shlex.split(line))
    assert exit_info.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    for part in expected:
        assert part in message


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_on_offer_trains_in_a_plain_loop(name: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    before = model.weight.detach().clone()
    optimizer = OPTIMIZERS[name](model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(4, 3)).square().mean().backward()
        optimizer.step()
    assert not torch.equal(model.weight, before)
