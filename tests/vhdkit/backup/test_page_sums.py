# SPDX-License-Identifier: Apache-2.0
"""The sum of a range is the one that its description gives, whichever way it is computed."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.vhdkit.backup.test_sums import expected_table
from vhdkit.backup.page_sums import (
    PAGE_BYTES,
    PAGES,
    RANGE_BYTES,
    SUM_BYTES,
    ZERO_SUM,
    sum_of_range,
    sums_of_data,
    sums_of_pages,
)
from vhdkit.backup.sums import HEADER_BYTES

kinds = st.lists(st.sampled_from(["zero", "last", "full"]), min_size=PAGES, max_size=PAGES)


def content(kinds: list[str]) -> bytes:
    """A page for each word: zeros, zeros and a last byte, or any bytes."""
    pages = {
        "zero": bytes(PAGE_BYTES),
        "last": bytes(PAGE_BYTES - 1) + b"x",
        "full": random.Random(1).randbytes(PAGE_BYTES),
    }
    return b"".join(pages[kind] for kind in kinds)


@given(kinds, kinds)
def test_every_way_gives_the_same_sums(one: list[str], other: list[str]) -> None:
    """Whole ranges, a range with the pages that may have data, and pages alone give the sums of the description."""
    data = content(one) + content(other)
    expected = expected_table(data)[HEADER_BYTES:]
    assert sums_of_data(memoryview(data)) == expected
    touched = sum(1 << page for page, kind in enumerate(one) if kind != "zero")
    for pages in (touched, touched | 1, (1 << PAGES) - 1):
        assert sum_of_range(bytearray(data[:RANGE_BYTES]), pages) == expected[:SUM_BYTES]
    kept = [page for page in range(2 * PAGES) if any(data[page * PAGE_BYTES : (page + 1) * PAGE_BYTES])]
    for numbers in (kept, [*range(2 * PAGES)]):
        some = b"".join(data[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] for page in numbers)
        found = dict(sums_of_pages(memoryview(some), np.array(numbers))) if numbers else {}
        assert [found.get(index, ZERO_SUM) for index in range(2)] == [expected[:SUM_BYTES], expected[SUM_BYTES:]]
