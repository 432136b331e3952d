# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""The rule by which a map sizes its batches: pure, so explored rather than measured."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from jobserver._pace import _GROWTH, _ROUNDS, LONG, MOST, SHORT, TARGET, Pace

seconds = st.floats(0, 1e4, allow_nan=False)
counts = st.integers(1, 2 * MOST)


@st.composite
def endings(draw: st.DrawFn) -> tuple[int, int, float]:
    """What a batch may have been: calls given, calls made, seconds."""
    given_ = draw(counts)
    return given_, draw(st.integers(0, given_)), draw(seconds)


@given(
    st.lists(endings()),
    st.one_of(st.none(), st.integers(0, 10**9)),
    st.integers(1, 5000),
)
def test_sizes_are_bounded(
    noted: list[tuple[int, int, float]], left: int | None, slots: int
) -> None:
    """Whatever was noted, a batch has at least one call, and at most its share of what is left."""
    pace = Pace()
    for ending in noted:
        pace.note(*ending)

        assert 1 <= pace.size <= MOST
        size = pace.next(left, slots)
        assert 1 <= size <= pace.size
        assert left is None or size == 1 or size * _ROUNDS * slots <= left


@given(st.lists(endings()), endings())
def test_steps_follow_the_evidence(
    noted: list[tuple[int, int, float]], last: tuple[int, int, float]
) -> None:
    """A batch that was short lets the size grow, a long one lets it shrink, others leave it."""
    pace = Pace()
    for ending in noted:
        pace.note(*ending)
    before = pace.size

    pace.note(*last)

    given_, done, lasted = last
    if pace.size > before:
        assert done == given_
        assert lasted < SHORT
        assert pace.size <= _GROWTH * done
        assert pace.size * lasted <= TARGET * done * 1.0001
    if pace.size < before:
        assert done < given_ or lasted > LONG
        assert pace.size == 1 or pace.size * lasted <= TARGET * done * 1.0001


@given(st.floats(0, 100, allow_nan=False))
def test_a_steady_rate_is_met(cost: float) -> None:
    """With calls that last as long, batches soon last from SHORT to TARGET, as far as can be."""
    pace = Pace()
    for _ in range(20):
        size = pace.next(None, 1)
        pace.note(size, size, size * cost)

    assert pace.size == 1 or pace.size * cost <= TARGET * 1.0001
    assert pace.size == MOST or (pace.size + 1) * cost >= SHORT / _GROWTH
    assert pace.size * cost >= SHORT or pace.size == MOST or (pace.size + 1) * cost > TARGET * 0.9


@given(st.floats(1e-7, 1e-3), st.floats(0.01, 50))
def test_a_slower_rate_is_noticed(cheap: float, dear: float) -> None:
    """When calls become slow, a batch that gives the rest back says so, and the next are short."""
    pace = Pace()
    for _ in range(20):
        pace.note(pace.size, pace.size, pace.size * cheap)
    for _ in range(20):
        made = min(pace.size, max(1, int(2 * TARGET / dear) + 1))
        pace.note(pace.size, made, made * dear)

    assert pace.size == 1 or pace.size * dear <= 2 * TARGET + dear


@given(st.integers(1, 10**5), st.integers(1, 64), st.integers(1, MOST))
def test_the_last_batches_are_small(count: int, slots: int, size: int) -> None:
    """When the work runs out, what is handed out last to each slot is a single call."""
    pace = Pace()
    pace.size = size
    left, given_ = count, []
    while left:
        given_.append(pace.next(left, slots))
        left -= given_[-1]

    assert sum(given_) == count
    assert given_[-min(slots, len(given_)) :] == [1] * min(slots, len(given_))
    assert given_ == sorted(given_, reverse=True)
