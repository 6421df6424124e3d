"""The `topq` command: as a process, over TLS, and what it says to wrong options."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ps.certificates import Authority

import topq_dist
from topq_dist.cli import main
from topq_dist.ps.config import GroupRule
from topq_dist.ps.option_types import parse_group, parse_named, parse_size, parse_value
from topq_dist.ps.security import ClientSecurity, ClientTls
from topq_dist.ps.server import ParameterServer
from topq_dist.ps.status_text import status_json, status_text
from topq_dist.v1 import parameter_server_pb2 as pb
from topq_dist.v1 import parameter_server_pb2_grpc as pb_grpc

TOPQ = [sys.executable, "-m", "topq_dist.cli"]
START_S = 60
SGD = ("--inner-opt", "sgd", "--lr", "0.1")
TOKEN, OTHER_TOKEN = "a" * 32, "b" * 32


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith("TOPQ_")}
    return ours | dict(extra)


def run(*words: str, **variables: str) -> tuple[int, str, str]:
    """Run `topq` in this process, for speed: what it says of itself and what it returns."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in variables.items():
            patch.setenv(name, value)
        code = main(words)
    return code, out.getvalue(), err.getvalue()


def run_process(*words: str, **variables: str) -> tuple[int, str, str]:
    """Run `topq` as a process."""
    done = subprocess.run(
        [*TOPQ, *words],
        env=environment(variables),
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


class Served:
    """A `topq serve` process that listens; `stop` ends it with SIGTERM."""

    def __init__(self, *words: str, **variables: str) -> None:
        self._process = subprocess.Popen(
            [*TOPQ, "serve", *words],
            env=environment(variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], START_S)
        said = self._process.stdout.readline() if readable else ""
        match = re.fullmatch(r"listening on (\S+)\n", said)
        if match is None:
            raise AssertionError((said, *self.kill()))
        self.address = match[1]

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        if self._process.poll() is None:
            self._process.send_signal(number)
        try:
            said, errors = self._process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        return self._process.returncode, said, errors

    def kill(self) -> tuple[str, str]:
        self._process.kill()
        return self._process.communicate()


@contextmanager
def serving(*words: str, **variables: str) -> Iterator[Served]:
    served = Served(*words, **variables)
    try:
        yield served
    finally:
        served.kill()


def join(address: str, security: ClientSecurity, worker: str) -> grpc.StatusCode:
    request = pb.JoinRequest(
        worker=worker,
        instance=bytes(16),
        model=[pb.TensorSpec(name="weight", shape=[2, 3], dtype="float32")],
    )
    with security.channel(address) as channel:
        try:
            pb_grpc.ParameterServerStub(channel).Join(
                request, timeout=10, metadata=security.metadata()
            )
        except grpc.RpcError as error:
            return code_of(error)
    return grpc.StatusCode.OK


def code_of(error: grpc.RpcError) -> grpc.StatusCode:
    assert isinstance(error, grpc.Call)
    return error.code()


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def plain(state_dir: Path) -> Iterator[Served]:
    with serving("--address", "127.0.0.1:0", "--state-dir", str(state_dir), *SGD) as served:
        yield served


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


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep this process's variables out of the commands, and their logging out of this process."""
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)
    for name in list(os.environ):
        if name.startswith("TOPQ_"):
            monkeypatch.delenv(name)


