"""The server's image: what it is made of, and that it starts with as few rights as it needs."""

import re

import pytest
from docker_engine import CONFINED, inspect, run

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1000)]

MAX_VENV_MB = 800
LOOK_AROUND = """
import importlib.metadata, shutil, sys, torch, topq_dist.compress.native.library
names = {package.name.lower() for package in importlib.metadata.distributions(path=sys.path[-1:])}
cuda = sorted(name for name in names if name.startswith(("nvidia", "triton")))
compilers = sorted(names & {"llvmlite", "numba", "ziglang"})
compilers += [name for name in ("cc", "gcc", "clang") if shutil.which(name)]
assert topq_dist.compress.native.library.LIBRARY is not None
parameter = torch.nn.Parameter(torch.ones(3))
parameter.grad = torch.ones(3)
torch.optim.SGD([parameter], lr=1.0).step()
print(torch.version.cuda, cuda, compilers, parameter.tolist())
"""


@pytest.mark.usefixtures("images")
def test_image_runs_topq_as_a_numeric_user_with_one_volume_and_a_health_check() -> None:
    config = inspect("topq", ".Config")
    assert re.fullmatch(r"[1-9][0-9]*:[1-9][0-9]*", config["User"])
    assert config["Entrypoint"] == ["topq"]
    assert config["Cmd"] == ["serve"]
    assert list(config["Volumes"]) == ["/state"]
    assert config["Healthcheck"]["Test"] == ["CMD", "topq", "health"]


@pytest.mark.usefixtures("images")
def test_torch_and_kernels_run_confined_without_cuda_or_a_compiler() -> None:
    said = run(
        "docker", "run", "--rm", *CONFINED, "--entrypoint", "python", "topq", "-c", LOOK_AROUND
    )
    assert said == "None [] [] [0.0, 0.0, 0.0]"


@pytest.mark.usefixtures("images")
def test_image_holds_no_more_than_it_needs() -> None:
    listing = "du -sm /venv; find /venv -name pip -o -name tests; ls /"
    said = run("docker", "run", "--rm", "--entrypoint", "sh", "topq", "-c", listing).splitlines()
    megabytes = int(said[0].split()[0])
    assert megabytes <= MAX_VENV_MB
    assert [line for line in said[1:] if "venv/" in line] == []
    assert "source" not in said


@pytest.mark.usefixtures("images")
def test_code_cannot_be_altered_from_inside() -> None:
    attempt = "touch /venv/x 2>/dev/null || touch /launch/x 2>/dev/null || echo refused"
    assert run("docker", "run", "--rm", "--entrypoint", "sh", "topq", "-c", attempt) == "refused"


@pytest.mark.usefixtures("images")
def test_health_and_help_do_without_torch() -> None:
    for command in (("health", "--help"), ("--help",)):
        said = run(
            *("docker", "run", "--rm", "--entrypoint", "python", "topq"),
            *("-X", "importtime", "-m", "topq_dist.cli", *command),
        )
        assert "topq_dist.cli" in said or "Usage" in said
        assert not re.search(r"\| +torch$", said, re.MULTILINE)
