"""The snapshot's file: safetensors, with a SHA-256 of the whole file in its metadata.

Any safetensors reader can open it. This writer streams tensors to the file as they lie in memory
and hashes them on their way, so that a snapshot costs no second copy; the digest is computed with
zeros in its own place, and put there last.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

FORMAT_VERSION = 1
_FORMAT = "topq_dist.ps.snapshot"
_CHUNK_BYTES = 1 << 20  # hashed while still in the cache, then written
_LENGTH = struct.Struct("<Q")
_NO_DIGEST = "0" * 64
_BEGINNING = re.compile(
    rb'\{"__metadata__":\{"format":"'
    + re.escape(_FORMAT.encode())
    + rb'","format_version":"(\d{1,9})","sha256":"([0-9a-f]{64})"\}'
)
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

# a tensor, or byte strings that are stored one behind the other as a tensor of uint8
Contents = Tensor | Sequence[memoryview]


class StateError(Exception):
    """The server's saved state cannot be used, or not be written; says which file, and why."""


def write_snapshot_file(file: int, contents: Mapping[str, Contents]) -> None:
    """Write `contents` to the empty file with the descriptor `file`; fsyncing is the caller's.

    Raises ValueError for a name or a tensor that safetensors cannot hold, and OSError.
    """
    # the wide ones first: each is then aligned
    ordered = sorted(contents.items(), key=lambda item: -_item_bytes(item[1]))
    header = _header(ordered)
    digest = hashlib.sha256()
    for chunk in _chunks(memoryview(header)):
        digest.update(chunk)
        _write(file, chunk)
    for name, content in ordered:
        for part in _parts(name, content):
            for chunk in _chunks(part):
                digest.update(chunk)
                _write(file, chunk)
    place = header.index(_NO_DIGEST.encode())
    if os.pwrite(file, digest.hexdigest().encode(), place) != len(_NO_DIGEST):
        raise OSError("a part of the digest was not written")


def read_snapshot_file(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file that `write_snapshot_file` wrote.

    They may be backed by the file itself. Raises StateError unless every bit of it is as it was
    written, and OSError.
    """
    _check_digest(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise StateError(f"{path} cannot be read: {error}") from error


def _check_digest(path: Path) -> None:
    damaged = f"{path} is damaged"
    with path.open("rb") as file:
        beginning = file.read(_LENGTH.size + 512)
        found = _BEGINNING.match(beginning, _LENGTH.size)
        if found is None:
            raise StateError(f"{damaged}, or no snapshot of a parameter server")
        version = int(found[1])
        if version != FORMAT_VERSION:
            raise StateError(
                f"{path} has format version {version}, unless it is damaged: this release of "
                f"topq_dist reads version {FORMAT_VERSION}"
            )
        start, stop = found.span(2)
        digest = hashlib.sha256(beginning[:start] + _NO_DIGEST.encode() + beginning[stop:])
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    if digest.hexdigest().encode() != found[2]:
        raise StateError(f"{damaged}: its SHA-256 is not what was written into it")


def _header(ordered: Sequence[tuple[str, Contents]]) -> bytes:
    table: dict[str, object] = {
        "__metadata__": {
            "format": _FORMAT,
            "format_version": str(FORMAT_VERSION),
            "sha256": _NO_DIGEST,
        }
    }
    end = 0
    for name, content in ordered:
        start, end = end, end + _content_bytes(content)
        if name in table:
            raise ValueError(f"tensor {name!r}: expected a name that the format does not use")
        if isinstance(content, Tensor):
            if content.dtype not in _DTYPES:
                raise ValueError(f"tensor {name!r} has dtype {content.dtype}: cannot be saved")
            dtype, shape = _DTYPES[content.dtype], list(content.shape)
        else:
            dtype, shape = "U8", [end - start]
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    # UTF-8 and not escaped, so that a name that is no text is refused here and not when read
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return _LENGTH.pack(len(text)) + text


def _item_bytes(content: Contents) -> int:
    return content.element_size() if isinstance(content, Tensor) else 1


def _content_bytes(content: Contents) -> int:
    if isinstance(content, Tensor):
        return content.numel() * content.element_size()
    return sum(part.nbytes for part in content)


def _parts(name: str, content: Contents) -> Iterator[memoryview]:
    if not isinstance(content, Tensor):
        yield from (part.cast("B") for part in content if part.nbytes)
    elif content.layout != torch.strided or content.is_meta:
        raise ValueError(f"tensor {name!r} has layout {content.layout} on {content.device}")
    elif content.numel():
        whole = content.detach().cpu().contiguous()
        # a single element counts as contiguous whatever its stride; and numpy knows no bf16
        flat = whole.as_strided((whole.numel(),), (1,))
        yield flat.view(torch.uint8).numpy().data


def _chunks(view: memoryview) -> Iterator[memoryview]:
    for start in range(0, view.nbytes, _CHUNK_BYTES):
        yield view[start : start + _CHUNK_BYTES]


def _write(file: int, chunk: memoryview) -> None:
    while chunk:
        chunk = chunk[os.write(file, chunk) :]
