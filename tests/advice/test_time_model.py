"""The model of time: what a step takes on a link, and which method is the one to use."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from topq_dist.advice.time_model import (
    GivenLink,
    MeasuredLink,
    Method,
    MethodCost,
    Prediction,
    Traffic,
    predict,
    recommend,
)

DENSE = Method(kind="dense")
TOPQ = Method(kind="top-Q", q=0.97, value_format="int2", exchange="allgather")
SPARSER = Method(kind="top-Q", q=0.999, value_format="int2", exchange="allgather")
SPLIT = Method(kind="top-Q", q=0.97, value_format="int2", exchange="split")
LOCAL = Method(kind="local steps", q=0.97, value_format="int2", every=5)

rates = st.floats(1e5, 1e12)
seconds = st.floats(0.0, 10.0)
sizes = st.integers(1, 10**10)
worlds = st.integers(2, 1000)
traffics = st.builds(
    Traffic,
    st.sampled_from(["all_reduce float32", "all_gather uint8", "all_to_all uint8"]),
    st.integers(1, 20),
    sizes,
)
costs = st.builds(
    MethodCost,
    method=st.sampled_from([DENSE, TOPQ, SPLIT, LOCAL]),
    engine_s=seconds,
    traffic=st.lists(traffics, min_size=1, max_size=3).map(tuple),
)


def cost(method: Method, engine_s: float, handed_bytes: int) -> MethodCost:
    kind = "all_reduce float32" if method is DENSE else "all_gather uint8"
    return MethodCost(method=method, engine_s=engine_s, traffic=(Traffic(kind, 1, handed_bytes),))


def given_link(rate: float, *, latency_s: float = 0.0, world_size: int = 2) -> GivenLink:
    return GivenLink(bandwidth_bits_per_s=rate, latency_s=latency_s, world_size=world_size)


class TestLinks:
    @given(costs, rates, rates, seconds, worlds, seconds)
    def test_more_bandwidth_never_takes_longer(
        self, one: MethodCost, rate: float, other: float, latency_s: float, size: int, own_s: float
    ) -> None:
        slow, fast = (
            predict(
                [one],
                given_link(at, latency_s=latency_s, world_size=size),
                compute_s=own_s,
                world_size=size,
            )[0].step_s
            for at in sorted((rate, other))
        )
        assert fast <= slow

    @given(sizes, rates, worlds)
    def test_dense_alone_is_bytes_over_bandwidth(self, nbytes: int, rate: float, size: int) -> None:
        link = given_link(rate, world_size=size)
        (one,) = predict([cost(DENSE, 0.0, nbytes)], link, compute_s=0.0, world_size=size)
        assert one.step_s == pytest.approx(8 * one.wire_bytes / rate)
        assert one.wire_bytes == pytest.approx(2 * nbytes * (size - 1) / size)

    @given(st.lists(st.tuples(sizes, seconds), min_size=2, unique_by=lambda point: point[0]), sizes)
    def test_measured_times_lie_between_their_neighbours_or_on_the_last_line(
        self, points: list[tuple[int, float]], nbytes: int
    ) -> None:
        points = sorted(points)
        # what is measured grows, but for noise
        rising = [
            (at, max(took for _, took in points[: i + 1])) for i, (at, _) in enumerate(points)
        ]
        took_s = MeasuredLink(points={"all_gather uint8": rising}).seconds(
            "all_gather uint8", nbytes
        )
        below = [took for at, took in rising if at <= nbytes]
        above = [took for at, took in rising if at >= nbytes]
        assert took_s >= max(below, default=0.0) * (1 - 1e-9)
        assert took_s <= min(above, default=float("inf")) * (1 + 1e-9)

    def test_beyond_the_last_size_time_goes_by_bytes(self) -> None:
        link = MeasuredLink(points={"all_reduce float32": [(100, 1.0), (200, 3.0)]})
        assert link.seconds("all_reduce float32", 300) == 5.0
        assert link.seconds("all_reduce float32", 0) == 1.0

    def test_of_several_collectives_each_has_its_latency_and_bytes_are_added_up(self) -> None:
        link = given_link(8e3, latency_s=0.5)
        traffic = (Traffic("all_gather uint8", 3, 1000),)
        one = MethodCost(method=LOCAL, engine_s=1.0, traffic=traffic)
        (found,) = predict([one], link, compute_s=2.0, world_size=2)
        assert found.link_s == pytest.approx(2.5 / 5)
        assert found.wire_bytes == 200
        assert found.step_s == pytest.approx(3.5)

    @pytest.mark.parametrize(
        ("wrong", "said"),
        [
            ({"bandwidth_bits_per_s": 0.0}, "bandwidth_bits_per_s=0.0: expected"),
            ({"latency_s": -1.0}, "latency_s=-1.0: expected"),
            ({"world_size": 1}, "world_size=1: expected"),
        ],
    )
    def test_a_number_out_of_place_is_named(self, wrong: dict[str, float], said: str) -> None:
        right = {"bandwidth_bits_per_s": 1e9, "latency_s": 0.0, "world_size": 2}
        with pytest.raises(ValueError, match=said):
            GivenLink(**{**right, **wrong})  # type: ignore[arg-type]


def recommended(rate: float, *given_costs: MethodCost, compute_s: float = 0.1) -> Method:
    predictions = predict(given_costs, given_link(rate), compute_s=compute_s, world_size=2)
    return recommend(predictions).prediction.method


class TestRecommendation:
    @given(
        st.integers(10**6, 10**9), st.floats(1e-3, 1.0), st.floats(0.0, 1.0), st.floats(20.0, 500.0)
    )
    def test_it_flips_where_dense_is_five_percent_slower(
        self, nbytes: int, engine_s: float, compute_s: float, ratio: float
    ) -> None:
        sent = int(nbytes / ratio)
        dense, topq = cost(DENSE, 0.0, nbytes), cost(TOPQ, engine_s, sent)
        even = 8 * (nbytes - 1.05 * sent) / (1.05 * (compute_s + engine_s) - compute_s)
        assert recommended(1.01 * even, dense, topq, compute_s=compute_s) is DENSE
        assert recommended(0.99 * even, dense, topq, compute_s=compute_s) is TOPQ

    def test_leave_it_off_says_what_the_fastest_other_takes(self) -> None:
        predictions = predict(
            [cost(DENSE, 0.0, 10**6), cost(TOPQ, 0.05, 10**4)],
            given_link(1e11),
            compute_s=0.1,
            world_size=2,
        )
        reason = recommend(predictions).reason
        assert reason.startswith("leave it off: dense takes 100.1 ms a step, and top-Q q=0.97 int2")

    def test_what_sends_more_is_taken_unless_less_is_a_tenth_faster(self) -> None:
        dense = cost(DENSE, 0.0, 10**8)
        more, less = cost(TOPQ, 0.0, 10**6), cost(SPARSER, 0.0, 10**5)
        assert recommended(1e9, dense, more, less) is TOPQ
        assert recommended(1e7, dense, more, less) is SPARSER

    def test_local_steps_only_where_the_link_is_what_a_step_waits_for(self) -> None:
        dense, topq, local = (cost(DENSE, 0, 10**8), cost(TOPQ, 0.05, 10**6), cost(LOCAL, 0, 10**6))
        # 15 % of the step is the engine's, whatever the link
        assert recommended(1e9, dense, topq, local) is TOPQ
        assert recommended(1e7, dense, topq, local) is LOCAL

    def test_of_two_exchanges_the_faster_one_is_shown(self) -> None:
        gathered = cost(TOPQ, 0.0, 10**6)
        split = MethodCost(
            method=SPLIT, engine_s=0.1, traffic=(Traffic("all_to_all uint8", 2, 2 * 10**5),)
        )
        for rate, method in ((1e10, TOPQ), (1e6, SPLIT)):
            found = predict(
                [gathered, split], given_link(rate, world_size=4), compute_s=0.0, world_size=4
            )
            assert [one.method for one in found] == [method]

    def test_without_another_dense_is_left(self) -> None:
        one = Prediction(method=DENSE, compute_s=0.1, engine_s=0.0, link_s=0.2, wire_bytes=8)
        assert recommend([one]).reason == "leave it off: dense takes 300.0 ms a step"
