# SPDX-License-Identifier: Apache-2.0
"""The search for the regions of a VHDX without a region table, where that is expensive."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

from tests.harness.stores import MemStore
from vhdkit.formats.draft import DraftStore
from vhdkit.formats.vhdx import layout
from vhdkit.formats.vhdx.repair_regions import has_metadata
from vhdkit.units import MIB


class WithoutHoles(DraftStore):
    """The largest possible file, on a file system that does not say where holes are."""

    def size(self) -> int:
        """See `Store.size`."""
        return layout.MAX_FILE_BYTES

    def data_runs(self, offset_bytes: int, size_bytes: int) -> Iterator[tuple[int, int, bool]]:
        """See `Store.data_runs`."""
        yield offset_bytes, size_bytes, True


def test_a_file_that_is_too_large_to_be_searched_takes_no_memory() -> None:
    """Of a file with more data than is searched, the places to search are not even listed."""
    draft = WithoutHoles(MemStore())
    tracemalloc.start()
    try:
        assert not has_metadata(draft)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MIB
