"""fp16 in compiled loops, compared with torch's."""

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import given
from hypothesis import strategies as st

from topq_dist.compress.kernels import round_to_half, widen_half

ALL = np.arange(1 << 16, dtype=np.uint16)
FINITE = ALL[ALL & 0x7C00 != 0x7C00]


def torch_widened(halves: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    stored = torch.from_numpy(halves.view(np.int16)).view(torch.float16)
    widened: npt.NDArray[np.float32] = stored.float().numpy()
    return widened


def widened(
    halves: npt.NDArray[np.uint16], exponent: int = 0
) -> tuple[bool, npt.NDArray[np.float32]]:
    numbers = np.empty(halves.size, np.float32)
    finite = widen_half(halves, np.float32(2.0**exponent), numbers, numbers.view(np.int32))
    return bool(finite), numbers


def assert_rounded_as_torch_does(numbers: npt.NDArray[np.float32], exponent: int = 0) -> None:
    scaled, halves = np.empty_like(numbers), np.empty(numbers.size, np.uint16)
    scale = np.float32(2.0**exponent)
    round_to_half(numbers, scale, scaled, scaled.view(np.int32), halves)
    expected = torch.from_numpy(numbers * scale).half().view(torch.int16).numpy()
    np.testing.assert_array_equal(halves.view(np.int16), expected)


def test_every_number_is_widened_exactly() -> None:
    finite, numbers = widened(FINITE)
    assert finite
    np.testing.assert_array_equal(numbers.view(np.int32), torch_widened(FINITE).view(np.int32))


def test_what_is_not_finite_is_seen_wherever_it_is() -> None:
    for half in ALL[ALL & 0x7C00 == 0x7C00]:
        assert not widened(np.array([0, half, 0], np.uint16))[0]
    # 2**15 fits after a scaling by 2**112, and by 2**113 no more
    largest = np.array([0x7800, 0xF800], np.uint16)
    assert widened(largest, 112)[1].tolist() == [2.0**127, -(2.0**127)]
    assert widened(largest, 112)[0]
    assert not widened(largest, 113)[0]


def test_every_number_halfway_between_two_and_its_neighbours_are_rounded_as_torch_does() -> None:
    numbers = np.sort(torch_widened(FINITE)).astype(np.float64)
    halfway = ((numbers[1:] + numbers[:-1]) / 2).astype(np.float32)
    below, above = (np.nextafter(halfway, np.float32(to)) for to in (-np.inf, np.inf))
    assert_rounded_as_torch_does(
        np.concatenate([numbers.astype(np.float32), halfway, below, above])
    )
    tiny = np.array([0.0, -0.0, 1e-45, -1e-45, 1e-38, 2.0**-25, -(2.0**-25)], np.float32)
    assert_rounded_as_torch_does(tiny)


@given(
    st.lists(st.floats(-65_519, 65_519, width=32), min_size=1, max_size=200), st.integers(-126, 126)
)
def test_any_number_is_rounded_as_torch_does(numbers: list[float], exponent: int) -> None:
    unscaled = np.ldexp(np.array(numbers, np.float64), -exponent)
    largest = np.finfo(np.float32).max
    assert_rounded_as_torch_does(np.clip(unscaled, -largest, largest).astype(np.float32), exponent)
