"""Reads what a shared library is for, gives and needs: ELF, Mach-O and PE of 64 bits, by format.

There is no one tool that reads the three, and a library for another system cannot be loaded here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_ELF_MACHINES = {62: "x86_64", 183: "aarch64"}
_MACHO_MACHINES = {0x01000007: "x86_64", 0x0100000C: "aarch64"}
_PE_MACHINES = {0x8664: "x86_64"}
# kinds of ELF sections, by number
_DYNAMIC, _DYNAMIC_SYMBOLS, _NEEDED_VERSIONS = 6, 11, 0x6FFFFFFE
# kinds of Mach-O load commands
_SYMBOL_TABLE, _BUILD_VERSION = 0x2, 0x32


@dataclass(frozen=True, kw_only=True)
class SharedLibrary:
    """A library's system (linux, macos or windows) and machine, by zig's names.

    `exports` are the functions that others may call, `needs` the libraries that it loads and
    `versions` what it asks of them: GLIBC_2.17, or the oldest macOS as 11.0.
    """

    system: str
    machine: str
    exports: frozenset[str]
    needs: frozenset[str] = field(default=frozenset())
    versions: frozenset[str] = field(default=frozenset())


def read_library(path: Path) -> SharedLibrary:
    """Return what the file says of itself; raises ValueError for any other kind of file."""
    data = path.read_bytes()
    if data[:6] == b"\x7fELF\x02\x01":
        return _read_elf(data)
    if data[:4] == b"\xcf\xfa\xed\xfe":
        return _read_macho(data)
    if data[:2] == b"MZ":
        return _read_pe(data)
    raise ValueError(f"{path} begins with {data[:6]!r}: expected ELF, Mach-O or PE of 64 bits")


def _read_elf(data: bytes) -> SharedLibrary:
    (table,) = struct.unpack_from("<Q", data, 40)
    entry, count = struct.unpack_from("<HH", data, 58)
    # kind, offset, size and linked section of each
    sections = [struct.unpack_from("<4xI16xQQI", data, table + at * entry) for at in range(count)]
    exports, needs, versions = set(), set(), set()
    for kind, offset, size, link in sections:
        texts = sections[link][1]
        if kind == _DYNAMIC_SYMBOLS:
            for name, info, defined in struct.iter_unpack("<IBxH16x", data[offset : offset + size]):
                if defined and info >> 4:
                    exports.add(_text(data, texts + name))
        elif kind == _DYNAMIC:
            for tag, value in struct.iter_unpack("<QQ", data[offset : offset + size]):
                if tag == 1:
                    needs.add(_text(data, texts + value))
        elif kind == _NEEDED_VERSIONS:
            versions |= {_text(data, texts + name) for name in _version_names(data, offset)}
    return SharedLibrary(
        system="linux",
        machine=_ELF_MACHINES[struct.unpack_from("<H", data, 18)[0]],
        exports=frozenset(exports),
        needs=frozenset(needs),
        versions=frozenset(versions),
    )


def _version_names(data: bytes, at: int) -> Iterator[int]:
    """Yield where in the texts the names of needed versions are: a list of lists, linked."""
    while True:
        count, first, following = struct.unpack_from("<2xH4xII", data, at)
        entry = at + first
        for _ in range(count):
            name, step = struct.unpack_from("<8xII", data, entry)
            yield name
            entry += step
        if not following:
            return
        at += following


def _read_macho(data: bytes) -> SharedLibrary:
    machine, commands = struct.unpack_from("<I8xI", data, 4)
    exports, versions, at = set(), set(), 32
    for _ in range(commands):
        command, size = struct.unpack_from("<II", data, at)
        if command == _SYMBOL_TABLE:
            table, count, texts = struct.unpack_from("<III", data, at + 8)
            for entry in range(count):
                name, kind = struct.unpack_from("<IB", data, table + 16 * entry)
                # external, not private, and defined in a section
                if kind & 0x1F == 0x0F:
                    exports.add(_text(data, texts + name).removeprefix("_"))
        elif command == _BUILD_VERSION:
            (oldest,) = struct.unpack_from("<I", data, at + 12)
            versions.add(f"{oldest >> 16}.{oldest >> 8 & 255}")
        at += size
    return SharedLibrary(
        system="macos",
        machine=_MACHO_MACHINES[machine],
        exports=frozenset(exports),
        versions=frozenset(versions),
    )


def _read_pe(data: bytes) -> SharedLibrary:
    (header,) = struct.unpack_from("<I", data, 60)
    machine, sections = struct.unpack_from("<HH", data, header + 4)
    (optional_size,) = struct.unpack_from("<H", data, header + 20)
    # address in memory, size and offset in the file of each
    places = [
        struct.unpack_from("<12xIII", data, header + 24 + optional_size + 40 * at)
        for at in range(sections)
    ]

    def offset_of(address: int) -> int:
        for start, size, offset in places:
            if start <= address < start + size:
                return int(address - start + offset)
        raise ValueError(f"address {address} is in no section")

    (directory,) = struct.unpack_from("<I", data, header + 24 + 112)
    exports = set()
    if directory:
        count, names = struct.unpack_from("<I4xI", data, offset_of(directory) + 24)
        for at in range(count):
            (name,) = struct.unpack_from("<I", data, offset_of(names) + 4 * at)
            exports.add(_text(data, offset_of(name)))
    return SharedLibrary(
        system="windows", machine=_PE_MACHINES[machine], exports=frozenset(exports)
    )


def _text(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode()
