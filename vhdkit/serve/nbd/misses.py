# SPDX-License-Identifier: Apache-2.0
"""Reads that wait for a device: what is not in memory is asked for, and served when it is there.

Decides when a waiting read is tried again, and when a thread has to wait for one. Must not know how requests arrive
(`serving`) or what lies in which file.

A thread for each read would cost more than the read: the device answers in less time than two switches of threads
take. The attempt to read has the kernel begin, and the loop goes on with what is ready. Before it sleeps with reads
still waiting, it asks for word of one of the oldest (`Loop.ask`), which wakes it to look at the others, too. A small
read that waits alone is looked at some times before, as a fast device takes no longer than word. Where the system
gives no word, the loop looks at the oldest between polls for events (`look`), and before it sleeps, the oldest becomes
a job, whose end wakes the loop.

Where a read lies may not be known yet, because a bitmap tells that. The bitmap is then asked for in the same way, and
read by the loop when it is there (`settle_at_once`); a job reads it where there is no word, or if word came in vain.

    added ──► unsettled ── the bitmaps are there ──► waiting ── ready at a look ──► answered
                                                        └── no word, word in vain, or it failed ──► job

`INV-MISS-USES-THE-PRESENT-DISK`: a waiting read takes `export.disk` when it is tried, never before, and is not tried
while the export is held. So a hold waits for word that was asked for, but not for the reads, and afterwards they
read from the new chain.

`INV-MISS-ENDS`: every read that was added is answered, becomes a job, or its client is gone: whenever the loop is
about to sleep, each client with waiting reads waits for word or has a job in progress, unless it is held or does not
read its answers. A read whose word came in vain becomes a job.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

from vhdkit import errors
from vhdkit.at_once import NotInMemory
from vhdkit.chain.engine.unsettled import prefetch_likely, settle_at_once
from vhdkit.disk import Disk
from vhdkit.readahead import ReadAhead
from vhdkit.serve.nbd.channel import Channel
from vhdkit.serve.nbd.export import PIECE_BYTES, Export
from vhdkit.serve.nbd.host import Host
from vhdkit.serve.nbd.protocol import Request, Transmission
from vhdkit.serve.nbd.scans import Scan
from vhdkit.serve.nbd.wire import Command
from vhdkit.store import FileStore
from vhdkit.units import PAGE_SIZE, SECTOR_SIZE, covering_sectors

MAX_MISSES = 128  # of one client
MAX_MISS_BYTES = 8 * PIECE_BYTES  # of one client; none of it is our memory, but the kernel reads it
MAX_WAITERS = 8  # jobs that wait for one client's reads at once
_TRIES = 2  # reads in a row that are not there: later ones will hardly be
_SMALL_BYTES = 16 * PAGE_SIZE  # of a read that may be there before word of it could come
_FINDING_OUT_NS = 1_000_000  # at once, where reads lie
_BATCHES = 4  # in which the waiting reads are answered, as the device delivers them
WAITS = b"waits"  # in place of an answer


class Miss:
    """A read that waits."""

    __slots__ = ("asked", "began", "cookie", "length", "offset")

    def __init__(self, cookie: int, offset: int, length: int, began: int) -> None:
        self.cookie = cookie
        self.offset = offset
        self.length = length
        self.began = began
        self.asked = False  # the kernel was asked to read it


class Reader(Protocol):
    """What `Misses` needs of the client whose reads wait (`serving.Serving`)."""

    export: Export
    scan: Scan

    def may_answer(self) -> bool:
        """False while nothing may be read or sent for it."""
        ...

    def submit(self, request: Request, payload: bytes | None, after: Callable[[], None] | None = None) -> None:
        """Let a job execute and answer it; `after` is called before the answer is sent, if this read has waited."""
        ...

    def run_beside(self, work: Callable[[Disk], object], done: Callable[[], None]) -> None:
        """Let a job do something with the disk that answers no request, then call `done`; a failure is ignored."""
        ...


class Misses:
    """One client's waiting reads. All methods run on the loop's thread."""

    def __init__(
        self, reader: Reader, host: Host, channel: Channel, rules: Transmission, proceed: Callable[[], None]
    ) -> None:
        """`proceed` is called when more can be served, or the connection can end."""
        self.count = 0
        self._bytes = 0
        self._reader = reader
        self._host = host
        self._channel = channel
        self._rules = rules
        self._proceed = proceed
        self._ahead = ReadAhead(rules.size_bytes, reader.export.read_ahead(host.read_ahead))
        self.marks = self._ahead.marks
        self._ready: list[Miss] = []  # waiting for data, the oldest first
        self._unsettled: list[Miss] = []  # waiting for a job that finds out where they lie
        self._settling: list[Miss] | None = None  # in such a job
        self._is_finding_out = False  # where they lie: there will be word
        self._lacked: tuple[object, int] | None = None  # the file and the offset of what was asked about last for that
        self._waiters = 0
        self._allowed = 1
        self._awaited: Miss | None = None  # word of it will come
        self._is_hopeless = False  # the last word came in vain

    def is_full(self) -> bool:
        """True if no more may be added."""
        return self.count >= MAX_MISSES or self._bytes >= MAX_MISS_BYTES

    def add(self, disk: Disk, cookie: int, offset: int, length: int, began: int) -> None:
        """Let a read wait that was just tried in vain; it lies inside the disk. Raises IoFailed."""
        miss = Miss(cookie, offset, length, began)
        if not disk.is_settled(offset, length):
            disk.prefetch(offset, length)
            if length <= _SMALL_BYTES:
                prefetch_likely(disk.chain, *_sectors(miss))
            self._unsettled.append(miss)
        else:
            self._ready.append(miss)
        self.count += 1
        self._bytes += length
        self._host.loop.waiters.present[self] = None
        self.read_ahead(offset, length)

    def read_ahead(self, offset: int, length: int) -> None:
        """Note a read that had to wait or is among the `marks`: prefetch what its stream will need, if it has one."""
        found = self._ahead.note(offset, length)
        if found is not None:
            self._reader.run_beside(lambda disk: fetch(disk, *found), _nothing)

    def or_wait(
        self, attempt: Callable[[], bytes | bytearray | None], request: Request, began: int
    ) -> Callable[[], bytes | bytearray | None]:
        """`attempt`, a read; if it was in vain, the read waits, and the answer is `WAITS`."""

        def attempt_or_wait() -> bytes | bytearray | None:
            answer = attempt()
            if answer is not None or self.is_full() or self._channel.is_closed():
                return answer
            self.add(self._reader.export.disk, request.cookie, request.offset, request.length, began)
            return WAITS

        return attempt_or_wait

    def _ask(self, disk: Disk, miss: Miss) -> None:
        miss.asked = True
        disk.prefetch(miss.offset, miss.length)

    def is_small(self) -> bool:
        """See `loop.Waiter`."""
        return len(self._ready) == self.count == 1 and self._bytes <= _SMALL_BYTES and not self._is_hopeless

    def look(self) -> bool:
        """See `loop.Waiter`: if one of the oldest is there, answer it and all others that are.

        Not the very oldest of many, so that those before it are answered by the same `send`.
        """
        ready = self._ready
        if not ready or not self._reader.may_answer():
            return False
        if len(ready) < _BATCHES:
            return self._look()
        miss = ready[len(ready) // _BATCHES]
        page = min(miss.length, PAGE_SIZE)
        try:
            end = miss.offset + miss.length
            if not self._reader.export.disk.try_read_flat(end - page, self._host.replies[:page]):
                return False
        except errors.VhdkitError:
            pass  # found again, and reported, below
        return self._look()

    def serve(self) -> None:
        """After a batch of requests: find out where new reads lie."""
        if self._unsettled and self._reader.may_answer():
            self._find_out()

    def _look(self) -> bool:
        """Answer what is ready; True if there was anything."""
        was_full, before, began = self.is_full(), self.count, time.perf_counter_ns()
        self._ready, failed = self._answer(_TRIES)
        if self.count != before:
            self._reader.scan.answered_late(before - self.count, began)
        for miss in failed:  # the job reports the error
            self._forget(miss)
            self._submit(miss, _nothing)
        if self.count == before:
            return False
        if was_full or not self.count or self._channel.unsent or self._channel.is_closed():
            self._proceed()
        return True

    def _answer(self, tries: int) -> tuple[list[Miss], list[Miss]]:
        """Answer those that are ready; returns (not ready, failed). Ends after so many in a row that are not ready."""
        rules, disk, channel, ready = self._rules, self._reader.export.disk, self._channel, self._ready
        replies, header = self._host.replies, rules.read_header_size
        left: list[Miss] = []
        failed: list[Miss] = []
        filled, missing, room = 0, 0, self._host.memory.limits.reply_bytes
        for number, miss in enumerate(ready):
            if filled and filled + header + miss.length > room:
                channel.send(replies[:filled])
                filled = 0
                if channel.unsent:
                    left += ready[number:]
                    break
            start = filled + header
            try:
                is_there = disk.try_read_flat(miss.offset, replies[start : start + miss.length])
            except errors.VhdkitError:
                failed.append(miss)
                continue
            if is_there:
                rules.put_read_header(replies, filled, miss.cookie, miss.offset, miss.length)
                filled = start + miss.length
                missing = 0
                self._forget(miss)
                self._host.stats.served(self._reader, 1, miss.began)
                continue
            left.append(miss)
            missing += 1
            if missing == tries:
                left += ready[number + 1 :]
                break
        if filled:
            channel.send(replies[:filled])
        return left, failed

    def _forget(self, miss: Miss) -> None:
        """It does not wait any more."""
        self.count -= 1
        self._bytes -= miss.length
        if not self.count:
            self._host.loop.waiters.present.pop(self, None)

    # -- jobs ---------------------------------------------------------------------------------------------------

    def before_sleep(self) -> None:
        """See `loop.Waiter`: ask for word, or look once more and let jobs wait for the oldest reads."""
        if not self._reader.may_answer():
            return
        if self._unsettled:
            self._find_out()
        if self._awaited is not None or (self._ready and not self._waiters and self._ask_for_word()):
            return
        if self._ready and self._look() and not self._reader.may_answer():
            return
        was_full = self.is_full()
        while self._ready and self._waiters < self._allowed:
            if not self._waiters:
                self._ask_all()
            miss = self._ready.pop(0)
            self._forget(miss)
            self._waiters += 1
            self._submit(miss, self._waited)
        if was_full and not self.is_full():
            self._proceed()

    def _ask_for_word(self) -> bool:
        """Of one of the oldest; see `look`. False if none will come."""
        if self._is_hopeless:
            return False
        miss, export = self._ready[len(self._ready) // _BATCHES], self._reader.export
        sector = (miss.offset + miss.length - 1) // SECTOR_SIZE
        with contextlib.suppress(errors.VhdkitError):  # the read itself reports it
            if self._host.loop.ask(partial(export.disk.chain.ask, sector), partial(self._told, export)):
                export.jobs += 1  # a hold waits for it, because it holds a file
                self._awaited = miss
                return True
        return False

    def _told(self, export: Export) -> None:
        """What was asked for is there, or cannot be read."""
        self._had_word(export)
        miss, self._awaited = self._awaited, None
        if self._is_waiting(miss) and self._reader.may_answer():
            self._look()
            self._is_hopeless = self._is_waiting(miss)

    def _is_waiting(self, miss: Miss | None) -> bool:
        return any(one is miss for one in self._ready)

    def _submit(self, miss: Miss, after: Callable[[], None]) -> None:
        request = Request(0, int(Command.READ), 0, miss.cookie, miss.offset, miss.length, 0)
        self._reader.submit(request, None, after)

    def _ask_all(self) -> None:
        """Ask for what the attempts may not have begun: on older kernels they begin nothing."""
        disk = self._reader.export.disk
        for miss in self._ready:
            if not miss.asked:
                try:
                    self._ask(disk, miss)
                except errors.VhdkitError:
                    return  # the read itself reports it

    def _waited(self) -> None:
        """A job has answered the oldest: usually others are there by now. If not, more jobs may wait next time.

        Some stores never serve a read at once; their reads wait side by side.
        """
        self._waiters -= 1
        found = bool(self._ready) and self._reader.may_answer() and self._look()
        self._is_hopeless &= not found
        self._allowed = 1 if found or not self._ready else min(2 * self._allowed, MAX_WAITERS)

    def _find_out(self) -> None:
        """Find out where reads lie: here if what tells is in memory, else when there is word of it, or in a job."""
        if self._settling is not None or self._is_finding_out:
            return
        export, unsettled, lacked = self._reader.export, self._unsettled, None
        self._unsettled, until = [], time.perf_counter_ns() + _FINDING_OUT_NS
        for number, miss in enumerate(unsettled):
            if number and time.perf_counter_ns() > until:  # others have their turn
                self._unsettled += unsettled[number:]
                break
            try:
                missing = settle_at_once(export.disk.chain, *_sectors(miss))
            except errors.VhdkitError:  # the read itself reports it
                missing = None
            if missing is None:
                self._ready.append(miss)
            else:
                self._unsettled.append(miss)
                lacked = lacked or missing
        if lacked is None:
            self._lacked = None
            if self._unsettled:
                self._is_finding_out = True
                self._host.loop.post(self._find_out_more)
        elif not self._ask_where(lacked, export):
            self._settle()

    def _ask_where(self, lacked: NotInMemory, export: Export) -> bool:
        """Ask for word of what tells where a read lies; False if none will come, or it has come in vain."""
        file, place = lacked.file, lacked.offset_bytes
        before, self._lacked = self._lacked, (file, place)
        if not isinstance(file, FileStore) or before == self._lacked:
            return False
        with contextlib.suppress(errors.VhdkitError):  # the read itself reports it
            if self._host.loop.ask(partial(file.ask, place), partial(self._told_where, export)):
                export.jobs += 1  # a hold waits for it, because it holds a file
                self._is_finding_out = True
                return True
        return False

    def _told_where(self, export: Export) -> None:
        self._had_word(export)
        self._find_out_more()

    def _find_out_more(self) -> None:
        self._is_finding_out = False
        if self._unsettled and self._reader.may_answer():
            self._find_out()
            self._look()

    def _had_word(self, export: Export) -> None:
        export.jobs -= 1
        if export.held and not export.jobs:
            self._host.drained(export)

    def _settle(self) -> None:
        self._settling, self._unsettled = self._unsettled, []
        places = [(miss.offset, miss.length) for miss in self._settling]

        def settle(disk: Disk) -> None:
            for offset, length in places:
                disk.settle(offset, length)

        self._reader.run_beside(settle, self._settled)

    def _settled(self) -> None:
        """It is known where they lie, or what went wrong will be reported by the read."""
        found, self._settling = self._settling or [], None
        self._ready = found + self._ready
        if found and self._reader.may_answer():
            self._ask_all()
            self._look()

    def drop(self) -> None:
        """The client is gone."""
        for miss in (*self._ready, *self._unsettled, *(self._settling or ())):
            self._forget(miss)
        self._ready, self._unsettled, self._settling = [], [], None
        self._ahead.forget()


def _sectors(miss: Miss) -> tuple[int, int]:
    first = miss.offset // SECTOR_SIZE
    return first, covering_sectors(miss.offset + miss.length) - first


def _nothing() -> None:
    """Nothing follows."""


def fetch(disk: Disk, offset: int, size: int) -> None:
    """Prefetch a range, and first find out where it lies; may wait. Raises IoFailed, OutOfRange."""
    if not disk.prefetch(offset, size):
        disk.settle(offset, size)
        disk.prefetch(offset, size)
