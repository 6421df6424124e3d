"""The options of `topq`: what they stand for, and what is said to wrong ones."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ps.servers import serving

from topq_dist.cli import main
from topq_dist.ps.cli.commands import topq
from topq_dist.ps.cli.option_types import parse_group, parse_named, parse_size, parse_value
from topq_dist.ps.protocol.config import GroupRule, TrainingConfig
from topq_dist.ps.server.process import ParameterServer

SGD = ("--inner-opt", "sgd", "--lr", "0.1")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep this process's variables out of the commands, and their logging out of this process."""
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)
    for name in list(os.environ):
        if name.startswith("TOPQ_"):
            monkeypatch.delenv(name)


def failed_with(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run with options that are wrong and return the one line that says so."""
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert len(lines) == 1, said.err
    return lines[0]


def start_only(*configs: Any, on_listening: object, **rest: Any) -> None:
    """Stand for topq_dist.ps.server.serve where the server is not to start."""
    ParameterServer(*configs, **rest).stop()
    raise AssertionError("the server took these options")


class TestWrongOptions:
    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            (["sevre"], "No such command 'sevre'"),
            (["serve"], "'--state-dir'"),
            (["serve", "--state-dir", "x"], "'--inner-opt'"),
            (["serve", "--state-dir", ""], "'': expected a path"),
            (["serve", "--state-dri", "x"], "--state-dri"),
            (["status", "--address", "nowhere"], "--address='nowhere': expected HOST:PORT"),
            (["status", "--address", "127.0.0.1:0"], "--address='127.0.0.1:0'"),
            (["status", "--timeout-s", "0"], "--timeout-s"),
            (["status", "--timeout-s", "nan"], "--timeout-s"),
            (["status", "--token-file", "/absent"], "--token-file='/absent': No such file"),
            (["status", "--tls-ca", "/absent"], "--tls-ca='/absent': No such file"),
            (["status", "--tls-cert", "x"], "--tls-cert and --tls-key: expected both"),
            (["status", "--tls-cert", "x", "--tls-key", "y"], "--tls-ca"),
            (["health", "--tls-key", "x"], "--tls-cert and --tls-key: expected both"),
        ],
    )
    def test_of_every_command(
        self, capsys: pytest.CaptureFixture[str], words: list[str], expected: str
    ) -> None:
        assert expected in failed_with(capsys, *words)

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            ("--address 0.0.0.0:1", "--address='0.0.0.0:1': in the clear a server listens on loop"),
            ("--address ::1", "--address='::1': expected HOST:PORT"),
            ("--address 0.0.0.0:1 --insecure --tokens /absent", "--tokens='/absent': in the clear"),
            ("--tokens /absent", "--tokens='/absent': No such file"),
            ("--tls-cert /absent", "--tls-cert and --tls-key: expected both or neither"),
            ("--tls-client-ca /absent", "--tls-client-ca: expected --tls-cert"),
            ("--tls-cert /absent --tls-key /absent", "--tls-key='/absent': No such file"),
            ("--inner-opt nadamw2", "--inner-opt='nadamw2': expected one of"),
            ("--inner-option foo=1", "'foo'"),
            ("--inner-option lr", "'lr': expected NAME=VALUE"),
            ("--inner-option momentum=much", "'much': expected a value such as"),
            ("--inner-option momentum=1 --inner-option momentum=2", "--inner-option momentum"),
            ("--inner-option lr=1 --lr 1", "--lr and --inner-option lr: expected one of them"),
            ("--lr fast", "'--lr'"),
            ("--lr -1", "--inner-opt='sgd' with lr=-1.0: Invalid learning rate"),
            ("--group *.bias", "'*.bias': expected PATTERN:NAME=VALUE"),
            ("--group *:lr=1,lr=2", "lr is given twice"),
            ("--group *:foo=1", "'foo'"),
            ("--momentum never", "'--momentum'"),
            ("--mode often", "'--mode'"),
            ("--max-staleness 3", "--max-staleness: no effect with --mode sync"),
            ("--mode async --max-staleness -1", "--max-staleness=-1: expected a whole number of"),
            ("--mode async --round-timeout-s 3", "--round-timeout-s: no effect with --mode async"),
            ("--mode async --min-workers 2", "--min-workers: no effect with --mode async"),
            (
                "--momentum optimizer --adapt-rate true",
                "--adapt-rate=True: no effect with --momentum='optimizer'",
            ),
            ("--adapt-rate true", "--adapt-rate=True: no effect with --inner-opt='sgd'"),
            ("--downlink-q 0.5", "--downlink-q: no effect with --downlink exact"),
            ("--downlink topq --downlink-q 2", "--downlink-q=2.0: expected a number in [0, 1]"),
            ("--downlink topq --downlink-value-format fp13", "fp13"),
            ("--workers 0", "'--workers'"),
            ("--workers 2 --min-workers 1", "--workers and --min-workers: expected one of them"),
            ("--workers 2 --max-workers 3", "--workers and --max-workers: expected one of them"),
            (
                "--min-workers 3 --max-workers 2",
                "--max-workers=2: expected a whole number of at least 3",
            ),
            ("--lease-s 0", "--lease-s=0.0: expected a number above 0"),
            ("--round-timeout-s nan", "--round-timeout-s=nan"),
            ("--snapshot-every 0", "--snapshot-every=0"),
            ("--history-bytes much", "'much': expected a number of bytes"),
            ("--max-model-bytes 0", "--max-model-bytes=0"),
        ],
    )
    def test_of_serve(
        self,
        capsys: pytest.CaptureFixture[str],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        words: str,
        expected: str,
    ) -> None:
        monkeypatch.setattr("topq_dist.ps.server.process.serve", start_only)
        given = words.split()
        basics = ["serve", "--state-dir", str(tmp_path / "state")]
        if "--inner-opt" not in given:
            basics += ["--inner-opt", "sgd"]
        if "--address" not in given:
            basics += ["--address", "127.0.0.1:0"]
        line = failed_with(capsys, *basics, *given)
        assert line.startswith("topq serve: error: ")
        assert expected in line

    def test_of_a_variable(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TOPQ_SNAPSHOT_EVERY", "often")
        line = failed_with(capsys, "serve", "--state-dir", "x", *SGD)
        assert "--snapshot-every" in line
        assert "'often'" in line


def test_no_command_at_all_is_answered_with_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("Usage: topq ")
    for command in topq.commands:
        assert f"  {command} " in said.err


class TestEveryOptionHasItsVariable:
    @pytest.mark.parametrize("command", ["serve", "status", "health"])
    def test_by_its_name(self, command: str) -> None:
        options = [
            option
            for option in topq.commands[command].params
            if isinstance(option, click.Option) and option.name not in ("as_json", "sha256")
        ]
        assert len(options) > 5
        for option in options:
            assert option.envvar == f"TOPQ_{option.name}".upper()


class TestMomentum:
    @pytest.mark.parametrize("given", [None, "feedback", "optimizer"])
    def test_reaches_the_configuration(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None
    ) -> None:
        made: list[TrainingConfig] = []
        monkeypatch.setattr(
            "topq_dist.ps.server.process.serve", lambda training, *_, **__: made.append(training)
        )
        words = [] if given is None else ["--momentum", given]
        assert main(["serve", "--state-dir", str(tmp_path), *SGD, *words]) == 0
        assert [training.momentum for training in made] == [given]

    def test_is_told_by_status(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        training = {"inner_opt": "sgd", "options": {"lr": 0.1, "momentum": 0.5}}
        with serving(tmp_path, training) as server:
            at = ("status", "--address", str(server.address))
            assert main(at) == 0
            said = capsys.readouterr().out
            assert (
                "momentum  feedback: while pushes hold less than 50% of the elements, SGD" in said
            )
            assert "steps with momentum=0 for 0.5, lr=0.2 for 0.1\n" in said
            assert main([*at, "--json"]) == 0
            status = json.loads(capsys.readouterr().out)
            assert status["momentum"] == "feedback"
            assert status["momentum_text"] in said


PLAIN_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.tuples(inner, inner) | st.lists(inner, max_size=3),
    max_leaves=5,
)


class TestTexts:
    @given(PLAIN_VALUES)
    def test_a_value_as_python_spells_it(self, value: Any) -> None:
        assert parse_value(f" {value!r} ") == value
        assert parse_named(f"name = {value!r}") == ("name", value)

    @given(st.lists(st.tuples(st.sampled_from(["lr", "betas", "eps"]), PLAIN_VALUES), min_size=1))
    def test_a_group(self, pairs: list[tuple[str, Any]]) -> None:
        options = dict(pairs)
        text = ",".join(f"{name}={value!r}" for name, value in options.items())
        assert parse_group(f"layer.*:{text}") == GroupRule(pattern="layer.*", options=options)

    def test_a_quoted_quote_ends_nothing(self) -> None:
        rule = parse_group(r"""*:name='\'",',lr=1,eps="\\",betas=(1,2)""")
        assert rule.options == {"name": "'\",", "lr": 1, "eps": "\\", "betas": (1, 2)}

    @given(st.text())
    def test_any_text_is_a_value_or_a_value_error(self, text: str) -> None:
        for parse in (parse_value, parse_named, parse_group, parse_size):
            with contextlib.suppress(ValueError):
                parse(text)

    def test_words_and_sizes(self) -> None:
        assert [parse_value(text) for text in ("true", "False", "NONE")] == [True, False, None]
        sizes = {"7": 7, "64MB": 64_000_000, "64MiB": 64 << 20, "2 gib": 2 << 30, "1k": 1000}
        assert {text: parse_size(text) for text in sizes} == sizes
        for text in ("open('x')", "__import__('os')", "nan", "1e-3 or 2", "a.b"):
            with pytest.raises(ValueError, match="expected"):
                parse_value(text)
