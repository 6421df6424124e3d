"""The site's pages of what stands outside of docs/, and docstrings as Markdown, for `mkdocs build`.

A link that leaves docs/ leads to a page made here: of another Markdown file of the repository as it
is, of a source file, or the files of a folder, as a listing. README.md is the first page.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"(?<=\]\()([^)\s#]+)(?=(#[^)\s]*)?\))")
_ARGUMENT = re.compile(r"( {4})?([a-z]\w*(?:, [a-z]\w*)*): ")
# where the pages for what stands outside of docs/ come from
_origins: dict[str, Path] = {}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each file that a page links to, and for README.md."""
    waiting = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    seen = set(waiting)
    for path in waiting:
        uri = _page_of(path)
        if not path.is_relative_to(ROOT / "docs"):
            _origins[uri] = path
            files.append(File.generated(config, uri, content=_content(path)))
        for target in _links(path) if path.suffix == ".md" else ():
            if target.exists() and target not in seen:
                seen.add(target)
                if not target.is_relative_to(ROOT / "docs"):
                    waiting.append(target)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return the page with its links to files of the repository led to pages."""
    uri = page.file.src_uri
    path = _origins.get(uri, ROOT / "docs" / uri)
    if path.suffix != ".md":
        return markdown

    def led(match: re.Match[str]) -> str:
        target = _target(path, match[1])
        if not target.exists():
            return match[1]
        here = PurePosixPath(uri).parent
        return Path(os.path.relpath(_page_of(target), here)).as_posix()

    return _LINK.sub(led, markdown)


def _links(path: Path) -> list[Path]:
    return [_target(path, match[1]) for match in _LINK.finditer(path.read_text())]


def _target(path: Path, link: str) -> Path:
    return Path(os.path.normpath(path.parent / link)) if "://" not in link else Path(link)


def _page_of(path: Path) -> str:
    """Return the place in the site of a file of the repository."""
    name = path.relative_to(ROOT).as_posix()
    if name.startswith("docs/"):
        return name.removeprefix("docs/")
    if name == "README.md":
        return "index.md"
    if path.name == "README.md":
        return f"{path.parent.relative_to(ROOT).as_posix()}.md"
    return name.lower() if path.suffix == ".md" else f"source/{name}.md"


def _content(path: Path) -> str:
    if path.suffix == ".md":
        return path.read_text()
    files = sorted(one for one in path.iterdir() if one.is_file()) if path.is_dir() else [path]
    listings = "".join(
        f"\n## {one.name}\n\n````{one.suffix[1:]}\n{one.read_text()}\n````\n" for one in files
    )
    return f"# {path.relative_to(ROOT).as_posix()}\n{listings}"


class ListedArguments(griffe.Extension):
    """Has `name: text` lines of docstrings, of arguments and fields, be a Markdown list."""

    def on_instance(self, *, obj: griffe.Object, **_: object) -> None:
        """Change the docstring of what griffe has read."""
        if obj.docstring is not None:
            obj.docstring.value = listed(obj.docstring.value)


def listed(docstring: str) -> str:
    """Return a docstring in which arguments, whose further lines are indented, are a list."""
    lines: list[str] = []
    continued: str | None = None
    for line in docstring.splitlines():
        item = _ARGUMENT.match(line)
        if item and (item[1] or continued is not None or not lines or not lines[-1]):
            lines += [""] if continued is None else []
            continued = f"{item[1] or ''}    "
            lines.append(f"- **{item[2]}**: {line[item.end() :]}")
        elif continued is not None and line.startswith(continued):
            lines.append(f"    {line.strip()}")
        else:
            lines.append(line)
            continued = None
    return "\n".join(lines)
