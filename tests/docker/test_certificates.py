"""The script that makes a certificate authority, and from it what a server and its workers show."""

import shutil
import stat
from pathlib import Path

import pytest
from docker_engine import ROOT, run

from topq_dist.ps.security.tls import ClientTls, ServerTls
from topq_dist.ps.security.tokens import Authenticator, read_token

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl")

NAMES = "server,::1"
WORKERS = ("worker-0", "worker-1")


def make(folder: Path) -> dict[str, bytes]:
    """Run the script and return all files by their names in `folder`."""
    run(ROOT / "docker" / "certificates.sh", folder, NAMES, *WORKERS)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def changed(before: dict[str, bytes], after: dict[str, bytes]) -> set[str]:
    """Return the names of the files that differ."""
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


def test_files_are_what_server_and_workers_take(tmp_path: Path) -> None:
    files = make(tmp_path)
    server = tmp_path / "server"
    ServerTls(
        certificate=server / "tls.crt", key=server / "tls.key", client_ca=server / "ca.crt"
    ).credentials()
    authenticator = Authenticator(server / "tokens")
    for worker in (*WORKERS, "server"):
        own = tmp_path / worker
        ClientTls(ca=own / "ca.crt", certificate=own / "tls.crt", key=own / "tls.key").credentials()
        token = read_token(own / "token")
        authenticator.check([("authorization", f"Bearer {token}")], worker)
    said = run("openssl", "x509", "-in", server / "tls.crt", "-noout", "-ext", "subjectAltName")
    for name in (
        "DNS:server",
        "DNS:localhost",
        "IP Address:127.0.0.1",
        "IP Address:0:0:0:0:0:0:0:1",
    ):
        assert name in said
    assert {name for name in files if name.endswith("ca.key")} == {"authority/ca.key"}
    assert all(stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600 for name in files)


def test_what_is_good_stays_and_what_is_not_is_made_anew(tmp_path: Path) -> None:
    first = make(tmp_path)
    assert changed(first, make(tmp_path)) == set()

    (tmp_path / "worker-0" / "tls.key").write_bytes(first["worker-1/tls.key"])
    second = make(tmp_path)
    assert changed(first, second) == {"worker-0/tls.key", "worker-0/tls.crt"}

    authority = tmp_path / "authority"
    # the same key's certificate, but with 20 days to go
    request, server = tmp_path / "request", tmp_path / "server"
    run(*f"openssl req -new -key {server}/tls.key -subj /CN=server -out {request}".split())
    run(
        *f"openssl x509 -req -in {request} -days 20 -out {server}/tls.crt -set_serial 1".split(),
        *f"-CA {authority}/ca.crt -CAkey {authority}/ca.key".split(),
    )
    request.unlink()
    assert changed(second, make(tmp_path)) == {"server/tls.key", "server/tls.crt"}


def test_new_authority_makes_every_certificate_anew_and_no_token(tmp_path: Path) -> None:
    first = make(tmp_path)
    shutil.rmtree(tmp_path / "authority")
    kept = {name for name in first if name.endswith(("token", "tokens"))}
    assert changed(first, make(tmp_path)) == first.keys() - kept


def test_script_says_how_it_is_called(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"exit code 2[\s\S]*SERVER_NAMES"):
        run(ROOT / "docker" / "certificates.sh", tmp_path)
