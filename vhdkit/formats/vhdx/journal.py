# SPDX-License-Identifier: Apache-2.0
"""The log and the headers of an image that is written to: what must be durable before what.

Decides which part of the ring is free, where an entry's tail points, and in which order header slots change. Must not
know what the logged pages contain: `commit` decides which pages are logged, and when.

    first change of a session
        an empty entry with a new log id, at the log's start                    -> sync
        a header with new ids and this log id, in the slot that is not current  -> sync
        the same in the other slot                                              (made durable by the next sync)
    a group of pages     an entry with their bytes -> sync -> the same bytes in their places  (durable with the next)
    close                header without log -> sync, the same in the other slot -> sync

- `INV-LOG-WHOLE`: at every moment the newest durable entry and all entries from its tail on are in the ring. So free
space ends at the tail *that the newest durable entry records*, not at the tail in memory: if the next entry is torn,
opening the file relies on the previous one.
- `INV-HEADER-PAIR`: a slot is written only while the other one holds a valid, durable header.

Source: [MS-VHDX] 2.2.2.1, 2.3.
"""

from __future__ import annotations

import functools
import uuid
from collections import deque
from dataclasses import dataclass, replace
from typing import NamedTuple

from vhdkit.formats.guard import SyncGuard
from vhdkit.formats.vhdx import layout, log
from vhdkit.formats.vhdx.crc import sealed
from vhdkit.formats.vhdx.header import HeaderPlace, current_header, read_headers
from vhdkit.formats.vhdx.layout import Header
from vhdkit.formats.vhdx.log import SECTOR, LogChange
from vhdkit.image import NULL_ID
from vhdkit.store import Store
from vhdkit.units import MIB, round_down, round_up

_SPARE_SECTORS = 2  # one for an empty entry that frees the ring, and one so that the ring is never completely full
_WRITTEN_AHEAD = MIB  # of a log in a hole; each session begins at the log's start, and our own logs are no longer
_RANDOM_BITS = 60  # of the first sequence number of a session, as Windows chooses it


class Moment(NamedTuple):
    """A moment in the life of a file: its FileWriteGuid, its log's id, and the number of the next log entry."""

    file_write_guid: bytes
    log_guid: bytes
    sequence: int


@dataclass(slots=True)
class _Logged:
    """A durable entry in the ring; `pages` are those not yet written to their places."""

    offset: int
    pages: list[LogChange]


