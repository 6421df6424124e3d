"""Tokens: bound to a worker, read again when they change, kept to owner and group."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from topq_dist.ps.protocol.errors import UnauthenticatedError, WrongTokenError
from topq_dist.ps.security.policy import ClientSecurity
from topq_dist.ps.security.tokens import Authenticator, read_token

TOKENS = {"alice": "a" * 32, "bob": "b" * 32}


def tokens_file(folder: Path, text: str | None = None, mode: int = 0o600) -> Path:
    path = folder / "tokens"
    path.write_text(
        "".join(f"{name} {token}\n" for name, token in TOKENS.items()) if text is None else text
    )
    path.chmod(mode)
    return path


def bearer(token: str) -> list[tuple[str, str | bytes]]:
    return [("user-agent", "test"), ("authorization", f"Bearer {token}")]


class TestTokens:
    def test_bound_to_the_worker(self, tmp_path: Path) -> None:
        authenticator = Authenticator(tokens_file(tmp_path))
        authenticator.check(bearer(TOKENS["alice"]), "alice")
        authenticator.check(bearer(TOKENS["bob"]), "bob")
        authenticator.check(bearer(TOKENS["bob"]), None)
        with pytest.raises(WrongTokenError, match="worker='alice'"):
            authenticator.check(bearer(TOKENS["bob"]), "alice")

    @pytest.mark.parametrize(
        "metadata",
        [
            [],
            [("authorization", "")],
            [("authorization", "Bearer")],
            [("authorization", "Bearer ")],
            [("authorization", TOKENS["alice"])],
            [("authorization", f"Basic {TOKENS['alice']}")],
            [("authorization", f"Bearer {TOKENS['alice']}".encode())],
            [("authorization", f"Bearer {TOKENS['alice']}")] * 2,
        ],
    )
    def test_no_token(self, tmp_path: Path, metadata: list[tuple[str, str | bytes]]) -> None:
        with pytest.raises(UnauthenticatedError, match="no token"):
            Authenticator(tokens_file(tmp_path)).check(metadata, "alice")

    @pytest.mark.parametrize(
        "token",
        ["c" * 32, TOKENS["alice"][:-1], TOKENS["alice"] + " ", "alice", "ä" * 20, "x" * 9999],
    )
    def test_unknown_token(self, tmp_path: Path, token: str) -> None:
        with pytest.raises(UnauthenticatedError, match="unknown token") as caught:
            Authenticator(tokens_file(tmp_path)).check(bearer(token), "alice")
        assert repr(token) not in str(caught.value)

    def test_a_client_brings_its_token(self, tmp_path: Path) -> None:
        authenticator = Authenticator(tokens_file(tmp_path))
        authenticator.check(ClientSecurity(token=TOKENS["alice"]).metadata(), "alice")
        assert ClientSecurity().metadata() == ()
        assert TOKENS["alice"] not in repr(ClientSecurity(token=TOKENS["alice"]))

    def test_read_again_when_it_changes(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = tokens_file(tmp_path)
        authenticator = Authenticator(path)
        tokens_file(tmp_path, f"# a new one for alice\nalice {'n' * 32}\n\nalice {'m' * 32}\n")
        authenticator.check(bearer("n" * 32), "alice")
        authenticator.check(bearer("m" * 32), "alice")
        for gone in TOKENS.values():
            with pytest.raises(UnauthenticatedError):
                authenticator.check(bearer(gone), "alice")
        path.write_text("alice")
        authenticator.check(bearer("n" * 32), "alice")
        authenticator.check(bearer("n" * 32), "alice")
        assert caplog.text.count("going on with what was there before") == 1
        path.unlink()
        authenticator.check(bearer("n" * 32), "alice")
        assert "No such file" in caplog.text
        tokens_file(tmp_path)
        authenticator.check(bearer(TOKENS["bob"]), "bob")

    def test_from_many_threads_while_it_changes(self, tmp_path: Path) -> None:
        path = tokens_file(tmp_path)
        authenticator = Authenticator(path)
        failures: list[Exception] = []
        stop = threading.Event()

        def check() -> None:
            while not stop.is_set():
                try:
                    authenticator.check(bearer(TOKENS["alice"]), "alice")
                except Exception as error:  # noqa: BLE001 - whatever it is
                    failures.append(error)

        threads = [threading.Thread(target=check) for _ in range(4)]
        for thread in threads:
            thread.start()
        for turn in range(20):
            newer = tmp_path / "newer"
            newer.touch(0o600)
            newer.write_text(f"alice {TOKENS['alice']}\ncarol {'c' * 30}{turn:02}\n")
            newer.replace(path)
        stop.set()
        for thread in threads:
            thread.join()
        assert not failures

    @pytest.mark.parametrize("mode", [0o604, 0o644, 0o660, 0o602])
    def test_a_file_that_others_may_touch_is_refused(self, tmp_path: Path, mode: int) -> None:
        with pytest.raises(ValueError, match=rf"tokens=.*mode {mode:04o}"):
            Authenticator(tokens_file(tmp_path, mode=mode))

    @pytest.mark.parametrize("mode", [0o400, 0o600, 0o440, 0o640])
    def test_a_file_for_owner_and_group_is_taken(self, tmp_path: Path, mode: int) -> None:
        Authenticator(tokens_file(tmp_path, mode=mode))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "a line 'worker token' at least"),
            ("# nobody\n", "a line 'worker token' at least"),
            ("alice\n", "line 1: expected a worker's name"),
            ("\nalice short\n", "line 2: expected a worker's name and its token of 16"),
            (f"al/ice {'a' * 32}\n", "line 1: worker='al/ice'"),
            (f"alice {'a' * 32} more\n", "line 1"),
            (f"alice {'a' * 32}\nbob {'a' * 32}\n", "line 2: expected a token of its own"),
        ],
    )
    def test_a_file_of_something_else_is_refused(
        self, tmp_path: Path, text: str, message: str
    ) -> None:
        with pytest.raises(ValueError, match=r"^tokens=") as caught:
            Authenticator(tokens_file(tmp_path, text))
        assert message in str(caught.value)
        assert "a" * 16 not in str(caught.value)

    def test_a_file_of_bytes_is_refused(self, tmp_path: Path) -> None:
        path = tokens_file(tmp_path)
        path.write_bytes(b"\xff\xfe")
        with pytest.raises(ValueError, match=r"tokens=.*UTF-8"):
            Authenticator(path)

    def test_a_workers_own_file(self, tmp_path: Path) -> None:
        assert read_token(tokens_file(tmp_path, "t" * 32 + "\n")) == "t" * 32
        with pytest.raises(ValueError, match=r"token_file=.*nothing else"):
            read_token(tokens_file(tmp_path, f"alice {'a' * 32}"))
        with pytest.raises(ValueError, match="mode 0644"):
            read_token(tokens_file(tmp_path, "t" * 32, mode=0o644))
        for token in ("short", "with a space in between", "line\nbreak" * 3):
            with pytest.raises(ValueError, match=r"^token: expected") as caught:
                ClientSecurity(token=token)
            assert token not in str(caught.value)
