"""The manifests of Kubernetes: what the published schemas and our own options say of them."""

from __future__ import annotations

import copy
import functools
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from click import Command

from topq_dist.cli import main
from topq_dist.ps.cli.commands import topq

yaml = pytest.importorskip("yaml")
kubernetes = pytest.importorskip("kubernetes_validate", reason="the schemas of Kubernetes")
kubeflow = pytest.importorskip("kubeflow_trainer_api.models", reason="those of Kubeflow Trainer")

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
DOCUMENTS = {
    f"{path.stem} {document['kind']}": document
    for path in sorted(FOLDER.glob("*.yaml"))
    if path.name != "kustomization.yaml"
    for document in yaml.safe_load_all(path.read_text())
}
VERSIONS = ("1.29", "1.37")
# whose keys are the user's own words
FREE = {"labels", "matchLabels", "requests", "limits"}
# each call would read megabytes again
kubernetes.utils.schema_contents = functools.cache(kubernetes.utils.schema_contents)


def problem(document: Mapping[str, Any], version: str = VERSIONS[-1]) -> str | None:
    """Return what the schemas have against a document, None where nothing."""
    if document["kind"] == "TrainJob":
        return train_job_problem(document)
    try:
        kubernetes.validate(document, version, strict=True)
    except kubernetes.ValidationError as error:
        return str(error.message)
    return None


def train_job_problem(document: Mapping[str, Any]) -> str | None:
    """Return where the API's own models do not know a TrainJob: they leave out what they do not."""
    try:
        known = kubeflow.TrainerV1alpha1TrainJob.from_dict(copy.deepcopy(document)).to_dict()
    except (ValueError, KeyError) as error:
        return str(error)
    return None if known == document else f"known are {known}"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", DOCUMENTS)
def test_they_are_what_the_published_schemas_say(name: str, version: str) -> None:
    assert problem(DOCUMENTS[name], version) is None


def test_there_is_all_that_a_server_and_a_training_need() -> None:
    assert sorted(DOCUMENTS) == [
        "server NetworkPolicy",
        "server PodDisruptionBudget",
        "server Service",
        "server StatefulSet",
        "torchrun PersistentVolumeClaim",
        "torchrun TrainJob",
        "workers TrainJob",
    ]


def fields(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every field, but for those that have the user's own names."""
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in items:
        if isinstance(document, dict):
            yield (*path, key)
        # of a Service the selector is labels, elsewhere it has fields
        free = key in FREE or (key == "selector" and "matchLabels" not in value)
        if isinstance(value, dict | list) and not free:
            yield from fields(value, (*path, key))


def misspelt(document: Any, path: tuple[Any, ...]) -> Any:
    changed = copy.deepcopy(document)
    at = changed
    for key in path[:-1]:
        at = at[key]
    at[f"{path[-1]}x"] = at.pop(path[-1])
    return changed


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_field_fails_where_it_is_misspelt(name: str) -> None:
    document = DOCUMENTS[name]
    paths = [path for path in fields(document) if path not in (("kind",), ("apiVersion",))]
    assert len(paths) > 5
    assert [path for path in paths if problem(misspelt(document, path)) is None] == []


def variables(container: Mapping[str, Any]) -> dict[str, str]:
    return {one["name"]: one["value"] for one in container["env"] if "value" in one}


def known_variables() -> set[str]:
    commands: list[Command] = list(topq.commands.values())
    return {str(one.envvar) for command in commands for one in command.params if one.envvar}


def server_container() -> dict[str, Any]:
    spec: dict[str, Any] = DOCUMENTS["server StatefulSet"]["spec"]["template"]["spec"]
    container: dict[str, Any] = spec["containers"][0]
    return container


def test_the_servers_variables_are_options_and_make_a_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = variables(server_container())
    assert given.keys() <= known_variables()
    made: dict[str, Any] = {}
    monkeypatch.setattr("topq_dist.ps.server.process.serve", lambda *_, **rest: made.update(rest))
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)
    # of the image
    given |= {"TOPQ_ADDRESS": "0.0.0.0:50051", "TOPQ_STATE_DIR": "/state"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert main(["serve"]) == 0
    assert str(made["security"].tls.client_ca) == "/secrets/ca.crt"


def test_the_workers_know_every_server_and_their_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    from training.options import parse_worker

    trainer = DOCUMENTS["workers TrainJob"]["spec"]["trainer"]
    for name, value in variables(trainer).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", "1")
    worker = parse_worker(trainer["args"])
    from topq_dist.ps.client.arguments import addresses_of

    replicas = DOCUMENTS["server StatefulSet"]["spec"]["replicas"]
    expected = [f"topq-{n}.topq:50051" for n in range(replicas)]
    assert addresses_of(worker.connection.servers) == expected
    assert worker.ranks == trainer["numNodes"] == int(variables(server_container())["TOPQ_WORKERS"])
    kustomization = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    files = {one["name"]: one["files"] for one in kustomization["secretGenerator"]}
    keys = {one.partition("=")[0].rpartition("/")[2] for one in files["topq-workers"]}
    needed = {
        worker.connection.file(name, worker.name) for name in ("tls_ca", "tls_cert", "tls_key")
    }
    assert {path.name for path in needed if path is not None} | {"worker-1.token"} <= keys


def test_kubectl_renders_them_with_the_secrets_that_the_script_makes(tmp_path: Path) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None or shutil.which("openssl") is None:
        pytest.skip("wants kubectl and openssl")
    folder = tmp_path / "kubernetes"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("secrets"))
    script = [str(ROOT / "docker" / "certificates.sh"), str(folder / "secrets")]
    names = ["topq-0.topq,topq-1.topq", "worker-0", "worker-1"]
    subprocess.run([*script, *names], check=True, capture_output=True)
    done = subprocess.run(
        [kubectl, "kustomize", str(folder)], check=True, capture_output=True, text=True
    )
    rendered = list(yaml.safe_load_all(done.stdout))
    assert [problem(one) for one in rendered] == [None] * len(rendered)
    secrets = {one["metadata"]["name"]: set(one["data"]) for one in rendered if "data" in one}
    mounted = {value.removeprefix("/secrets/") for value in variables(server_container()).values()}
    assert {"tls.crt", "tls.key", "ca.crt", "tokens", "token"} == secrets["topq-server"]
    assert secrets["topq-server"] <= mounted
