# SPDX-License-Identifier: Apache-2.0
"""Runs of equal truth values."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vhdkit.formats.bits import runs


@given(st.lists(st.booleans(), max_size=200))
def test_runs_are_maximal_and_cover_everything(bits: list[bool]) -> None:
    """Runs follow each other without gaps, alternate, and say what the bits say."""
    found = runs(np.array(bits, dtype=np.bool_))
    assert [value for _, count, value in found for _ in range(count)] == bits
    position = 0
    for first, count, _ in found:
        assert first == position and count > 0
        position += count
    assert all(one[2] != two[2] for one, two in pairwise(found))