class TestTorchStaysOut:
    @pytest.mark.parametrize(
        "statements",
        [
            "import topq_dist",
            "import topq_dist.ps",
            "import topq_dist.ps.asking, topq_dist.ps.status_text",
            "from topq_dist.cli import main; main(['--help'])",
            "from topq_dist.cli import main; main(['serve', '--help'])",
            "from topq_dist.cli import main; main(['serve', '--state-dir', 'x'])",
            "from topq_dist.cli import main; main(['status', '--address', '127.0.0.1:9'])",
            "from topq_dist.cli import main; main(['health', '--address', '127.0.0.1:9'])",
        ],
    )
    def test_until_it_is_needed(self, statements: str) -> None:
        code = (
            f"{statements}\nimport sys\nsys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment({}), capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr

    def test_the_public_names_are_still_there(self) -> None:
        for name in topq_dist.__all__:
            assert getattr(topq_dist, name) is not None
            assert name in dir(topq_dist)
        with pytest.raises(AttributeError, match="no attribute 'absent'"):
            _ = topq_dist.absent


class TestServe:
    def test_says_where_it_listens_and_is_healthy(self, plain: Served) -> None:
        assert run_process("health", "--address", plain.address) == (0, "", "")
        assert run("health", TOPQ_ADDRESS=plain.address) == (0, "", "")

    def test_a_second_server_on_the_state_directory_fails_at_once(
        self, plain: Served, state_dir: Path
    ) -> None:
        code, said, errors = run(
            "serve", "--address", "127.0.0.1:0", "--state-dir", str(state_dir), *SGD
        )
        assert (code, said, errors.count("\n")) == (1, "", 1)
        assert str(state_dir) in errors
        assert "in use" in errors

    def test_a_second_server_on_the_port_fails_at_once(self, plain: Served, tmp_path: Path) -> None:
        code, said, errors = run(
            "serve", "--address", plain.address, "--state-dir", str(tmp_path), *SGD
        )
        assert (code, said) == (1, "")
        assert errors == f"topq: error: address {plain.address}: Address already in use\n"

    def test_options_from_variables_and_an_end_in_good_order(self, tmp_path: Path) -> None:
        variables = {
            "TOPQ_ADDRESS": f"unix:{tmp_path}/socket",
            "TOPQ_STATE_DIR": str(tmp_path / "state"),
            "TOPQ_INNER_OPT": "AdamW",
            "TOPQ_LR": "0.01",
            "TOPQ_INNER_OPTION": "betas=(0.9, 0.95); weight_decay=0.1",
            "TOPQ_GROUP": "*.bias:weight_decay=0,lr=0.1;head.*:betas=(0.8, 0.9)",
            "TOPQ_WORKERS": "1",
            "TOPQ_MODE": "async",
            "TOPQ_MAX_STALENESS": "4",
            "TOPQ_DOWNLINK": "topq",
            "TOPQ_DOWNLINK_Q": "0.9",
            "TOPQ_LEASE_S": "",
        }
        with serving(**variables) as served:
            assert served.address == variables["TOPQ_ADDRESS"]
            code, text, errors = run("status", "--json", TOPQ_ADDRESS=served.address)
            assert (code, errors) == (0, "")
            status = json.loads(text)
            shown = [status[name] for name in ("inner_opt", "mode", "downlink", "version")]
            assert shown == ["AdamW", "async", "topq", 0]
            assert join(served.address, ClientSecurity(), "first") is grpc.StatusCode.OK
            second = join(served.address, ClientSecurity(), "second")
            assert second is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert served.stop() == (0, "", "")
        code, said, errors = run("status", "--address", served.address)
        assert (code, said) == (1, "")
        assert re.fullmatch(r"topq: error: no answer from unix:\S+: .*\n", errors)

    def test_a_sigterm_while_it_starts_ends_it_too(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def interrupted(*_: object, **__: object) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

        before = signal.getsignal(signal.SIGTERM)
        monkeypatch.setattr("topq_dist.ps.server.serve", interrupted)
        with pytest.raises(SystemExit, match="0"):
            run("serve", "--state-dir", str(tmp_path), *SGD)
        assert signal.getsignal(signal.SIGTERM) is before


class TestStatus:
    def test_shows_the_run_and_its_workers(self, plain: Served) -> None:
        assert join(plain.address, ClientSecurity(), "worker-0") is grpc.StatusCode.OK
        assert join(plain.address, ClientSecurity(), "no/name") is grpc.StatusCode.INVALID_ARGUMENT
        code, text, errors = run_process("status", "--address", plain.address, "--sha256")
        assert (code, errors) == (0, "")
        assert "training  sgd, sync, downlink exact\n" in text
        assert "version   0, durable 0\n" in text
        assert "refused   invalid 1\n" in text
        heading, row = text.splitlines()[-2:]
        assert heading == "worker    version  lag  pushes  lease  push  received  sent"
        assert re.fullmatch(r"worker-0 +0 +0 +0 +[0-9]+ s +- +0 B +0 B", row)

    def test_json_has_what_the_contract_has(self, plain: Served) -> None:
        _, text, _ = run("status", "--address", plain.address, "--json")
        status = json.loads(text)
        fields = {field.name for field in pb.StatusResponse.DESCRIPTOR.fields}
        assert set(status) == fields - {"point"} | {"version", "chain"}

    def test_aligns_and_names_units(self) -> None:
        workers = [
            pb.WorkerStatus(worker="worker-10", version=9, lag=12345, lease_left_s=0, sequence=7),
            pb.WorkerStatus(
                worker="a",
                version=12354,
                lease_left_s=59.6,
                waiting=True,
                received_bytes=1_234_567_890_123,
                sent_bytes=999_960,
            ),
        ]
        status = pb.StatusResponse(
            run="r\x1b[2J",
            point=pb.Point(version=12354),
            uptime_s=3723,
            received_bytes=999,
            refused={"stale": 2, "invalid": 1, "non_finite": 0},
            workers=workers,
        )
        lines = status_text(status).splitlines()
        assert lines[0] == "run       r?[2J, up for 1 h 02 min"
        assert "bytes     999 B received, 0 B sent" in lines
        assert "refused   invalid 1, stale 2" in lines
        assert lines[-3:] == [
            "worker     version    lag  pushes  lease   push  received    sent",
            "a            12354      0       0   60 s  waits    1.2 TB  1.0 MB",
            "worker-10        9  12345       7   gone      -       0 B     0 B",
        ]
        assert json.loads(status_json(status))["workers"][0]["worker"] == "a"

    def test_a_server_that_does_not_answer_is_named(self) -> None:
        code, said, errors = run("status", "--address", "127.0.0.1:1", "--timeout-s", "2")
        assert (code, said) == (1, "")
        assert errors == "topq: error: no answer from 127.0.0.1:1: connection refused\n"
        assert run("health", "--address", "127.0.0.1:1")[0] == 1


class TestOverMutualTlsWithTokens:
    def test_from_variables_end_to_end(self, tmp_path: Path) -> None:
        ours, foreign = Authority(tmp_path / "ours"), Authority(tmp_path / "foreign", "foreign")
        both = ours.issue("server", server=True, client=True)
        client = ours.issue("client", server=False)
        tokens, token_file = tmp_path / "tokens", tmp_path / "token"
        for path, text in ((tokens, f"alice {TOKEN}\nbob {OTHER_TOKEN}\n"), (token_file, TOKEN)):
            path.touch(0o600)
            path.write_text(text)
        variables = {
            "TOPQ_STATE_DIR": str(tmp_path / "state"),
            "TOPQ_INNER_OPT": "sgd",
            "TOPQ_TLS_CERT": str(both.certificate),
            "TOPQ_TLS_KEY": str(both.key),
            "TOPQ_TLS_CLIENT_CA": str(ours.certificate),
            "TOPQ_TOKENS": str(tokens),
        }
        tls = ClientTls(ca=ours.certificate, certificate=client.certificate, key=client.key)
        shown = ("--tls-cert", str(client.certificate), "--tls-key", str(client.key))
        ca = ("--tls-ca", str(ours.certificate))
        token = ("--token-file", str(token_file))
        with serving("--address", "0.0.0.0:0", **variables) as served:
            port = served.address.removeprefix("0.0.0.0:")
            assert run("health", TOPQ_ADDRESS=served.address, **variables) == (0, "", "")
            at = ("status", "--address", f"localhost:{port}")
            assert run(*at, *ca, *shown, *token)[0] == 0

            def refused(*words: str) -> str:
                code, said, errors = run(*at, *words)
                assert (code, said, errors.count("\n")) == (1, "", 1)
                return errors

            assert "UNAUTHENTICATED" in refused(*ca, *shown)
            assert "without certificate" in refused(*ca, *token)
            assert "does not hold" in refused("--tls-ca", str(foreign.certificate), *shown, *token)
            assert "speaks TLS" in refused()

            alice = ClientSecurity(tls=tls, token=TOKEN)
            here = f"127.0.0.1:{port}"
            assert join(here, alice, "alice") is grpc.StatusCode.OK
            assert join(here, alice, "bob") is grpc.StatusCode.PERMISSION_DENIED
            stranger = ClientSecurity(tls=tls, token="c" * 32)
            assert join(here, stranger, "alice") is grpc.StatusCode.UNAUTHENTICATED
            tokens.write_text(f"alice {'n' * 32}\nbob {OTHER_TOKEN}\n")
            assert join(here, alice, "alice") is grpc.StatusCode.UNAUTHENTICATED

            _, text, _ = run(*at, *ca, *shown, "--token-file", self.new_token(tmp_path))
            assert "permission_denied 1, unauthenticated 3" in text
            ours.issue("server", server=True, client=True)  # rotated: nobody notices
            assert run("health", TOPQ_ADDRESS=served.address, **variables) == (0, "", "")
            assert served.stop() == (0, "", "")

    def new_token(self, folder: Path) -> str:
        path = folder / "new-token"
        path.touch(0o600)
        path.write_text("n" * 32)
        return str(path)

    def test_health_in_the_environment_of_a_server_with_tls(self, tmp_path: Path) -> None:
        pair = Authority(tmp_path / "ours").issue("server", server=True)
        variables = {
            "TOPQ_ADDRESS": f"unix:{tmp_path}/socket",
            "TOPQ_TLS_CERT": str(pair.certificate),
            "TOPQ_TLS_KEY": str(pair.key),
        }
        with serving("--state-dir", str(tmp_path), *SGD, **variables) as served:
            named = variables | {"TOPQ_TLS_SERVER_NAME": "localhost"}
            assert run("health", **named) == (0, "", "")
            assert served.stop(signal.SIGINT) == (0, "", "")


class TestWrongOptions:
    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            ([], "Missing command"),
            (["sevre"], "No such command 'sevre'"),
            (["serve"], "'--state-dir'"),
            (["serve", "--state-dir", "x"], "'--inner-opt'"),
            (["serve", "--state-dri", "x"], "--state-dri"),
            (["status", "--address", "nowhere"], "--address='nowhere': expected HOST:PORT"),
            (["status", "--address", "127.0.0.1:0"], "--address='127.0.0.1:0'"),
            (["status", "--timeout-s", "0"], "--timeout-s"),
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
            ("--lr -1", "lr=-1.0"),
            ("--group *.bias", "'*.bias': expected PATTERN:NAME=VALUE"),
            ("--group *:lr=1,lr=2", "lr is given twice"),
            ("--group *:foo=1", "'foo'"),
            ("--mode often", "'--mode'"),
            ("--max-staleness 3", "--max-staleness: no effect with --mode sync"),
            ("--mode async --max-staleness -1", "--max-staleness=-1: expected a number of at lea"),
            ("--mode async --round-timeout-s 3", "--round-timeout-s: no effect with --mode async"),
            ("--downlink-q 0.5", "--downlink-q: no effect with --downlink exact"),
            ("--downlink topq --downlink-q 2", "--downlink-q=2.0: expected a number in [0, 1]"),
            ("--downlink topq --downlink-value-format fp13", "fp13"),
            ("--workers 0", "'--workers'"),
            ("--workers 2 --min-workers 1", "--workers and --min-workers: expected one of them"),
            ("--workers 2 --max-workers 3", "--workers and --max-workers: expected one of them"),
            ("--min-workers 3 --max-workers 2", "--max-workers=2: expected a number of at least 3"),
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
        monkeypatch.setattr("topq_dist.ps.server.serve", start_only)
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


class TestEveryOptionHasItsVariable:
    @pytest.mark.parametrize("command", ["serve", "status", "health"])
    def test_by_its_name(self, command: str) -> None:
        from topq_dist.ps.commands import topq

        options = [
            option
            for option in topq.commands[command].params
            if isinstance(option, click.Option) and option.name not in ("as_json", "sha256")
        ]
        assert len(options) > 5
        for option in options:
            assert option.envvar == f"TOPQ_{option.name}".upper()


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