class Journal:
    """The log of one image. One caller at a time.

    `place` is the current header, `place_of_log` (offset, size) of a log that holds nothing to replay.
    `file_write_guid` is the FileWriteGuid of this session; None for a new one.
    """

    def __init__(
        self,
        store: Store,
        place: HeaderPlace,
        place_of_log: tuple[int, int],
        guard: SyncGuard,
        *,
        file_write_guid: bytes | None = None,
    ) -> None:
        self._store = store
        self._guard = guard
        self._slot = place.slot
        self._header = place.header
        self._log_offset, self._log_size = place_of_log
        self.lasting_bytes: int | None = None  # what a failure leaves of the file; None before anything is placed
        self._other_due = False  # a sync is due before another slot is written
        self._synced_size = 0  # of the file, at the last sync; without what may be cut off again
        self._head = 0  # where the next entry goes
        self._durable_tail = 0  # the tail in the newest durable entry
        self._recorded_tail = 0  # the tail in the entry that was written last; the tail may have moved since
        self._unsettled: deque[_Logged] = deque()
        self._sequence = 0
        self._has_log = False  # this session has a log id, in a durable header
        self._may_name_log = False  # a header may name a log, even if writing that header failed
        self._has_file_guid = False
        self._next_file_guid = file_write_guid or uuid.uuid4().bytes
        self._has_data_guid = False
        self._next_data_guid = uuid.uuid4().bytes  # known in advance: a child may record it first
        self._is_quiet = False  # the log is empty, so another opening of the file may write headers

    @property
    def renewed_id(self) -> bytes | None:
        """The DataWriteGuid that the next change of the disk sets; None if this session has set it already."""
        return None if self._has_data_guid else self._next_data_guid

    def set_renewed_id(self, data_write_guid: bytes) -> None:
        """Let the next change of the disk set this DataWriteGuid, which may be the present one."""
        assert not self._has_data_guid
        self._next_data_guid = data_write_guid

    @property
    def header(self) -> Header:
        """The current header."""
        return self._header

    @property
    def moment(self) -> Moment:
        """The present moment, for notes."""
        header = self._header
        return Moment(header.file_write_guid, header.log_guid, self._sequence)

    @functools.cached_property
    def max_pages(self) -> int:
        """The largest number of pages that one entry can hold."""
        sectors = self._log_size // SECTOR - _SPARE_SECTORS - 1
        pages = sectors - 1
        while log.entry_size(pages) > sectors * SECTOR:
            pages -= 1
        return pages

    def sync(self) -> None:
        """Make everything written so far durable. Raises SyncFailed."""
        size = self._store.size()
        lasting = self.lasting_bytes  # read after the size: a writer sets it before the file grows
        if lasting is not None:
            size = min(size, lasting)
        settled = sum(not one.pages for one in self._unsettled)
        self._guard.sync()
        self._synced_size = size
        for _ in range(settled):  # the oldest ones: pages are put in their places in the order of their entries
            self._unsettled.popleft()
        self._other_due = False

    # -- sessions ---------------------------------------------------------------------------------------------------

    def begin(self, *, changes_disk: bool, needs_log: bool = True) -> None:
        """Prepare for a change of the file or, with `changes_disk`, of what a guest sees.

        Raises SyncFailed, NoSpace, IoFailed.
        """
        if self._is_quiet:
            self._read_headers()
        if self._has_file_guid and (self._has_data_guid or not changes_disk) and (self._has_log or not needs_log):
            return
        header = self._header
        if not self._has_file_guid:
            header = replace(header, file_write_guid=self._next_file_guid)
        if changes_disk and not self._has_data_guid:
            header = replace(header, data_write_guid=self._next_data_guid)
        if needs_log and not self._has_log:
            header = replace(header, log_guid=self._start_log())
            self._may_name_log = True
        self._write_header(header)
        self._has_file_guid = True
        self._has_data_guid |= changes_disk
        self._has_log |= needs_log

    def forget(self) -> None:
        """Durably remove the log's id from both headers, after its changes were applied. Raises SyncFailed."""
        self.sync()
        self._write_header(replace(self._header, file_write_guid=self._next_file_guid, log_guid=NULL_ID))
        self._has_file_guid = True
        self.sync()

    def _start_log(self) -> bytes:
        """Durably write an empty entry with a new log id; the headers do not name that id yet."""
        for offset, size, is_data in list(self._store.data_runs(self._log_offset, self._log_size)):
            if not is_data:  # so that a flush cannot run out of space
                self._store.reserve(offset, size)
                # Space that was only reserved becomes written space when an entry is synced: a file system then
                # writes its own journal too, which takes longer than the sync of the entry.
                ahead = min(offset + size, self._log_offset + _WRITTEN_AHEAD) - offset
                if ahead > 0:
                    self._store.pwrite(offset, bytes(ahead))
        self.sync()
        log_guid = uuid.uuid4().bytes
        self._sequence = uuid.uuid4().int % (1 << _RANDOM_BITS) + 1
        self._put_empty(log_guid)
        return log_guid

    def _put_empty(self, log_guid: bytes) -> None:
        """Durably write an entry without pages that is its own tail, which frees the rest of the ring."""
        assert self.is_settled
        self._write_entry(self._head, [], log_guid)
        self.sync()
        following = (self._head + SECTOR) % self._log_size
        self._durable_tail, self._head, self._sequence = self._head, following, self._sequence + 1  # see `logged`

    def _write_header(self, header: Header) -> None:
        """Durably make `header`, with the next number, current; the other slot becomes durable with the next sync."""
        if self._other_due:
            self.sync()
        self._other_due = True  # before the slot is written: an interrupt may come right after that, or in the sync
        self._put_header(1 - self._slot, header)
        self.sync()
        self._other_due = True
        self._put_header(1 - self._slot, header)

    def _put_header(self, slot: int, header: Header) -> None:
        number = self._header.sequence_number + 1
        header = replace(
            header,
            sequence_number=number,
            log_version=layout.LOG_VERSION,
            log_offset=self._log_offset,
            log_length=self._log_size,
        )
        raw = layout.build_header(header).ljust(layout.HEADER_SIZE, b"\0")
        self._store.pwrite(layout.HEADER_OFFSETS[slot], sealed(raw, layout.HEADER_CHECKSUM_OFFSET))
        self._slot, self._header = slot, header

    def end(self) -> None:
        """Durably remove the log's id from both headers. Everything is settled. Raises SyncFailed, IoFailed."""
        assert self.is_settled
        if self._may_name_log:
            self._write_header(replace(self._header, log_guid=NULL_ID))
            self._has_log = self._may_name_log = False
        if self._other_due:
            self.sync()
        self._is_quiet = True

    def move_log(self, offset_bytes: int) -> None:
        """Durably record another place for the log, which is empty, in both headers. Raises SyncFailed, IoFailed."""
        assert not self._may_name_log
        if self._is_quiet:
            self._read_headers()
        self._log_offset = offset_bytes
        header = self._header if self._has_file_guid else replace(self._header, file_write_guid=uuid.uuid4().bytes)
        self._write_header(header)
        self._has_file_guid = True
        self.end()

    def _read_headers(self) -> None:
        """Read the headers again, since another opening of the file may have written them.

        If that opening failed and left entries in the log, writing would lose them, so this opening refuses to write
        from now on. Raises SyncFailed.
        """
        place = current_header(self._store.name, read_headers(self._store))
        if place.header.log_guid != NULL_ID:
            self._guard.refuse()
            self._guard.check()
        self._slot, self._header = place.slot, place.header
        self._is_quiet = False

    # -- entries ----------------------------------------------------------------------------------------------------

    @property
    def is_settled(self) -> bool:
        """Whether every logged page is durable in its place."""
        return not self._unsettled

    def log(self, pages: list[LogChange]) -> None:
        """Write an entry with these pages, at most `max_pages`; it is valid once `sync` has returned.

        Raises NoSpace, IoFailed; the entry is then void, and its space is reused.
        """
        assert self._has_log and 0 < len(pages) <= self.max_pages
        self._apply()
        if self._free_bytes() < log.entry_size(len(pages)) + _SPARE_SECTORS * SECTOR:
            self.sync()
            self._put_empty(self._header.log_guid)
        self._write_entry(self._head, pages, self._header.log_guid)

    def logged(self, pages: list[LogChange]) -> None:
        """Put the pages of the entry that `log` wrote last, which is durable now, in their places.

        Raises NoSpace, IoFailed: nothing is lost then, and the entry stays in the log.
        """
        entry, following = _Logged(self._head, pages), (self._head + log.entry_size(len(pages))) % self._log_size
        # One line, before the pages get their places: after Ctrl-C the next entry must not lie over this one.
        self._durable_tail, self._head, self._sequence = self._recorded_tail, following, self._sequence + 1
        self._unsettled.append(entry)
        self._apply()

    def settle(self) -> None:
        """Make every page that was logged durable in its place. Raises SyncFailed, NoSpace, IoFailed."""
        if not self.is_settled:
            self._apply()
            self.sync()
        assert self.is_settled

    def _apply(self) -> None:
        """Put the pages of all durable entries in their places; the next call retries what fails."""
        for entry in self._unsettled:
            for one in entry.pages:
                assert one.data is not None
                self._store.pwrite(one.file_offset_bytes, one.data)
            entry.pages = []

    def _tail(self) -> int:
        """The offset of the oldest entry that is still needed, the next one included."""
        return self._unsettled[0].offset if self._unsettled else self._head

    def _free_bytes(self) -> int:
        used = (self._head - self._durable_tail) % self._log_size
        return self._log_size - used

    def _write_entry(self, offset: int, pages: list[LogChange], log_guid: bytes) -> None:
        self._recorded_tail = self._tail()
        raw = log.build_entry(
            log_guid,
            self._sequence,
            self._recorded_tail,
            pages,
            flushed_file_offset=round_down(self._synced_size, MIB),
            last_file_offset=round_up(self._store.size(), MIB),
        )
        split = min(len(raw), self._log_size - offset)
        self._store.pwrite(self._log_offset + offset, raw[:split])
        if split < len(raw):
            self._store.pwrite(self._log_offset, raw[split:])
