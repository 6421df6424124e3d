"""q's policies: what they say, what is refused, and what a compressor makes of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from topq_dist import QByLoss, QByTensor, QSchedule
from topq_dist.compress.codec.frame import decode_frame
from topq_dist.compress.compressor import TopKCompressor
from topq_dist.compress.layout import ChunkedVector, Layout
from topq_dist.compress.planned_segments import PlannedSegments
from topq_dist.compress.sparsify.by_loss import SegmentsByLoss
from topq_dist.compress.sparsify.segments import Segment, Segments
from topq_dist.q_policies import check_q

SHAPES = {"embed.weight": (50, 20), "norm.weight": (20,), "head.weight": (20, 30), "head.bias": ()}
NAMES = tuple(SHAPES)
LAYOUT = Layout(names=NAMES, shapes=tuple(SHAPES.values()))


def ks(planned: PlannedSegments) -> list[int]:
    return [segment.k for segment in planned.of(NAMES)]


def test_a_schedule_goes_from_start_to_end() -> None:
    exponential = QSchedule(start=0.75, end=0.999, steps=4)
    assert [round(exponential.at(step), 4) for step in (0, 1, 2, 3, 4, 400)] == [
        0.75,
        *[round(1 - 0.25 * 0.004 ** (step / 4), 4) for step in (1, 2, 3)],
        0.999,
        0.999,
    ]
    linear = QSchedule(start=0.5, end=1.0, steps=2, shape="linear")
    assert [linear.at(step) for step in range(4)] == [0.5, 0.75, 1.0, 1.0]
    constant = QSchedule(start=0.0, end=0.9, steps=3, shape="constant")
    assert [constant.at(step) for step in range(5)] == [0.0, 0.0, 0.0, 0.9, 0.9]


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: QSchedule(start=1.5, end=0.9, steps=3), ValueError, r"start=1.5: .* \[0, 1\]"),
        (lambda: QSchedule(start=0.5, end=True, steps=3), TypeError, "end=True"),
        (lambda: QSchedule(start=0.5, end=0.9, steps=0), ValueError, "steps=0"),
        (lambda: QSchedule(start=0.5, end=0.9, steps=2.0), TypeError, "steps=2.0"),  # type: ignore[arg-type]
        (lambda: QSchedule(start=0.5, end=1.0, steps=3), ValueError, "end=1.0 with shape='exp"),
        (
            lambda: QSchedule(start=0.5, end=0.9, steps=3, shape="cosine"),  # type: ignore[arg-type]
            ValueError,
            "shape='cosine': expected one of exponential, linear, constant",
        ),
        (lambda: QByTensor(q=2.0), ValueError, "q=2.0"),
        (lambda: QByTensor(q=0.9, patterns={"*": 3}), ValueError, r"patterns\['\*'\]=3"),
        (lambda: QByTensor(q=0.9, patterns=["*"]), TypeError, "expected a dict"),  # type: ignore[arg-type]
        (lambda: QByTensor(q=0.9, patterns={1: 0.5}), TypeError, "patterns has 1"),  # type: ignore[dict-item]
        (lambda: QByTensor(q=0.9, whole_below=-1), ValueError, "whole_below=-1"),
        (lambda: QByTensor(q=0.9, whole_vectors=1), TypeError, "whole_vectors=1"),  # type: ignore[arg-type]
        (lambda: QByLoss(budget_bytes=10), ValueError, "expected one of the two"),
        (lambda: QByLoss(energy=0.5, residual=1.0, budget_bytes=9), ValueError, "one of the two"),
        (lambda: QByLoss(energy=0.0, budget_bytes=10), ValueError, r"energy=0.0: .*\(0, 1\]"),
        (lambda: QByLoss(residual=-1.0, budget_bytes=10), ValueError, "residual=-1.0"),
        (lambda: QByLoss(energy=0.5, budget_bytes=0), ValueError, "budget_bytes=0"),
        (lambda: QByLoss(energy=0.5, budget_bytes=1e6), TypeError, "budget_bytes=1000000.0"),  # type: ignore[arg-type]
        (lambda: check_q("half"), TypeError, "q='half': .* a QSchedule, a QByTensor or a QByLoss"),
        (lambda: check_q(QSchedule), TypeError, "expected a number"),
        (lambda: check_q(1.1), ValueError, "q=1.1"),
        (
            lambda: PlannedSegments(QByTensor(q=0.9, patterns={"body*": 0.5}), "parameter", SHAPES),
            ValueError,
            r"'body\*', which fits no parameter: .* such as embed.weight",
        ),
        (lambda: PlannedSegments(QByTensor(q=0.9), "bucket", SHAPES), ValueError, "scope='bucket'"),
        (
            lambda: PlannedSegments(QByLoss(energy=0.5, budget_bytes=99), "parameter", SHAPES),
            ValueError,
            "budget_bytes=99: expected .* at least, for one element of each of 4 tensors",
        ),
    ],
)
def test_what_is_no_policy_is_named(make: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make()


def test_numbers_are_as_they_were() -> None:
    planned = PlannedSegments(0.9, "parameter", SHAPES)
    assert ks(planned) == [100, 2, 60, 1]
    assert planned.settings() == "q=0.9 scope=parameter"
    assert planned.sent_fraction() == pytest.approx(0.1)
    assert planned.state_dict() == {"q": 0.9}
    planned.q = np.float32(0.5)  # type: ignore[assignment]
    assert ks(planned) == [500, 10, 300, 1]
    assert [segment.k for segment in PlannedSegments(0.9, "bucket", SHAPES).of(NAMES)] == [162]


def test_a_schedule_is_followed_and_goes_on() -> None:
    schedule = QSchedule(start=0.5, end=0.9, steps=4, shape="linear")
    planned, seen = PlannedSegments(schedule, "parameter", SHAPES), []
    for _ in range(6):
        seen.append((ks(planned)[0], round(planned.sent_fraction(), 3), planned.settings()))
        planned.step += 1
    assert [(k, sent) for k, sent, _ in seen] == [
        *[(500, 0.5), (400, 0.4), (300, 0.3), (200, 0.2), (100, 0.1), (100, 0.1)]
    ]
    assert len({settings for _, _, settings in seen}) == 6
    again = PlannedSegments(schedule, "parameter", SHAPES)
    again.load_state_dict(planned.state_dict())
    assert again.step == 6
    for other in (0.9, QSchedule(start=0.5, end=0.9, steps=5, shape="linear")):
        wrong = PlannedSegments(other, "parameter", SHAPES)
        with pytest.raises(ValueError, match=r"state is of q=QSchedule.* pass q=QSchedule"):
            wrong.load_state_dict(planned.state_dict())
        with pytest.raises(ValueError, match="state is of q="):
            again.load_state_dict(wrong.state_dict())
        assert (wrong.step, again.step) == (0, 6)
    for step in (None, -1, True, "2"):
        with pytest.raises(ValueError, match="state has step="):
            again.load_state_dict({**planned.state_dict(), "step": step})


def test_tensors_have_a_q_of_their_own() -> None:
    warm = QSchedule(start=0.5, end=0.95, steps=1)
    policy = QByTensor(q=0.9, patterns={"emb*": warm, "head.b*": 1.0}, whole_below=21)
    planned = PlannedSegments(policy, "parameter", SHAPES)
    assert ks(planned) == [500, 20, 60, 0]
    assert planned.sent_fraction() == pytest.approx((500 + 20 + 60) / 1621)
    planned.step = 1
    assert ks(planned) == [50, 20, 60, 0]
    assert [s.k for s in planned.of(NAMES, (False, True, False, False))] == [50, 0, 60, 0]
    vectors = PlannedSegments(QByTensor(q=0.9, whole_vectors=True), "parameter", SHAPES)
    assert ks(vectors) == [100, 20, 60, 1]
    # the first pattern that fits counts
    first = QByTensor(q=0.9, patterns={"*.weight": 0.5, "head*": 0.0})
    assert ks(PlannedSegments(first, "parameter", SHAPES)) == [500, 10, 300, 1]


def gradients(seed: int, *, tail: float = 3.0) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    return torch.from_numpy(generator.standard_t(tail, LAYOUT.numel).astype(np.float32))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 99),
    energy=st.one_of(st.none(), st.floats(0.01, 1.0)),
    residual=st.floats(0.05, 3.0),
    with_residual=st.booleans(),
)
def test_as_few_as_the_loss_allows(
    seed: int, energy: float | None, residual: float, with_residual: bool
) -> None:
    policy = QByLoss(
        energy=energy, residual=None if energy is not None else residual, budget_bytes=100_000
    )
    planned = PlannedSegments(policy, "parameter", SHAPES, "fp32")
    assert planned.sent_fraction() > 0.95
    decay = 0.5 if seed % 2 else 1.0
    compressor = TopKCompressor(value_format="fp32", error_feedback=True, residual_decay=decay)
    if with_residual:
        first = compressor.compress(gradients(seed + 1), LAYOUT, planned.of(NAMES))
        compressor.residuals.apply(first.update)
    gradient = gradients(seed)
    held = compressor.residuals.flat(LAYOUT, dtype=torch.float32, device=gradient.device)
    total = (gradient + held * decay).double()
    made = compressor.compress(gradient, LAYOUT, planned.of(NAMES))
    frame = decode_frame(made.frames[0], numel=LAYOUT.numel)
    for where, segment in zip(LAYOUT.slices(), planned.of(NAMES), strict=True):
        mine = (frame.indices >= where.start) & (frame.indices < where.stop)
        squares = total[where].square().sort(descending=True).values
        alone = float(gradient[where].double().square().sum())
        needed = policy.needed(float(squares.sum()), alone)
        sums = squares.cumsum(0)
        # sums are rounded: where all is asked for, the last few add less than that
        fewest, most_needed = (
            max(min(int((sums < needed * share).sum()) + 1, segment.k), 1)
            for share in (1 - 1e-9, 1 + 1e-9)
        )
        assert fewest <= int(mine.sum()) <= most_needed
        sent = frame.values[mine].double().square().sum()
        most = squares[: int(mine.sum())].sum()
        assert float(sent) == pytest.approx(float(most), rel=1e-6)


@pytest.mark.parametrize("value_format", ["fp32", "fp16", "int2", "ec2", "ec1", "ecfp16", "ecbf16"])
@pytest.mark.parametrize("budget_bytes", [700, 1_500, 4_000])
def test_no_step_takes_more_than_its_budget(value_format: str, budget_bytes: int) -> None:
    policy = QByLoss(energy=1.0, budget_bytes=budget_bytes)
    planned = PlannedSegments(policy, "parameter", SHAPES, value_format)
    # of 1,621 values all fit the others
    fits = budget_bytes == 4_000 or value_format in ("int2", "ec2", "ec1")
    sends_all = fits and budget_bytes > 700 and value_format != "fp32"
    assert 0.0 < planned.sent_fraction() <= 1.0
    assert (planned.sent_fraction() == 1.0) == sends_all
    compressor = TopKCompressor(value_format=value_format, error_feedback=True)
    alone = [Layout(names=(name,), shapes=(shape,)) for name, shape in SHAPES.items()]
    for step in range(3):
        gradient = gradients(step)
        whole = compressor.compress(gradient, LAYOUT, planned.of(NAMES))
        assert whole.frames[0].numel() <= budget_bytes
        # as many buckets as there are tensors
        apart = [
            TopKCompressor(value_format=value_format, error_feedback=False).compress(
                gradient[where].clone(), layout, planned.of(layout.names)
            )
            for where, layout in zip(LAYOUT.slices(), alone, strict=True)
        ]
        assert sum(made.frames[0].numel() for made in apart) <= budget_bytes
        compressor.residuals.apply(whole.update)


@pytest.mark.parametrize("value_format", ["fp32", "fp16", "int2", "ec2", "ecfp16"])
@pytest.mark.parametrize(
    "shapes",
    [
        {"a": ()},
        {"a": (1,), "b": (), "c": (0,)},
        {"a": (2,), "b": ()},
        {"a": (4,)},
        {"a": (1_000,), "b": (10,)},
        SHAPES,
    ],
)
def test_everything_is_sent_where_the_budget_has_room(
    value_format: str, shapes: dict[str, tuple[int, ...]]
) -> None:
    policy = QByLoss(energy=1.0, budget_bytes=10**6)
    planned = PlannedSegments(policy, "parameter", shapes, value_format)
    numels = [math.prod(shape) for shape in shapes.values()]
    assert [segment.k for segment in planned.of(tuple(shapes))] == numels
    assert planned.sent_fraction() == 1.0


@pytest.mark.parametrize("left_out", [0, 1, 40])
@pytest.mark.parametrize("numels", [(4_000,), (3_000, 1, 1, 700)])
def test_what_needs_all_but_a_few_stays_within_a_budget_for_all(
    numels: tuple[int, ...], left_out: int
) -> None:
    shapes = {f"w{place}": (numel,) for place, numel in enumerate(numels)}
    layout = Layout(names=tuple(shapes), shapes=tuple(shapes.values()))
    # a little more than all of them take, whose indices are in no frame
    budget = 4 * layout.numel + 64 * len(numels) + 100
    gradient = torch.ones(layout.numel)
    gradient[:left_out] = 0.0
    policy = QByLoss(energy=1.0, budget_bytes=budget)
    planned = PlannedSegments(policy, "parameter", shapes, "fp32")
    compressor = TopKCompressor(value_format="fp32", error_feedback=False)
    (frame,) = compressor.compress(gradient, layout, planned.of(layout.names)).frames
    assert 0 < frame.numel() <= budget


def test_what_is_not_asked_for_is_cut_by_no_policy() -> None:
    segments = SegmentsByLoss(
        [Segment(start=0, rows=1, row_numel=4, k=0), Segment(start=4, rows=1, row_numel=3, k=2)],
        QByLoss(energy=0.5, budget_bytes=1),
    )
    compressor = TopKCompressor(value_format="fp32", error_feedback=False)
    layout = Layout(names=("a", "b"), shapes=((4,), (3,)))
    chunks = ChunkedVector([torch.arange(4.0), torch.tensor([1.0, -5.0, 2.0])])
    (frame,) = compressor.compress(chunks, layout, segments).frames
    assert decode_frame(frame, numel=7).indices.tolist() == [5]
    zeros = ChunkedVector([torch.zeros(4), torch.zeros(3)])
    (frame,) = compressor.compress(zeros, layout, segments).frames
    assert decode_frame(frame, numel=7).indices.tolist() == [4]
    nothing = segments.without([False, True])
    assert [segment.k for segment in nothing] == [0, 0]
    (frame,) = compressor.compress(chunks, layout, nothing).frames
    assert decode_frame(frame, numel=7).values.numel() == 0
    bad = ChunkedVector([torch.zeros(4), torch.tensor([1.0, math.nan, 0.0])])
    assert not decode_frame(compressor.compress(bad, layout, segments).frames[0], numel=7).finite
    plain = Segments(segments)
    assert (
        decode_frame(compressor.compress(chunks, layout, plain).frames[0], numel=7).values.numel()
        == 2
    )
