# SPDX-License-Identifier: Apache-2.0
"""Token buckets."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vmm.net.limits import Bucket

MOMENTS = st.lists(st.tuples(st.floats(0, 3), st.integers(0, 50)), max_size=40)


@given(st.integers(1, 1000), st.integers(1, 100), MOMENTS)
def test_never_more_than_burst_and_rate(rate: int, burst: int, moments: list[tuple[float, int]]) -> None:
    """`INV-BUCKET`: what was taken by any moment is at most the burst and what flowed in."""
    bucket, now, taken = Bucket(rate, burst), 100.0, 0
    for pause, count in moments:
        now += pause
        got = bucket.take(count, now)
        assert 0 <= got <= count
        taken += got
        assert taken <= burst + (now - 100.0) * rate + 1e-6


def test_an_idle_bucket_gives_all_that_is_asked() -> None:
    """Below the rate nothing is refused."""
    bucket = Bucket(80, 10)
    assert [bucket.take(10, now / 8) for now in range(20)] == [10] * 20


def test_overdrawn_buckets_say_how_long_to_wait() -> None:
    """Taking more than there is must be waited for, exactly as long as the rate says."""
    bucket = Bucket(1024, 128)
    bucket.overdraw(640, 5.0)
    assert bucket.wait_seconds(5.0) == 0.5
    assert bucket.take(1, 5.25) == 0
    assert bucket.wait_seconds(5.5) == 0.0
    assert bucket.take(128, 5.625) == 128


def test_a_clock_that_stands_still_gives_nothing() -> None:
    """Tokens come from time alone."""
    bucket = Bucket(1000, 5)
    assert bucket.take(50, 1.0) == 5
    assert bucket.take(50, 1.0) == 0
