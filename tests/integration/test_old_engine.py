"""Frames and states of an older release: read, written again, and gone on from to the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from old_engine import LAST_STEP, RANKS, SAVED_AT, take_hook_steps, take_optimizer_steps
from ranks import run_ranks
from torch import Tensor

from topq_dist.compress.codec.frame import decode_frame, encode_frame, peek_header
from topq_dist.compress.codec.indices import IndexCoding
from topq_dist.compress.codec.values import VALUE_FORMATS, quantize

# those of that release: new ones come behind them
OLD_FORMATS = VALUE_FORMATS[:7]
SAVED = Path(__file__).parents[1] / "data" / "old_engine"


def read(name: str) -> Any:
    return torch.load(SAVED / name, weights_only=True)


def frames() -> Iterator[tuple[list[Any], dict[str, Tensor]]]:
    """Yield each case, and its frame, indices, values and what they decode to."""
    saved, narrow, wide = read("frames.pt"), 0, 0
    cases = saved["cases"]
    ends = {"frames": [case[2] for case in cases], "indices": [case[1] for case in cases]}
    split = {key: saved[key].split(sizes) for key, sizes in ends.items()}
    for number, case in enumerate(cases):
        k = case[1]
        if case[3] == "fp64":
            values = decoded = saved["wide_values"][wide : wide + k]
            wide += k
        else:
            values = saved["values"][narrow : narrow + k]
            decoded = saved["decoded"][narrow : narrow + k]
            narrow += k
        yield (
            case,
            {
                "frame": split["frames"][number],
                "indices": split["indices"][number].long(),
                "values": values,
                "decoded": decoded,
            },
        )


# tiles came later
OLD_CODINGS = set(IndexCoding) - {IndexCoding.TILED}


def test_old_frames_are_of_every_kind() -> None:
    kinds = {(case[3], case[4]) for case, _ in frames()}
    assert kinds == {(fmt, coding.name) for fmt in OLD_FORMATS for coding in OLD_CODINGS}


def test_old_frames_are_read_and_written_alike() -> None:
    for (numel, _, _, value_format, coding, ks), old in frames():
        header = peek_header(old["frame"])
        assert (header.value_format, header.index_coding.name) == (value_format, coding)
        read_back = decode_frame(old["frame"], numel=numel)
        assert torch.equal(read_back.indices, old["indices"])
        assert torch.equal(read_back.values, old["decoded"])
        again = encode_frame(
            numel, old["indices"], quantize(old["values"], value_format, segment_ks=ks)
        )
        assert torch.equal(again, old["frame"])


def test_an_old_frame_that_is_not_finite_is_read() -> None:
    assert not decode_frame(read("frames.pt")["non_finite"], numel=10).finite


@pytest.mark.gloo
def test_an_old_hook_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    then = run_ranks(RANKS, take_hook_steps, tmp_path, SAVED, SAVED_AT, LAST_STEP)
    for came_to, expected in zip(then, read("ranks_then.pt"), strict=True):
        came_to["hook"].pop("stats")
        # new since then
        assert came_to["hook"].pop("order") == "rows"
        assert all(one == [0.01] * 3 for one in came_to["hook"]["momentum"].pop("rates").values())
        assert_same(came_to["hook"], expected["hook"])
        assert_same(came_to["model"], expected["model"])


@pytest.mark.usefixtures("one_thread")
def test_an_old_optimizer_goes_on_to_the_same_bits() -> None:
    then = take_optimizer_steps(read("optimizer.pt"), SAVED_AT, LAST_STEP)
    expected = read("optimizer_then.pt")
    if not torch.equal(then["model"]["weight"], expected["weight"]):
        # some processors' AdamW rounds one last bit upwards
        weight = expected["weight"]
        weight[3, 3] = torch.nextafter(weight[3, 3], torch.tensor(torch.inf))
    assert_same(then["model"], expected)


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same(found[key], expected[key])
    else:
        assert found == expected
