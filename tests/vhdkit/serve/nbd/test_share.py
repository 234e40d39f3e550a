# SPDX-License-Identifier: Apache-2.0
"""The share of uncommon work, against a clock by hand."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vhdkit.serve.nbd.share import MOST_REST_NS, REST, Share


@given(st.lists(st.tuples(st.integers(0, 10**7), st.integers(1, MOST_REST_NS // REST)), min_size=1, max_size=50))
def test_slices_take_their_share_at_most(slices: list[tuple[int, int]]) -> None:
    """Whenever a slice may begin, those before it took at most one part in `REST + 1` of the time since the first."""
    share, now, spent = Share(), 0, 0
    for idle, cost in slices:
        now += idle
        now += share.left_ns(now)
        assert spent * (REST + 1) <= now
        now += cost
        spent += cost
        share.charge(now, cost)


def test_a_slice_that_waited_for_a_device() -> None:
    """However long a slice took, the next may begin within a limit."""
    share = Share()
    share.charge(10**12, 10**11)
    assert share.left_ns(10**12) == MOST_REST_NS
    assert share.left_ns(10**12 + MOST_REST_NS) == 0
