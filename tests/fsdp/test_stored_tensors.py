"""A checkpoint's folder that a stranger has made: nothing in it is run."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from topq_dist.fsdp import stored_tensors
from topq_dist.fsdp.stored_tensors import TensorReader


class Runs:
    """An object that makes a folder where it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = str(made)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.made,)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_tensors_are_read_and_nothing_is_run(tmp_path: Path) -> None:
    folder, made = tmp_path / "saved", tmp_path / "made"
    state = {"topq": {"a": torch.arange(6.0), "b": torch.tensor(3)}, "other": {"n": 5}}
    save(state, checkpoint_id=folder, no_dist=True)
    reader = TensorReader(str(folder))
    assert set(reader.described) == {"topq.a", "topq.b", "other.n"}
    reader.check_tensors("topq")
    found = {"topq": {"a": torch.zeros(6), "b": torch.tensor(0)}}
    load(found, storage_reader=reader, no_dist=True)
    assert torch.equal(found["topq"]["a"], state["topq"]["a"])  # type: ignore[index]
    assert int(found["topq"]["b"]) == 3
    with pytest.raises(ValueError, match=r"'other\.n', which is no tensor"):
        reader.check_tensors("other")

    pickles = [pickle.dumps(Runs(made), protocol) for protocol in (0, 2, 4)]
    for raw in [*pickles, b"", b"\x80\x04garbage", pickle.dumps({"a": 1})]:
        (folder / ".metadata").write_bytes(raw)
        with pytest.raises(ValueError, match=r"\.metadata is no.* expected"):
            TensorReader(str(folder))
    assert not made.exists()
    with pytest.raises(FileNotFoundError):
        TensorReader(str(tmp_path))


class Asked:
    """Pickled as an attribute of something, which is how Python 3.11.2 writes an Enum's member."""

    def __init__(self, owner: object, name: str) -> None:
        self._asked = owner, name

    def __reduce__(self) -> Any:
        return getattr, self._asked


def test_an_attribute_is_read_of_torchs_enum_alone() -> None:
    encoding = metadata._MEM_FORMAT_ENCODING
    for member in encoding:
        raw = io.BytesIO(pickle.dumps(Asked(encoding, member.name)))
        assert stored_tensors._Unpickler(raw).load() is member
    for owner, name in ((encoding, "__init__"), (metadata.Metadata, "__init__")):
        raw = io.BytesIO(pickle.dumps(Asked(owner, name)))
        with pytest.raises((pickle.UnpicklingError, KeyError)):
            stored_tensors._Unpickler(raw).load()
