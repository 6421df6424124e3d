import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from topq_dist.compress.layout import ChunkedVector


@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.data())
def test_pieces_read_as_their_concatenation(numels: list[int], data: st.DataObject) -> None:
    parts = [torch.randn(numel) for numel in numels]
    chunked, whole = ChunkedVector(parts), torch.cat(parts)
    assert chunked.numel == whole.numel()
    number = data.draw(st.integers(0, len(parts) - 1))
    begin = sum(numels[:number])
    start = begin + data.draw(st.integers(0, numels[number]))
    stop = data.draw(st.integers(start, begin + numels[number]))
    assert torch.equal(chunked[start:stop], whole[start:stop])
    chosen = data.draw(st.sets(st.integers(0, max(0, whole.numel() - 1))))
    indices = torch.tensor(sorted(chosen) if whole.numel() else [], dtype=torch.int64)
    found = []
    for where, chunk, mine in chunked.split(indices):
        assert torch.equal(chunk, whole[where])
        assert all(where.start <= index < where.stop for index in indices[mine].tolist())
        found += indices[mine].tolist()
    assert found == indices.tolist()


def test_a_slice_shares_memory_and_lies_in_one_chunk() -> None:
    parts = [torch.zeros(3), torch.zeros(4)]
    chunked = ChunkedVector(parts)
    chunked[3:5].fill_(1.0)
    assert parts[1].tolist() == [1.0, 1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="one chunk"):
        chunked[2:4]


@pytest.mark.parametrize("parts", [[], [torch.zeros(1), torch.zeros(1, dtype=torch.float16)]])
def test_pieces_are_of_one_kind(parts: list[torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="expected one dtype"):
        ChunkedVector(parts)
