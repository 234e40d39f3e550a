# SPDX-License-Identifier: Apache-2.0
"""Runs of equal truth values, for formats that keep a bit for each sector. Pure."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def runs(bits: NDArray[np.bool_]) -> list[tuple[int, int, bool]]:
    """Neighbours that agree as (first, count, value), in order, without gaps."""
    if not len(bits):
        return []
    edges = np.flatnonzero(bits[1:] != bits[:-1]) + 1
    starts = [0, *edges.tolist()]
    ends = [*starts[1:], len(bits)]
    value = bool(bits[0])
    result = []
    for start, end in zip(starts, ends, strict=True):
        result.append((start, end - start, value))
        value = not value
    return result
