"""The blocks of code on the pages, and what runs them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("deploy/**/*.md")])
_BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^>]+) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$",
    flags=re.MULTILINE | re.DOTALL,
)
NOTHING: Mapping[str, str] = {}
# stands for the user's loop
_LOOP = re.compile(r"^( *)\.\.\.  # your (?:loop|step).*$", flags=re.MULTILINE)


class Block(NamedTuple):
    """A block: its language, or "", its text, and why it is not run, if it is not."""

    language: str
    code: str
    reason: str | None


def blocks_of(page: Path) -> list[Block]:
    """Return all blocks of a page, in their order."""
    return [
        Block(found["language"], found["code"], found["reason"])
        for found in _BLOCK.finditer(page.read_text())
    ]


def python_of(page: str) -> list[str]:
    """Return the blocks of Python on the page of this name that are to run.

    Those that are a whole file of examples/ are run as these are, by tests of their own.
    """
    examples = {path.read_text().strip() for path in (ROOT / "examples").glob("*.py")}
    return [
        one.code
        for one in blocks_of(ROOT / page)
        if one.language == "python" and one.reason is None and one.code.strip() not in examples
    ]


def command_of(page: str, start: str) -> list[str]:
    """Return the words of the one command on a page that begins so."""
    lines = [
        line
        for block in blocks_of(ROOT / page)
        for line in block.code.replace("\\\n", " ").splitlines()
    ]
    (command,) = [line for line in lines if line.startswith(start)]
    return shlex.split(command, comments=True)


def run_block(code: str, names: dict[str, Any], replaced: Mapping[str, str] = NOTHING) -> None:
    """Execute a block in `names`.

    The user's loop is `your_loop` of these. replaced: what a test cannot have, and what stands in
    its place; each must be in the block, so that the test follows the page.
    """
    for old, new in replaced.items():
        assert old in code, old
        code = code.replace(old, new)
    exec(compile(_LOOP.sub(r"\1your_loop()", code), "<page>", "exec"), names)  # noqa: S102


def plain_model() -> nn.Sequential:
    """Return a model with an embedding, on tokens of which `steps` trains it."""
    model = nn.Sequential()
    model.add_module("embed", nn.Embedding(11, 8))
    model.add_module("out", nn.Linear(8, 128))
    return model


def steps(model: nn.Module, count: int = 3) -> Iterator[None]:
    """Yield behind the backward pass of each step."""
    for _ in range(count):
        tokens = torch.randint(0, 11, (16,))
        model.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens), tokens)
        loss.backward()  # type: ignore[no-untyped-call]
        yield
