# SPDX-License-Identifier: Apache-2.0
"""A file seen through patches: bytes of it are replaced in memory, and it may have another size.

Decides how a patched file is read, where it has holes, and which writes would turn the file below into the view.
Must not know why it is patched: for a planned repair (`draft`) or to hide an unfinished change (`undo`).

    base      ────────────────────────────┤ its end
    patches      ▓▓▓▓        ░░░░░░░░░░░░░░░░     ▓ bytes, ░ zeros (no memory, whatever the length)
    view      ───▓▓▓▓────────░░░░┤ the view's size

`INV-DRAFT-EXACT`: base + diff() = view. The writes of `diff`, then the view's size, make the base read as the view.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from vhdkit import errors
from vhdkit.store import Buffer, ReadStore
from vhdkit.units import MIB, SECTOR_SIZE, round_down


@dataclass(frozen=True, slots=True)
class Patch:
    """The range [start, stop) of a file, in bytes, and what it holds: `data`, of that length, or zeros for None."""

    start: int
    stop: int
    data: bytes | None

    def part(self, start: int, stop: int) -> Patch:
        """The patch between two offsets, both within it."""
        data = None if self.data is None else self.data[start - self.start : stop - self.start]
        return Patch(start, stop, data)


class Patches:
    """Patches in order, none over another."""

    def __init__(self) -> None:
        self._patches: list[Patch] = []
        self._starts: list[int] = []
        self.held_bytes = 0  # of data in memory

    def lay(self, start: int, stop: int, data: bytes | None) -> None:
        """Put `data`, or zeros for None, over the range, which is not empty; earlier patches stay around it."""
        first, last = self._overlapped(start, stop)
        old = self._patches[first:last]
        new = [Patch(start, stop, data)]
        if old and old[0].start < start:
            new.insert(0, old[0].part(old[0].start, start))
        if old and old[-1].stop > stop:
            new.append(old[-1].part(stop, old[-1].stop))
        self._patches[first:last] = new
        self._starts[first:last] = [one.start for one in new]
        self.held_bytes += _data_bytes(new) - _data_bytes(old)

    def within(self, start: int, stop: int) -> list[Patch]:
        """The patches of a range, cut to it."""
        first, last = self._overlapped(start, stop)
        return [one.part(max(one.start, start), min(one.stop, stop)) for one in self._patches[first:last]]

    def all(self) -> list[Patch]:
        """Every patch, in order."""
        return list(self._patches)

    def _overlapped(self, start: int, stop: int) -> tuple[int, int]:
        """The slice of the patches that share bytes with a range."""
        first = bisect_right(self._starts, start)
        if first and self._patches[first - 1].stop > start:
            first -= 1
        return first, max(first, bisect_left(self._starts, stop))


def _data_bytes(patches: list[Patch]) -> int:
    return sum(len(one.data) for one in patches if one.data is not None)


class PatchedStore:
    """`base` with `patches` over it, and `size_bytes` long. See `store.ReadStore`.

    What lies past the end of the base, and in no patch, reads as zeros. Patches may reach past the view's size,
    which hides them. The base must not change in the meantime.
    """

    def __init__(self, base: ReadStore, size_bytes: int, patches: Patches) -> None:
        self.base = base
        self._size = size_bytes
        self._patches = patches

    @property
    def name(self) -> str:
        """See `ReadStore.name`: that of the file."""
        return self.base.name

    @property
    def identity(self) -> Hashable:
        """See `ReadStore.identity`: that of the file."""
        return self.base.identity

    def size(self) -> int:
        """See `ReadStore.size`."""
        return self._size

    def pread(self, offset_bytes: int, size_bytes: int) -> bytes:
        """See `ReadStore.pread`."""
        buffer = bytearray(max(0, min(size_bytes, self._size - offset_bytes)))
        self.pread_into(offset_bytes, memoryview(buffer))
        return bytes(buffer)

    def pread_into(self, offset_bytes: int, buffer: memoryview) -> None:
        """See `ReadStore.pread_into`."""
        for start, stop, patch in self._pieces(offset_bytes, offset_bytes + len(buffer)):
            piece = buffer[start - offset_bytes : stop - offset_bytes]
            if patch is None:
                self.base.pread_into(start, piece)
            else:
                piece[:] = bytes(stop - start) if patch.data is None else patch.data

    def try_pread_into(self, offset_bytes: int, buffer: memoryview) -> bool:
        """See `ReadStore.try_pread_into`: always False, because such a view is rare and short-lived."""
        return False

    def prefetch(self, offset_bytes: int, size_bytes: int) -> None:
        """See `ReadStore.prefetch`: the part that the base holds."""
        for start, stop, patch in self._pieces(offset_bytes, offset_bytes + size_bytes):
            if patch is None:
                self.base.prefetch(start, stop - start)

    def data_runs(self, offset_bytes: int, size_bytes: int) -> Iterator[tuple[int, int, bool]]:
        """See `ReadStore.data_runs`: patched bytes may hold data."""
        for start, stop, patch in self._pieces(offset_bytes, offset_bytes + size_bytes):
            if patch is None:
                yield from self.base.data_runs(start, stop - start)
            else:
                yield start, stop - start, patch.data is not None

    def close(self) -> None:
        """See `ReadStore.close`."""
        self.base.close()

    def diff(self) -> list[tuple[int, bytes]]:
        """(offset, bytes) of everything to write into the base, in order, not adjacent; then it gets the view's size.

        Only differences are among them. Past a smaller size, they are zeros over the data of the base, so that an undo
        log saves that data. Takes memory in proportion to the result.
        """
        runs: list[tuple[int, bytearray]] = []
        cut_off = Patch(self._size, max(self._size, self.base.size()), None)
        for patch in [*self._patches.within(0, self._size), cut_off]:
            for offset, raw in self._cleared(patch) if patch.data is None else self._changed(patch, patch.data):
                if runs and runs[-1][0] + len(runs[-1][1]) == offset:
                    runs[-1][1].extend(raw)
                else:
                    runs.append((offset, bytearray(raw)))
        return [(offset, bytes(raw)) for offset, raw in runs]

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, Patch | None]]:
        """The range as (start, stop, patch or None for the base) pieces, in order, without gaps, none empty.

        The rest of it, from the end of the view or of the base on, is a patch of zeros.
        """
        inside = max(start, min(stop, self._size))
        shown = max(start, min(inside, self.base.size()))
        position = start
        for patch in [*self._patches.within(start, inside), Patch(inside, stop, None)]:
            if position < min(patch.start, shown):
                yield position, min(patch.start, shown), None
            if max(position, shown) < patch.start:
                yield max(position, shown), patch.start, Patch(max(position, shown), patch.start, None)
            if patch.start < patch.stop:
                yield patch.start, patch.stop, patch
            position = patch.stop

    def _changed(self, patch: Patch, data: bytes) -> Iterator[tuple[int, bytes]]:
        """The sectors of a patch that differ from the base, which counts as zeros past its end."""
        before = self.base.pread(patch.start, len(data)).ljust(len(data), b"\0")
        for place in range(round_down(patch.start, SECTOR_SIZE), patch.stop, SECTOR_SIZE):
            low, high = max(place, patch.start), min(place + SECTOR_SIZE, patch.stop)
            raw = data[low - patch.start : high - patch.start]
            if raw != before[low - patch.start : high - patch.start]:
                yield low, raw

    def _cleared(self, patch: Patch) -> Iterator[tuple[int, bytes]]:
        """Zeros over whatever the base holds in a patch of zeros, in pieces of 1 MiB."""
        stop = min(patch.stop, self.base.size())
        for offset, size, may_hold_data in self.base.data_runs(patch.start, max(stop - patch.start, 0)):
            for position in range(offset, offset + size, MIB) if may_hold_data else ():
                piece = self.base.pread(position, min(MIB, offset + size - position))
                if piece.count(0) != len(piece):
                    yield position, bytes(len(piece))


class ReadOnlyView(PatchedStore):
    """A patched file that an image is opened from: everything that would change it is refused. See `store.Store`."""

    def __init__(self, base: ReadStore, size_bytes: int, patches: Patches, why: str) -> None:
        """`why` follows the name of the file in messages: the reason why it is read-only."""
        super().__init__(base, size_bytes, patches)
        self._why = why

    def punches(self) -> bool:
        """See `Store.punches`."""
        return False

    def pwrite(self, offset_bytes: int, data: Buffer) -> None:
        """Raises ReadOnly, as everything that would change the file does."""
        raise self._refusal()

    def punch(self, offset_bytes: int, size_bytes: int) -> None:
        """Raises ReadOnly."""
        raise self._refusal()

    def reserve(self, offset_bytes: int, size_bytes: int) -> None:
        """Raises ReadOnly."""
        raise self._refusal()

    def copy_from(self, source: ReadStore, source_offset_bytes: int, offset_bytes: int, size_bytes: int) -> None:
        """Raises ReadOnly."""
        raise self._refusal()

    def truncate(self, size_bytes: int) -> None:
        """Raises ReadOnly."""
        raise self._refusal()

    def sync(self) -> None:
        """See `Store.sync`: there is nothing to wait for."""

    def _refusal(self) -> errors.ReadOnly:
        return errors.ReadOnly(self._why, path=self.name)
