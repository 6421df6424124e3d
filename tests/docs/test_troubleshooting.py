"""Every message that the page on troubleshooting quotes is one of the code's."""

from __future__ import annotations

import ast
import re

import pytest
from page_blocks import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
QUOTED = re.findall(r"^### `(.+)`$", PAGE.read_text(), flags=re.MULTILINE)


def text_of(node: ast.AST) -> str:
    """Return a text of the source, with … for what is put into it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[-.\d]*[a-z]", "…", node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or "…" for part in node.values)
    return ""


@pytest.fixture(scope="module")
def messages() -> set[str]:
    """All texts in the sources of the package, those in parts joined."""
    sources = [path for path in (ROOT / "topq_dist").rglob("*.py") if "v1" not in path.parts]
    nodes = (node for path in sources for node in ast.walk(ast.parse(path.read_text())))
    return {text for node in nodes if (text := text_of(node))}


def is_of(quoted: str, message: str) -> bool:
    """Return whether a message has the parts of `quoted` in their order."""
    place = 0
    for part in (part.strip() for part in quoted.split("…")):
        place = message.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True


def test_enough_is_quoted() -> None:
    assert len(QUOTED) > 35
    assert len(set(QUOTED)) == len(QUOTED)


@pytest.mark.parametrize("quoted", QUOTED)
def test_the_message_is_in_the_source(quoted: str, messages: set[str]) -> None:
    assert any(is_of(quoted, message) for message in messages)


def test_words_that_no_message_has_are_found_out(messages: set[str]) -> None:
    assert not any(is_of("ranks … agree about …", message) for message in messages)
