# SPDX-License-Identifier: Apache-2.0
"""Space for metadata: a flush must not find the file system full.

Decides which parts of the BAT and of sector bitmaps get space before they change in memory. Must not know what they
contain, nor when they are written.

`INV-FLUSHED-OR-NEWER`: space is reserved only in holes, because where a file system cannot reserve it, zeros are
written; and only for parts of which no page waits for a flush, because the flush may be writing it.
"""

from __future__ import annotations

from vhdkit.store import Store
from vhdkit.units import KIB, round_down

PART_BYTES = 64 * KIB  # structures begin and end on a MiB; a call for each page takes longer


class Reserved:
    """Which metadata of one open image have space in the file. One caller at a time."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._parts: set[int] = set()  # their offsets; those of this session

    def ensure(self, offset_bytes: int) -> None:
        """Reserve space for the part in which this byte lies, once. Raises NoSpace, IoFailed."""
        part = round_down(offset_bytes, PART_BYTES)
        if part not in self._parts:
            self.ensure_now(part, PART_BYTES)
            self._parts.add(part)

    def ensure_now(self, offset_bytes: int, size_bytes: int) -> None:
        """Reserve space for this range, which no flush is writing. Raises NoSpace, IoFailed."""
        for start, size, is_data in list(self._store.data_runs(offset_bytes, size_bytes)):
            if not is_data:
                self._store.reserve(start, size)

    def forget_from(self, offset_bytes: int) -> None:
        """The file is truncated to this size, so later structures there need space again."""
        self._parts = {part for part in self._parts if part < offset_bytes}
