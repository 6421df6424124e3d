"""Code and commands of the pages on the server run as they are, with TLS and tokens."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_scripts import Script, run_scripts
from page_blocks import ROOT, blocks_of, command_of, plain_model, python_of, run_block, steps
from served import TOPQ, Served, environment, serving
from server_process import ServerProcess

import topq_dist.ps

PRODUCTION, SERVER, START = "docs/production.md", "docs/parameter_server.md", "docs/start.md"
HERE = "127.0.0.1:50051"
pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl")


def names_with_model() -> dict[str, Any]:
    names: dict[str, Any] = {name: getattr(topq_dist.ps, name) for name in topq_dist.ps.__all__}

    def your_loop() -> None:
        for _ in steps(names["model"]):
            names["optimizer"].step()

    names.update(model=plain_model(), torch=torch, your_loop=your_loop)
    return names


@contextmanager
def server(folder: Path, inner_opt: str = "adamw", lr: float = 1e-3) -> Iterator[str]:
    training = {"inner_opt": inner_opt, "options": {"lr": lr}, "downlink": "topq"}
    with ServerProcess(folder, training) as process:
        yield process.address


def test_a_worker_of_a_server_trains_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    use, local, save, load = python_of(SERVER)
    names = names_with_model()
    evaluated = names["evaluated"] = []
    names["evaluate"] = evaluated.append
    with server(tmp_path / "run1") as address:
        run_block(use, names, {HERE: address})
        assert evaluated == [names["model"]]
        run_block(load.partition("state =")[0], names, {HERE: address})
        names["your_loop"]()
        names["step"] = 3
        run_block(save, names)
        names["model"] = plain_model()
        run_block(load, names, {HERE: address})
        assert names["state"]["step"] == 3
        names["your_loop"]()
        names["optimizer"].close()
    names = names_with_model()
    with server(tmp_path / "run2", "sgd", 1.0) as address:
        run_block(local, names, {HERE: address})
        names["your_loop"]()
        names["your_loop"]()
        assert names["optimizer"].stats().steps == 6
        names["optimizer"].close()


def test_mutual_tls_with_a_token_and_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mutual, shards = python_of(PRODUCTION)
    script = str(ROOT / "docker" / "certificates.sh")
    subprocess.run([script, ".", "server", "w0"], check=True, capture_output=True)
    words = [
        "--state-dir=run1",
        "--inner-opt=sgd",
        "--address=127.0.0.1:0",
        "--tokens=server/tokens",
    ]
    words += [
        "--tls-cert=server/tls.crt",
        "--tls-key=server/tls.key",
        "--tls-client-ca=server/ca.crt",
    ]
    names = names_with_model()
    with serving(*words) as served:
        run_block(mutual, names, {HERE: served.address})
        names["your_loop"]()
        names["optimizer"].close()
        assert served.stop() == (0, "", "")
    names = names_with_model()
    with server(tmp_path / "run2") as one, server(tmp_path / "run3") as other:
        run_block(shards, names, {"127.0.0.1:[50051-50052]": f"{one},{other}"})
        names["your_loop"]()
        names["optimizer"].close()


@pytest.fixture
def scripts(tmp_path: Path) -> Path:
    """A folder with the two scripts of the page, as a reader copies them."""
    for name, code in zip(("train.py", "worker.py"), python_of(START), strict=True):
        (tmp_path / name).write_text(code)
    return tmp_path


@pytest.mark.parametrize("code", python_of(START), ids=["train.py", "worker.py"])
def test_at_most_six_lines_are_new(code: str) -> None:
    lines = code.splitlines()
    new = {number for number, line in enumerate(lines, start=1) if "  # new" in line}
    changed = [
        statement
        for statement in ast.parse(code).body
        if new & set(range(statement.lineno, (statement.end_lineno or 0) + 1))
    ]
    assert len(changed) == len(new)
    assert 2 <= sum((one.end_lineno or 0) - one.lineno + 1 for one in changed) <= 6


def run(words: list[str], folder: Path) -> str:
    """Run a command of the page; it may say nothing on stderr but what torchrun does."""
    done = subprocess.run(
        words,
        cwd=folder,
        env=environment({"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_first_script_trains_on_two_ranks(scripts: Path) -> None:
    variable, program, *words = command_of(START, "OMP_NUM_THREADS=1 torchrun")
    assert (variable, program) == ("OMP_NUM_THREADS=1", "torchrun")
    said = run([sys.executable, "-m", "torch.distributed.run", *words], scripts).split()
    assert said[0] == "loss"
    assert float(said[1].rstrip(",")) < 1.8
    assert int(said[2]) > 50


def test_the_second_trains_through_a_server_over_tls_with_a_token(scripts: Path) -> None:
    (shell,) = [block.code for block in blocks_of(ROOT / START) if block.language == "sh"]
    subprocess.run(["/bin/sh", "-ec", shell], cwd=scripts, check=True, capture_output=True)
    _, *words = command_of(START, "topq serve")
    words[words.index(HERE)] = "127.0.0.1:0"
    with chdir(scripts):
        served = Served(*words[1:])
    try:
        script = scripts / "worker.py"
        script.write_text(script.read_text().replace(HERE, served.address))
        runs = [Script(path=script, words=(name,), folder=scripts) for name in ("w0", "w1")]
        other, said = run_scripts(runs)
        assert other.startswith("w0: loss ")
        _, *status = command_of(START, "topq status")
        status[status.index(HERE)] = served.address
        assert re.search(r"version +300\b", run([*TOPQ, *status], scripts))
        assert served.stop() == (0, "", "")
    finally:
        served.kill()
    who, _, loss, ratio, *_ = said.split()
    assert who == "w1:"
    assert float(loss.rstrip(",")) < 1.8
    assert int(ratio) > 20
