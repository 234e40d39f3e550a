# SPDX-License-Identifier: Apache-2.0
"""Token buckets."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vmm.net.limits import Bucket

MOMENTS = st.lists(st.tuples(st.floats(0, 3), st.integers(0, 50)), max_size=40)


@given(st.integers(1, 1000), st.integers(1, 100), MOMENTS)
def test_never_more_than_burst_and_rate(rate: int, burst: int, moments: list[tuple[float, int]]) -> None:
    """`INV-BUCKET`: the tokens taken by any moment are at most the burst plus what flowed in."""
    bucket, now, taken = Bucket(rate, burst), 100.0, 0
    for pause, count in moments:
        now += pause
        got = bucket.take(count, now)
        assert 0 <= got <= count
        taken += got
        assert taken <= burst + (now - 100.0) * rate + 1e-6


def test_a_bucket_refuses_nothing_below_its_rate() -> None:
    """Requests below the rate are never refused."""
    bucket = Bucket(80, 10)
    assert [bucket.take(10, now / 8) for now in range(20)] == [10] * 20


def test_an_overdrawn_bucket_says_how_long_to_wait() -> None:
    """The wait after taking more than there is follows exactly from the rate."""
    bucket = Bucket(1024, 128)
    bucket.overdraw(640, 5.0)
    assert bucket.wait_seconds(5.0) == 0.5
    assert bucket.take(1, 5.25) == 0
    assert bucket.wait_seconds(5.5) == 0.0
    assert bucket.take(128, 5.625) == 128


def test_a_stopped_clock_gives_no_tokens() -> None:
    """Tokens come only with time."""
    bucket = Bucket(1000, 5)
    assert bucket.take(50, 1.0) == 5
    assert bucket.take(50, 1.0) == 0
