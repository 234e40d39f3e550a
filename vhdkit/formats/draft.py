# SPDX-License-Identifier: Apache-2.0
"""A file with changes that have not been written yet: what a repair would write.

Decides how a change becomes a patch, and how much of a file a draft may change. Must not know images. Code that
repairs a store repairs a draft instead. The result is examined, and then its `diff` is written into the file as one
change, or discarded. `patched` decides how it reads.
"""

from __future__ import annotations

from vhdkit import errors
from vhdkit.formats.patched import PatchedStore, Patches
from vhdkit.store import Buffer, ReadStore, copy_bytes
from vhdkit.units import KIB, MIB, SECTOR_SIZE, round_down, round_up

MAX_DRAFT_BYTES = 48 * MIB  # of changed sectors in memory: the largest BAT is 16 MiB
_MAX_SIZE = 1 << 62
_PATCH_BYTES = 4 * KIB  # the longest patch of data: one that is partly overwritten later is copied


class DraftStore(PatchedStore):
    """`base` with pending changes: a `store.Store`. Changed sectors are held in memory; the base is only read."""

    def __init__(self, base: ReadStore) -> None:
        super().__init__(base, base.size(), Patches())

    def punches(self) -> bool:
        """See `Store.punches`."""
        return False

    def pwrite(self, offset_bytes: int, data: Buffer) -> None:
        """See `Store.pwrite`. Raises InvalidArgument when the draft becomes too large."""
        if not len(data):
            return
        end = offset_bytes + len(data)
        self._refuse_size(end)
        size = max(self._size, end)
        start, stop = round_down(offset_bytes, SECTOR_SIZE), min(round_up(end, SECTOR_SIZE), size)
        known = sum(one.stop - one.start for one in self._patches.within(start, stop) if one.data is not None)
        if self._patches.held_bytes + (stop - start) - known > MAX_DRAFT_BYTES:
            raise errors.InvalidArgument("too much would have to change at once", path=self.name)
        raw = bytearray(stop - start)
        self.pread_into(start, memoryview(raw))
        raw[offset_bytes - start : end - start] = bytes(data)
        position = start
        while position < stop:
            after = min(round_down(position, _PATCH_BYTES) + _PATCH_BYTES, stop)
            self._patches.lay(position, after, bytes(raw[position - start : after - start]))
            position = after
        self._size = size

    def _refuse_size(self, size_bytes: int) -> None:
        if size_bytes > _MAX_SIZE:
            raise errors.NoSpace("the file would become too long", path=self.name)

    def punch(self, offset_bytes: int, size_bytes: int) -> None:
        """See `Store.punch`: writes zeros over everything that is not zero yet."""
        size_bytes = min(size_bytes, self._size - offset_bytes)
        for offset, size, is_data in list(self.data_runs(offset_bytes, max(size_bytes, 0))):
            for position in range(offset, offset + size, MIB) if is_data else ():
                piece = self.pread(position, min(MIB, offset + size - position))
                if piece.count(0) != len(piece):
                    self.pwrite(position, bytes(len(piece)))

    def reserve(self, offset_bytes: int, size_bytes: int) -> None:
        """See `Store.reserve`: only the size changes."""
        if size_bytes > 0:
            self._refuse_size(offset_bytes + size_bytes)
            self._size = max(self._size, offset_bytes + size_bytes)

    def copy_from(self, source: ReadStore, source_offset_bytes: int, offset_bytes: int, size_bytes: int) -> None:
        """See `Store.copy_from`."""
        copy_bytes(source, source_offset_bytes, self, offset_bytes, size_bytes)

    def truncate(self, size_bytes: int) -> None:
        """See `Store.truncate`. When the draft grows again, what was cut off reads as zeros."""
        self._refuse_size(size_bytes)
        if size_bytes < self._size:
            self._patches.lay(size_bytes, self._size, None)
        self._size = size_bytes

    def sync(self) -> None:
        """See `Store.sync`: there is nothing to wait for."""

    def close(self) -> None:
        """See `Store.close`: the base stays open, because the draft does not own it."""
