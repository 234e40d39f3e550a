# SPDX-License-Identifier: Apache-2.0
"""Ranges with parts of sectors, against plain slices of bytes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vhdkit.parts import read_parts, units_at_edges, write_parts
from vhdkit.units import SECTOR_SIZE

SIZE = 16 * SECTOR_SIZE


class Sectors:
    """Bytes that are read and written in whole sectors, some of which cannot be read at once."""

    def __init__(self, absent: int = -1) -> None:
        self.content = bytearray(index * 7 % 251 for index in range(SIZE))
        self.absent = absent
        self.writes = 0

    def read(self, sector: int, room: memoryview) -> bool:
        """As `Chain.try_read_into`."""
        assert len(room) % SECTOR_SIZE == 0
        if sector <= self.absent < sector + len(room) // SECTOR_SIZE:
            return False
        room[:] = self.content[sector * SECTOR_SIZE : sector * SECTOR_SIZE + len(room)]
        return True

    def write(self, sector: int, data: memoryview) -> None:
        """As `Chain.write`."""
        assert len(data) and len(data) % SECTOR_SIZE == 0
        self.writes += 1
        self.content[sector * SECTOR_SIZE : sector * SECTOR_SIZE + len(data)] = data


@given(
    st.integers(0, SIZE), st.integers(0, SIZE), st.sampled_from([SECTOR_SIZE, 8 * SECTOR_SIZE]), st.integers(-1, 15)
)
def test_ranges(one: int, other: int, unit: int, absent: int) -> None:
    """A range is read and written as it would be in plain bytes; if what is needed for it cannot be read, False is
    returned, and nothing was written."""
    offset, end = sorted((one, other))
    sectors = Sectors(absent)
    model, data = bytes(sectors.content), bytes(255 - index % 250 for index in range(end - offset))
    room = memoryview(bytearray(end - offset))
    touched = range(offset // SECTOR_SIZE, -(-end // SECTOR_SIZE)) if end > offset else range(0)
    assert read_parts(sectors.read, offset, room) is (absent not in touched)
    if absent not in touched:
        assert bytes(room) == model[offset:end]
    units = units_at_edges(sectors.read, offset, end, unit)
    if units is not None:
        write_parts(sectors.write, offset, memoryview(data), units, unit)
        assert sectors.content == model[:offset] + data + model[end:]
    else:
        assert absent >= 0 and sectors.writes == 0 and sectors.content == model
    partial = {start // unit for start in (offset, end) if start % unit and end > offset}
    assert (units is None) is (absent >= 0 and absent * SECTOR_SIZE // unit in partial)
