# SPDX-License-Identifier: Apache-2.0
"""A layer whose sectors lie one after the other from byte 0 of its file: the body of raw and fixed images.

Decides nothing about headers and footers; it only refuses to touch anything after the virtual size. Its format passes
it the image's facts.
It owns every sector, so it can only be the base of a chain.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from vhdkit.errors import CorruptImage
from vhdkit.finding import Finding
from vhdkit.formats.guard import SyncGuard
from vhdkit.image import Extent, ExtentKind, ImageFacts, Piece, copy_piece
from vhdkit.store import Store
from vhdkit.units import SECTOR_SIZE, covering_sectors, sectors_to_bytes


class LinearImage:
    """See `image.Layer`."""

    unowned = ExtentKind.ZERO
    block_size_bytes = 0
    sector_bytes = SECTOR_SIZE
    ignore_bitmaps = False
    table_bytes = 0
    damage: CorruptImage | None = None

    def __init__(self, store: Store, facts: ImageFacts, *, writable: bool) -> None:
        self.store = store
        self.facts = facts
        self.format_name = facts.format_name
        self.unique_id = facts.linkage_id
        self.size_bytes = facts.size_bytes
        self.data_end_bytes = facts.size_bytes
        self.writable = writable
        self.findings: list[Finding] = []
        self._guard = SyncGuard(store)

    def allocated_blocks(self) -> NDArray[np.bool_]:
        """See `Layer.allocated_blocks`."""
        return np.zeros(0, dtype=np.bool_)

    def zero_blocks(self) -> NDArray[np.bool_]:
        """See `Layer.zero_blocks`: there are none."""
        return np.zeros(0, dtype=np.bool_)

    def block_offset(self, block_index: int) -> int:
        """See `Layer.block_offset`: the whole image is one block."""
        assert block_index == 0
        return 0

    def owned_sectors(self, block_index: int) -> NDArray[np.bool_] | None:
        """See `Layer.owned_sectors`."""
        return None

    def prefetch_ownership(self, block_index: int) -> None:
        """See `Layer.prefetch_ownership`: nothing has to be read."""

    def extents(self, sector_index: int, sector_count: int) -> Iterator[Extent]:
        """See `Layer.extents`: holes of the file are ZERO."""
        position, end = sector_index, sector_index + sector_count
        for offset, size, is_data in self.store.data_runs(*_byte_range(sector_index, sector_count)):
            # Holes begin and end at any byte; a sector with any data in it is data.
            stop = offset + size
            stop_sector = min(covering_sectors(stop) if is_data else stop // SECTOR_SIZE, end)
            if stop_sector > position:
                kind = ExtentKind.DATA if is_data else ExtentKind.ZERO
                where = sectors_to_bytes(position) if is_data else None
                yield Extent(position, stop_sector - position, kind, 0, where)
                position = stop_sector

    def write(self, sector_index: int, data: memoryview) -> bool:
        """See `Layer.write`: always in place."""
        self._guard.check()
        offset = sectors_to_bytes(sector_index)
        assert self.writable and offset + len(data) <= self.size_bytes
        self.store.pwrite(offset, data)
        return False

    def write_in_place(self, store_offset_bytes: int, data: memoryview) -> None:
        """See `Layer.write_in_place`."""
        self._guard.check()
        assert self.writable and store_offset_bytes + len(data) <= self.size_bytes
        self.store.pwrite(store_offset_bytes, data)

    def write_zeroes(self, sector_index: int, sector_count: int) -> bool:
        """See `Layer.write_zeroes`: a hole in the file."""
        self._guard.check()
        offset, size = _byte_range(sector_index, sector_count)
        assert self.writable and offset + size <= self.size_bytes
        self.store.punch(offset, size)
        return False

    def refuse_writing(self) -> None:
        """See `Layer.refuse_writing`."""
        self._guard.refuse()

    def pin_blocks(self) -> None:
        """See `Layer.pin_blocks`: nothing ever moves."""

    def leave_table(self) -> None:
        """See `Layer.leave_table`: there is none."""

    def copy_in(self, pieces: Sequence[Piece]) -> None:
        """See `Layer.copy_in`: in place, zeros as holes."""
        self._guard.check()
        for piece in pieces:
            offset, size = _byte_range(piece.sector_index, piece.sector_count)
            assert self.writable and offset + size <= self.size_bytes
            if piece.source is None:
                self.store.punch(offset, size)
            else:
                copy_piece(piece, self.store, offset)

    def trim(self, sector_index: int, sector_count: int) -> None:
        """See `Layer.trim`."""
        self.write_zeroes(sector_index, sector_count)

    def flush_is_due(self) -> bool:
        """See `Layer.flush_is_due`: no metadata waits for one."""
        return False

    def flush(self) -> None:
        """See `Layer.flush`."""
        if self.writable:
            self._guard.sync()

    def seal(self) -> None:
        """See `Layer.seal`."""
        self.flush()

    def close(self) -> None:
        """See `Layer.close`."""
        try:
            if self.writable:
                self._guard.finish(self._guard.sync)
        finally:
            self.store.close()


def _byte_range(sector_index: int, sector_count: int) -> tuple[int, int]:
    return sectors_to_bytes(sector_index), sectors_to_bytes(sector_count)
