"""build_hooks/read_library.py: what a library is for, gives and needs, of each format."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
CC = shutil.which("cc")
sys.path.insert(0, str(ROOT / "build_hooks"))
from read_library import SharedLibrary, read_library  # noqa: E402


@pytest.mark.skipif(CC is None or sys.platform != "linux", reason="wants cc, on Linux")
def test_an_elf_library_names_its_functions_and_the_glibc_that_it_wants(tmp_path: Path) -> None:
    source = tmp_path / "some.c"
    source.write_text(
        "#include <string.h>\n"
        '__attribute__((visibility("default"))) void topq_copy(char *to, char *from, long size)\n'
        "{ memcpy(to, from, size); }\n"
        "void topq_hidden(void) {}\n"
    )
    made = tmp_path / "some.so"
    flags = ["-shared", "-fPIC", "-fvisibility=hidden", "-O1"]
    subprocess.run([str(CC), *flags, str(source), "-o", str(made)], check=True)
    library = read_library(made)
    assert library.system == "linux"
    assert {name for name in library.exports if name.startswith("topq_")} == {"topq_copy"}
    assert "libc.so.6" in library.needs
    assert all(version.startswith("GLIBC_2.") for version in library.versions)


def test_a_macho_library_names_its_functions_and_the_oldest_macos(tmp_path: Path) -> None:
    # defined here, private to it, and wanted from elsewhere
    kinds = {"_topq_abi": 0x0F, "_topq_hidden": 0x1F, "_memcpy": 0x01}
    texts, entries = b"\0", b""
    for name, kind in kinds.items():
        entries += struct.pack("<IBBHQ", len(texts), kind, 1, 0, 0)
        texts += name.encode() + b"\0"
    table = 32 + 24 + 24
    symbols = struct.pack("<6I", 0x2, 24, table, len(kinds), table + len(entries), len(texts))
    built_for = struct.pack("<6I", 0x32, 24, 1, 11 << 16, 0, 0)
    header = struct.pack("<8I", 0xFEEDFACF, 0x0100000C, 0, 6, 2, 48, 0, 0)
    made = tmp_path / "some.dylib"
    made.write_bytes(header + built_for + symbols + entries + texts)
    assert read_library(made) == SharedLibrary(
        system="macos",
        machine="aarch64",
        exports=frozenset({"topq_abi"}),
        versions=frozenset({"11.0"}),
    )


@pytest.mark.parametrize("exported", [["topq_abi", "topq_sum_terms"], []])
def test_a_windows_library_names_its_functions(tmp_path: Path, exported: list[str]) -> None:
    in_memory, in_file = 0x1000, 0x200
    names, texts = b"", b""
    begin = in_memory + 40 + 4 * len(exported)
    for name in exported:
        names += struct.pack("<I", begin + len(texts))
        texts += name.encode() + b"\0"
    section = struct.pack("<6I4I", *[0] * 6, len(exported), 0, in_memory + 40, 0) + names + texts
    directory = struct.pack("<II", in_memory if exported else 0, 40)
    headers = b"MZ" + bytes(58) + struct.pack("<I", 64)
    headers += b"PE\0\0" + struct.pack("<HHIIIHH", 0x8664, 1, 0, 0, 0, 240, 0)
    headers += struct.pack("<H", 0x20B) + bytes(110) + directory + bytes(120)
    headers += struct.pack("<8sIIII16x", b".edata", len(section), in_memory, 512, in_file)
    made = tmp_path / "some.dll"
    made.write_bytes(headers.ljust(in_file, b"\0") + section)
    assert read_library(made) == SharedLibrary(
        system="windows", machine="x86_64", exports=frozenset(exported)
    )


def test_what_is_no_library_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("#!/bin/sh\n")
    with pytest.raises(ValueError, match="expected ELF"):
        read_library(text)
