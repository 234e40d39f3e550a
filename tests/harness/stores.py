# SPDX-License-Identifier: Apache-2.0
"""Stores in memory: sparse (`MemStore`), with power that can be cut (`CrashStore`), with faults (`FaultyStore`).

All three are `vhdkit.store.Store`s. Bytes are kept as whole sectors in a dict, so a hole of any size costs nothing.

What `CrashStore` assumes of a device is exactly what DESIGN.md requires of it: a sector is written
completely or not at all; nothing else is certain until a sync returns. Any subset of the unsynced sectors may be there
after a cut, in any order, an older version of one beside the newest of another, and the file may be as long as
it was at the last sync, or now, or anything in between. One assumption is worse than required: a footer in flight may
be torn, because two footers exist for that case.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field

from vhdkit import errors
from vhdkit.formats.vhd.footers import footer_state
from vhdkit.store import Buffer, ReadStore
from vhdkit.units import MIB, SECTOR_SIZE, covering_sectors, round_up

_LONG_RANGE = 64 * MIB
ZERO_SECTOR = bytes(SECTOR_SIZE)


class MemStore:
    """A sparse file in memory. A write to a frozen one fails the test."""

    def __init__(
        self,
        name: str = "memory.vhd",
        *,
        sectors: dict[int, bytes] | None = None,
        size_bytes: int = 0,
        frozen: bool = False,
    ) -> None:
        self.name = name
        self.frozen = frozen
        self._sectors: dict[int, bytes] = {} if sectors is None else sectors
        self._size = size_bytes

    def copy(self, *, frozen: bool = False) -> MemStore:
        """The current content in a separate store."""
        return MemStore(self.name, sectors=dict(self._sectors), size_bytes=self._size, frozen=frozen)

    def contents(self) -> bytes:
        """All the bytes, for small stores."""
        return self.pread(0, self._size)

    def allocated_bytes(self) -> int:
        """The bytes in sectors that are not zeros."""
        return len(self._sectors) * SECTOR_SIZE

    # -- the Store protocol -------------------------------------------------------------------------------------

    @property
    def identity(self) -> Hashable:
        """See `ReadStore.identity`: each store counts as a separate file."""
        return id(self)

    def size(self) -> int:
        """See `ReadStore.size`."""
        return self._size

    def pread(self, offset_bytes: int, size_bytes: int) -> bytes:
        """See `ReadStore.pread`."""
        assert offset_bytes >= 0 and size_bytes >= 0
        return self._load(offset_bytes, max(0, min(size_bytes, self._size - offset_bytes)))

    def pread_into(self, offset_bytes: int, buffer: memoryview) -> None:
        """See `ReadStore.pread_into`."""
        assert offset_bytes >= 0
        buffer[:] = self._load(offset_bytes, len(buffer))

    def try_pread_into(self, offset_bytes: int, buffer: memoryview) -> bool:
        """See `ReadStore.try_pread_into`: memory never waits."""
        self.pread_into(offset_bytes, buffer)
        return True

    def prefetch(self, offset_bytes: int, size_bytes: int) -> None:
        """See `ReadStore.prefetch`: everything is in memory."""

    def pwrite(self, offset_bytes: int, data: Buffer) -> None:
        """See `Store.pwrite`."""
        self._change(offset_bytes, bytes(data))
        if len(data):
            self._resize(max(self._size, offset_bytes + len(data)))

    def punch(self, offset_bytes: int, size_bytes: int) -> None:
        """See `Store.punch`."""
        size_bytes = min(size_bytes, self._size - offset_bytes)
        if size_bytes > 0:
            self._clear(offset_bytes, size_bytes)

    def punches(self) -> bool:
        """See `Store.punches`."""
        return True

    def reserve(self, offset_bytes: int, size_bytes: int) -> None:
        """See `Store.reserve`."""
        self._refuse_when_frozen()
        if size_bytes > 0:
            self._resize(max(self._size, offset_bytes + size_bytes))

    def copy_from(self, source: ReadStore, source_offset_bytes: int, offset_bytes: int, size_bytes: int) -> None:
        """See `Store.copy_from`: a read there and one write here, which may be cut or fail."""
        self.pwrite(offset_bytes, source.pread(source_offset_bytes, size_bytes))

    def truncate(self, size_bytes: int) -> None:
        """See `Store.truncate`."""
        self._refuse_when_frozen()
        if size_bytes < self._size:
            self._clear(size_bytes, self._size - size_bytes)
        self._resize(size_bytes)

    def sync(self) -> None:
        """See `Store.sync`: nothing is ever lost here."""

    def data_runs(self, offset_bytes: int, size_bytes: int) -> Iterator[tuple[int, int, bool]]:
        """See `ReadStore.data_runs`: holes are the sectors that are zeros."""
        position, end = offset_bytes, offset_bytes + size_bytes
        if size_bytes > _LONG_RANGE:
            yield from self._long_runs(position, end)
            return
        while position < end:
            is_data = position // SECTOR_SIZE in self._sectors
            stop = position
            while stop < end and (stop // SECTOR_SIZE in self._sectors) == is_data:
                stop = min(round_up(stop + 1, SECTOR_SIZE), end)
            yield position, stop - position, is_data
            position = stop

    def _long_runs(self, position: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """As `data_runs`, fast over holes of terabytes."""
        known = sorted(self._sectors)
        at = bisect_left(known, position // SECTOR_SIZE)
        while position < end:
            if at == len(known) or known[at] * SECTOR_SIZE > position:
                stop = end if at == len(known) else min(known[at] * SECTOR_SIZE, end)
                yield position, stop - position, False
            else:
                while at + 1 < len(known) and known[at + 1] == known[at] + 1:
                    at += 1
                stop = min((known[at] + 1) * SECTOR_SIZE, end)
                at += 1
                yield position, stop - position, True
            position = stop

    def close(self) -> None:
        """See `ReadStore.close`."""

    # -- sectors ------------------------------------------------------------------------------------------------

    def _refuse_when_frozen(self) -> None:
        if self.frozen:
            raise AssertionError(f"{self.name} may not change: INV-LEAF-ONLY-WRITES, INV-PARENT-READ-ONLY")

    def _load(self, offset: int, size: int) -> bytes:
        first, skip = divmod(offset, SECTOR_SIZE)
        get = self._sectors.get
        if skip + size <= SECTOR_SIZE:
            return get(first, ZERO_SECTOR)[skip : skip + size]
        stop = covering_sectors(offset + size)
        if stop - first > len(self._sectors):
            return self._load_holes(offset, size)
        raw = b"".join([get(index, ZERO_SECTOR) for index in range(first, stop)])
        return raw if len(raw) == size else raw[skip : skip + size]

    def _load_holes(self, offset: int, size: int) -> bytes:
        """As `_load`, fast if the store has fewer sectors than the range."""
        first, stop = offset // SECTOR_SIZE, covering_sectors(offset + size)
        raw = bytearray((stop - first) * SECTOR_SIZE)
        for index, sector in self._sectors.items():
            if first <= index < stop:
                at = (index - first) * SECTOR_SIZE
                raw[at : at + SECTOR_SIZE] = sector
        skip = offset % SECTOR_SIZE
        return bytes(raw[skip : skip + size])

    def _change(self, offset: int, data: bytes) -> None:
        """Put `data` there, sector by sector; part sectors keep the rest of what they held."""
        self._refuse_when_frozen()
        if not data:
            return
        first, end = offset // SECTOR_SIZE, offset + len(data)
        head = self._sectors.get(first, ZERO_SECTOR)[: offset % SECTOR_SIZE]
        tail_size = -end % SECTOR_SIZE
        tail = self._sectors.get(end // SECTOR_SIZE, ZERO_SECTOR)[SECTOR_SIZE - tail_size :] if tail_size else b""
        raw = head + data + tail
        for number, position in enumerate(range(0, len(raw), SECTOR_SIZE)):
            self._put(first + number, raw[position : position + SECTOR_SIZE])

    def _clear(self, offset: int, size: int) -> None:
        """Write zeros; sectors that are holes already are not touched."""
        self._refuse_when_frozen()
        end = offset + size
        inner = range(covering_sectors(offset), end // SECTOR_SIZE)
        if not inner or inner.stop < inner.start:
            self._change(offset, bytes(size))
            return
        self._change(offset, bytes(inner.start * SECTOR_SIZE - offset))
        self._change(inner.stop * SECTOR_SIZE, bytes(end - inner.stop * SECTOR_SIZE))
        known = self._sectors
        whole = [i for i in inner if i in known] if len(inner) < len(known) else [i for i in known if i in inner]
        for index in whole:
            self._put(index, ZERO_SECTOR)

    def _put(self, index: int, raw: bytes) -> None:
        if raw == ZERO_SECTOR:
            self._sectors.pop(index, None)
        else:
            self._sectors[index] = raw

    def _resize(self, size_bytes: int) -> None:
        self._size = size_bytes


class PowerCut(Exception):
    """The power is off: no operation on the store has an effect any more."""


_STYLES = ("none", "all", "few", "half", "half", "most", "early", "late")
_CHANCE = {"none": 0.0, "all": 1.0, "few": 0.1, "half": 0.5, "most": 0.9}


class CrashStore(MemStore):
    """A file whose unsynced bytes may be lost. Operations are writes, punches, reserves, truncates and syncs.

    `watcher` is called inside every operation: inside a write its sectors are in flight, inside a sync none of
    the sync's promise holds yet. `cut_at` raises PowerCut inside the n-th operation (counted from 1).
    """

    def __init__(self, start: MemStore) -> None:
        super().__init__(start.name, sectors=dict(start._sectors), size_bytes=start.size())
        self.watcher: Callable[[], None] | None = None
        self.cut_at: int | None = None
        self.operation_count = 0
        self.sync_count = 0
        self.dead = False
        self._durable = dict(start._sectors)
        self._durable_size = start.size()
        self._pending: dict[int, list[tuple[int, bytes]]] = {}  # by sector: (operation, content) since the last sync
        self._sizes = [start.size()]

    def pending_sectors(self) -> set[int]:
        """The sectors that a cut now might lose."""
        return set(self._pending)

    def after_cut(self, rng: random.Random) -> MemStore:
        """What is found after power comes back: one of the many possible files, as `rng` will have it."""
        style = rng.choice(_STYLES)
        size = self._size_after_cut(rng, style)
        sectors = dict(self._durable)
        first_operation = self.operation_count + 1
        if self._pending:
            first_operation = min(versions[0][0] for versions in self._pending.values())
        moment = rng.randint(first_operation, max(first_operation, self.operation_count))
        for index, versions in self._pending.items():
            landed = self._landed(rng, style, versions, moment)
            if landed == ZERO_SECTOR:
                sectors.pop(index, None)
            elif landed is not None:
                sectors[index] = landed
        if size < max(self._sizes):
            for index in [index for index in sectors if index * SECTOR_SIZE >= size]:
                del sectors[index]
        last = size // SECTOR_SIZE
        if size % SECTOR_SIZE and last in sectors:
            raw = sectors[last][: size % SECTOR_SIZE].ljust(SECTOR_SIZE, b"\0")
            sectors[last] = raw
            if raw == ZERO_SECTOR:
                del sectors[last]
        return MemStore(self.name, sectors=sectors, size_bytes=size)

    def _size_after_cut(self, rng: random.Random, style: str) -> int:
        if style == "all" or rng.random() < 0.5:
            return self._size
        if style == "none" or rng.random() < 0.3:
            return self._durable_size
        low, high = min(self._sizes), max(self._sizes)
        size = rng.choice((*self._sizes, rng.randint(low, high)))
        return size if rng.random() < 0.2 else min(round_up(size, SECTOR_SIZE), high)

    def _landed(self, rng: random.Random, style: str, versions: list[tuple[int, bytes]], moment: int) -> bytes | None:
        """The version of a sector that reached the device since the last sync, or None."""
        if style == "early":
            versions = [one for one in versions if one[0] <= moment]
        elif style == "late":
            versions = [one for one in versions if one[0] >= moment]
        elif rng.random() >= _CHANCE[style]:
            return None
        if not versions:
            return None
        raw = (versions[-1] if style == "all" or rng.random() < 0.7 else rng.choice(versions))[1]
        if style != "all" and footer_state(raw).usable and rng.random() < 0.5:
            whole = rng.randrange(SECTOR_SIZE)
            raw = raw[:whole] + bytes(byte ^ 0xA5 for byte in raw[whole:])
        return raw

    def pread(self, offset_bytes: int, size_bytes: int) -> bytes:
        """See `ReadStore.pread`: the volatile bytes."""
        self._refuse_when_dead()
        return super().pread(offset_bytes, size_bytes)

    def pread_into(self, offset_bytes: int, buffer: memoryview) -> None:
        """See `ReadStore.pread_into`: the volatile bytes."""
        self._refuse_when_dead()
        super().pread_into(offset_bytes, buffer)

    def pwrite(self, offset_bytes: int, data: Buffer) -> None:
        """See `Store.pwrite`."""
        self._begin()
        super().pwrite(offset_bytes, data)
        self._in_operation()

    def punch(self, offset_bytes: int, size_bytes: int) -> None:
        """See `Store.punch`."""
        self._begin()
        super().punch(offset_bytes, size_bytes)
        self._in_operation()

    def reserve(self, offset_bytes: int, size_bytes: int) -> None:
        """See `Store.reserve`."""
        self._begin()
        super().reserve(offset_bytes, size_bytes)
        self._in_operation()

    def truncate(self, size_bytes: int) -> None:
        """See `Store.truncate`."""
        self._begin()
        super().truncate(size_bytes)
        self._in_operation()

    def sync(self) -> None:
        """See `Store.sync`: from its return on, everything so far survives a cut."""
        self._begin()
        self._in_operation()
        for index in self._pending:
            raw = self._sectors.get(index)
            if raw is None:
                self._durable.pop(index, None)
            else:
                self._durable[index] = raw
        self._pending.clear()
        self._durable_size = self._size
        self._sizes = [self._size]
        self.sync_count += 1

    def _begin(self) -> None:
        self._refuse_when_dead()
        self.operation_count += 1

    def _in_operation(self) -> None:
        if self.watcher is not None:
            self.watcher()
        if self.cut_at is not None and self.operation_count >= self.cut_at:
            self.dead = True
            raise PowerCut(f"at operation {self.operation_count}")

    def _refuse_when_dead(self) -> None:
        if self.dead:
            raise PowerCut("the power is off")

    def _put(self, index: int, raw: bytes) -> None:
        self._pending.setdefault(index, []).append((self.operation_count, raw))
        super()._put(index, raw)

    def _resize(self, size_bytes: int) -> None:
        if size_bytes != self._size:
            self._sizes.append(size_bytes)
        super()._resize(size_bytes)


def io_failed() -> errors.VhdkitError:
    """The error of a bad sector."""
    return errors.IoFailed("simulated I/O error")


def no_space() -> errors.VhdkitError:
    """The error of a full file system."""
    return errors.NoSpace("simulated full file system")


def sync_failed() -> errors.VhdkitError:
    """The error of a failed fdatasync."""
    return errors.SyncFailed("simulated failure of a flush")


@dataclass(slots=True)
class Fault:
    """Fail the n-th `operation` (counted from 1) whose offset `where` accepts; `persistent`: all later ones too.

    `partly`: half of a failing write is done first, as by a real file system that fills up.
    """

    operation: str
    make_error: Callable[[], errors.VhdkitError]
    at: int = 1
    persistent: bool = False
    partly: bool = False
    where: Callable[[int], bool] = field(default=lambda offset_bytes: True)
    seen: int = 0

    def strikes(self, operation: str, offset_bytes: int) -> bool:
        """Count the call; True if it must fail."""
        if operation != self.operation or not self.where(offset_bytes):
            return False
        self.seen += 1
        return self.seen >= self.at if self.persistent else self.seen == self.at


class FaultyStore(MemStore):
    """A file whose operations fail as `faults` say; the list may be changed at any time."""

    def __init__(self, start: MemStore, *faults: Fault) -> None:
        super().__init__(start.name, sectors=dict(start._sectors), size_bytes=start.size())
        self.faults = list(faults)
        self.sync_count = 0

    def _check(self, operation: str, offset_bytes: int = 0) -> Fault | None:
        struck = [fault for fault in self.faults if fault.strikes(operation, offset_bytes)]
        if struck and not struck[0].partly:
            raise struck[0].make_error()
        return struck[0] if struck else None

    def pread(self, offset_bytes: int, size_bytes: int) -> bytes:
        """See `ReadStore.pread`."""
        self._check("read", offset_bytes)
        return super().pread(offset_bytes, size_bytes)

    def pread_into(self, offset_bytes: int, buffer: memoryview) -> None:
        """See `ReadStore.pread_into`."""
        self._check("read", offset_bytes)
        super().pread_into(offset_bytes, buffer)

    def pwrite(self, offset_bytes: int, data: Buffer) -> None:
        """See `Store.pwrite`."""
        fault = self._check("write", offset_bytes)
        if fault is not None:
            super().pwrite(offset_bytes, bytes(data)[: len(data) // 2])
            raise fault.make_error()
        super().pwrite(offset_bytes, data)

    def punch(self, offset_bytes: int, size_bytes: int) -> None:
        """See `Store.punch`."""
        self._check("punch", offset_bytes)
        super().punch(offset_bytes, size_bytes)

    def reserve(self, offset_bytes: int, size_bytes: int) -> None:
        """See `Store.reserve`."""
        self._check("reserve", offset_bytes)
        super().reserve(offset_bytes, size_bytes)

    def truncate(self, size_bytes: int) -> None:
        """See `Store.truncate`."""
        self._check("truncate", size_bytes)
        super().truncate(size_bytes)

    def sync(self) -> None:
        """See `Store.sync`."""
        self._check("sync")
        self.sync_count += 1
