"""The `topq` command: as a process, over TLS, and what it says to wrong options."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from leak_report import without_leak_report
from ps.certificates import Authority
from served import START_S, TOPQ, Served, environment, serving
from server_process import quiet_port

import topq_dist
from topq_dist.cli import main
from topq_dist.ps.security.policy import ClientSecurity
from topq_dist.ps.security.tls import ClientTls
from topq_dist.v1 import parameter_server_pb2 as pb
from topq_dist.v1 import parameter_server_pb2_grpc as pb_grpc

SGD = ("--inner-opt", "sgd", "--lr", "0.1")
TOKEN, OTHER_TOKEN = "a" * 32, "b" * 32


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
    return done.returncode, done.stdout, without_leak_report(done.stderr)


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
            "import topq_dist.ps.client.probe, topq_dist.ps.cli.status_text",
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
            "TOPQ_LOG_LEVEL": "info",
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
            code, text, errors = served.stop()
            assert (code, text) == (0, "")
            assert f"listening on {served.address}, run " in errors
            assert "at version 0" in errors
            assert "worker first joined" in errors
            assert "worker second joined" not in errors
        code, said, errors = run("status", "--address", served.address)
        assert (code, said) == (1, "")
        assert re.fullmatch(r"topq: error: no answer from unix:\S+: .*\n", errors)

    def test_a_sigterm_while_it_starts_ends_it_too(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def interrupted(*_: object, **__: object) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

        before = signal.getsignal(signal.SIGTERM)
        monkeypatch.setattr("topq_dist.ps.server.process.serve", interrupted)
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
        assert "round     0 of 1 pushes are there\n" in text
        assert "refused   invalid 1\n" in text
        heading, row = text.splitlines()[-2:]
        assert heading == "worker    version  lag  pushes  lease  push  received  sent"
        assert re.fullmatch(r"worker-0 +0 +0 +0 +[0-9]+ s +- +0 B +0 B", row)

    def test_json_has_what_the_contract_has(self, plain: Served) -> None:
        _, text, _ = run("status", "--address", plain.address, "--json")
        status = json.loads(text)
        fields = {field.name for field in pb.StatusResponse.DESCRIPTOR.fields}
        assert set(status) == fields - {"point"} | {"version", "chain"}

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


@pytest.mark.parametrize(("first", "shards"), [(signal.SIGTERM, "1"), (signal.SIGINT, "2")])
def test_further_signals_change_nothing_and_the_end_is_quiet(
    tmp_path: Path, first: signal.Signals, shards: str
) -> None:
    """Another one killed it, and bindings called what is never collected leaked."""
    words = ["serve", "--state-dir", str(tmp_path), "--address", f"127.0.0.1:{quiet_port()}"]
    served = subprocess.Popen(
        [*TOPQ, *words, *SGD, "--shards", shards],
        env=environment({}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # an ordinary process's, whatever has started the tests
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert served.stdout is not None
        assert served.stdout.readline().startswith("listening on ")
        for number in (first, signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            served.send_signal(number)
            time.sleep(0.05)
        said, logged = served.communicate(timeout=START_S)
        # gRPC's poller may find its own file closed as the process ends, whatever GRPC_VERBOSITY is
        of_grpc = re.compile(
            r"E\d{4} .* ev_epoll1_linux\.cc:\d+\] .* epoll_wait error: Bad file desc"
        )
        ours = [line for line in logged.splitlines() if not of_grpc.match(line)]
        assert (said, ours) == ("", [])
        assert served.returncode == 0
    finally:
        served.kill()
        served.wait()


class TestWithoutTheExtra:
    """The command and imports where the packages of the extra `ps` are not installed."""

    MISSING = ("click", "google", "grpc", "grpc_health", "grpc_reflection", "safetensors")
    REMEDY = "run pip install '.[ps]' in a clone of topq_dist"

    def without(self, script: str, *missing: str) -> tuple[int, str, str]:
        block = f"import sys; sys.modules.update(dict.fromkeys({missing or self.MISSING}))\n"
        done = subprocess.run(
            [sys.executable, "-c", block + script],
            env=environment({}),
            capture_output=True,
            text=True,
            timeout=START_S,
            check=False,
        )
        return done.returncode, done.stdout, without_leak_report(done.stderr)

    def topq(self, *words: str, missing: tuple[str, ...] = ()) -> tuple[int, str, str]:
        script = f"from topq_dist.cli import main; sys.exit(main({list(words)}))"
        return self.without(script, *missing)

    def test_the_version_is_said(self) -> None:
        assert self.topq("--version") == (0, f"topq, version {topq_dist.__version__}\n", "")

    @pytest.mark.parametrize("word", ["--help", "-h"])
    def test_the_help_says_what_to_install(self, word: str) -> None:
        code, out, err = self.topq(word)
        assert (code, err) == (0, "")
        assert "Usage: topq serve | status | health" in out
        assert self.REMEDY in out

    @pytest.mark.parametrize("words", [(), ("serve",), ("serve", "--help"), ("status",)])
    def test_everything_else_is_an_error_of_one_line(self, words: tuple[str, ...]) -> None:
        code, out, err = self.topq(*words)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert err.startswith("topq: error: the parameter server needs click, which is not")
        assert self.REMEDY in err

    @pytest.mark.parametrize("command", ["status", "health"])
    def test_one_package_that_is_missing_is_named(self, command: str) -> None:
        assert self.topq("--help", missing=("grpc",))[:1] == (0,)
        code, _, err = self.topq(command, missing=("grpc",))
        assert (code, err.count("\n")) == (1, 1)
        assert "needs grpc, which is not installed" in err

    @pytest.mark.parametrize("missing", ["grpc", "google.protobuf"])
    def test_an_import_says_it_too(self, missing: str) -> None:
        script = "from topq_dist.ps import ParameterServerOptimizer"
        code, _, err = self.without(script, missing)
        assert code == 1
        last = err.rstrip().splitlines()[-1]
        assert last.startswith("ModuleNotFoundError: the parameter server needs " + missing)
        assert self.REMEDY in last

    def test_errors_of_other_packages_stay_as_they_are(self) -> None:
        script = "from topq_dist.ps import ParameterServerOptimizer"
        code, _, err = self.without(script, "numpy")
        assert code == 1
        assert "the parameter server needs" not in err

    def test_what_needs_no_package_works(self) -> None:
        script = "import topq_dist; from topq_dist.ps import RefusedError, ServerLostError"
        assert self.without(script) == (0, "", "")
