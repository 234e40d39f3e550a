# SPDX-License-Identifier: Apache-2.0
"""Ranges that begin or end inside a sector, as reads and writes of whole ones.

Decides how the edges of such a range are read, and written back with what was around them. Must not know locks or
layers: the caller passes the functions that read and write whole sectors, and holds a lock over a change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

from vhdkit.units import SECTOR_SIZE, edges, round_down, round_up, whole_sectors

# Fill a buffer from a sector on. False if it did not, because it would have had to wait.
ReadSectors: TypeAlias = Callable[[int, memoryview], bool | None]
WriteSectors: TypeAlias = Callable[[int, memoryview], object]


def read_parts(read: ReadSectors, offset: int, view: memoryview) -> bool:
    """Read whole sectors into the caller's buffer, the edges through one of a sector; False as soon as `read` is."""
    end, sector = offset + len(view), memoryview(bytearray(SECTOR_SIZE))
    start, stop = round_up(offset, SECTOR_SIZE), round_down(end, SECTOR_SIZE)
    if stop > start and read(start // SECTOR_SIZE, view[start - offset : stop - offset]) is False:
        return False
    for first, last in edges(offset, end, SECTOR_SIZE):
        if read(first // SECTOR_SIZE, sector) is False:
            return False
        skip = first % SECTOR_SIZE
        view[first - offset : last - offset] = sector[skip : skip + last - first]
    return True


def units_at_edges(read: ReadSectors, offset: int, end: int, unit: int) -> dict[int, bytearray] | None:
    """The units of which the range is only a part, by offset; None as soon as `read` is False."""
    units = {}
    for first, _ in edges(offset, end, unit):
        start = round_down(first, unit)
        units[start] = bytearray(unit)
        if read(whole_sectors(start), memoryview(units[start])) is False:
            return None
    return units


def write_parts(
    write: Callable[[int, memoryview], object],
    offset: int,
    view: memoryview,
    units: Mapping[int, bytearray],
    unit: int,
) -> None:
    """Write a range; `units` is what `units_at_edges` found, and is changed."""
    end = offset + len(view)
    for first, last in edges(offset, end, unit):
        whole, skip = units[first - first % unit], first % unit
        whole[skip : skip + last - first] = view[first - offset : last - offset]
        write(whole_sectors(first - skip), memoryview(whole))
    inner_start, inner_end = round_up(offset, unit), round_down(end, unit)
    if inner_end > inner_start:
        write(whole_sectors(inner_start), view[inner_start - offset : inner_end - offset])
