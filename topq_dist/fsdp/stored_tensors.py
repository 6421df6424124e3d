"""A folder of torch's distributed checkpoint of which tensors alone are read.

torch's own reader unpickles what describes the folder, and values that are no tensors, and so runs
what a stranger may have put there.
"""

from __future__ import annotations

import pickle
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

_DESCRIPTION = ".metadata"
# what torch describes tensors, and where they lie, with
_KNOWN = {
    metadata.__name__: {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    filesystem.__name__: {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "collections": {"OrderedDict"},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _KNOWN.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.split(".")[0] == "pathlib" and name.endswith("Path"):
            # of another system, it may be
            return PurePath
        if (module, name) == ("builtins", "getattr"):
            # how Python 3.11.0 to 3.11.3 write a member of an Enum
            return _memory_format
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _memory_format(encoding: object, name: str) -> Any:
    """Return the member of torch's only Enum in there, and look up nothing else."""
    if encoding is not metadata._MEM_FORMAT_ENCODING:
        raise pickle.UnpicklingError(f"it asks for {name!r} of {encoding!r}")
    return metadata._MEM_FORMAT_ENCODING[name]


class TensorReader(FileSystemReader):
    """Reads tensors out of a checkpoint in a folder, and runs nothing of what is in it.

    described: what the folder has, by name. Raises OSError where it cannot be read, ValueError
    where it is described by anything but what torch writes.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        with (Path(folder) / _DESCRIPTION).open("rb") as file:
            self._metadata = _read(file, folder)
        self.described = dict(self._metadata.state_dict_metadata)

    def check_tensors(self, key: str) -> None:
        """Raise ValueError where something under `key` is no tensor, which torch would unpickle."""
        for name, stored in self.described.items():
            under = name == key or name.startswith(f"{key}.")
            if under and not isinstance(stored, TensorStorageMetadata):
                raise ValueError(f"{self.path} has {name!r}, which is no tensor: expected tensors")

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Return the description, as it was when it was checked."""
        return self._metadata


def _read(file: BinaryIO, folder: str) -> Metadata:
    try:
        found = _Unpickler(file).load()
    except Exception as error:  # there may be anything in it
        raise ValueError(
            f"{folder}/{_DESCRIPTION} is not what torch writes: {error!r}; expected a checkpoint "
            "that dcp.save has made"
        ) from error
    if not isinstance(found, Metadata) or not isinstance(found.state_dict_metadata, dict):
        raise ValueError(f"{folder}/{_DESCRIPTION} is no Metadata: expected that of dcp.save")
    if found.storage_meta is None:
        found.storage_meta = StorageMeta()
    return found
