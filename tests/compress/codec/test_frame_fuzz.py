import pytest
from fuzz_frames import SHAPES, fuzz, make_seeds

from topq_dist.compress.codec.frame import peek_header
from topq_dist.compress.codec.indices import IndexCoding
from topq_dist.compress.codec.values import BLOCK_NUMELS, VALUE_FORMATS


def test_the_seeds_cover_every_index_coding_with_segments_and_without() -> None:
    seeds = make_seeds()
    cut = [seed for seed in seeds if peek_header(seed.raw).segment_bytes]
    plain = [seed for seed in seeds if seed not in cut]
    assert len(plain) == len(SHAPES) * len(VALUE_FORMATS) + 1
    assert len(cut) == sum(k > 1 for _, k in SHAPES) * len(BLOCK_NUMELS)
    assert {peek_header(seed.raw).index_coding for seed in plain} == set(IndexCoding)


@pytest.mark.parametrize("seed", [1, 2])
def test_mutants_are_refused_or_sound(seed: int) -> None:
    outcomes = fuzz(10_000, seed)
    # else the mutants would only ever knock at the first check
    assert outcomes["resealed, accepted"] > 100
    assert outcomes["resealed, refused"] > 1000
    assert outcomes["stale, refused"] > 4000
    assert "stale, accepted" not in outcomes
