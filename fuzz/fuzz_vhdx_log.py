# SPDX-License-Identifier: Apache-2.0
"""INV-BOUNDED: any bytes as the log of a VHDX end in success or a `VhdkitError`, in bounded time and memory.

Fed: one file, as `fuzz_vhdx_open`, with the same seeds, but mostly its log is changed. Tried: finding the entries, the
active sequence and what it changes. Also watched: a second implementation, which is written for shortness and knows
only the specification, finds the same entries to replay, and the same bytes in every place that they change.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from fuzz.loop import main
from fuzz.mutate import mutate_bytes
from fuzz.mutate_vhdx import MUTATE_LOG, PAGE, mutate_vhdx
from fuzz.sparse import FuzzStore, decode
from vhdkit.errors import CorruptImage, CorruptReason, VhdkitError
from vhdkit.formats.vhdx.crc import sealed
from vhdkit.formats.vhdx.header import current_header, read_headers
from vhdkit.formats.vhdx.replay import log_place, read_log
from vhdkit.units import MIB

SEEDS = "fuzz_vhdx_open"
_COMPARED_LOG = 8 * MIB  # the second implementation is slow
_REFUSED = (CorruptReason.LOG_OFFSET, CorruptReason.LOG_ENTRY, CorruptReason.LOG_TRUNCATED)


@dataclass(frozen=True)
class _Entry:
    offset: int
    tail: int
    number: int
    changes: tuple[tuple[int, int, bytes | None], ...]  # (offset, size, page)
    end: int


def target(data: bytes) -> None:
    """Read the log, and read it again in the other way."""
    store = FuzzStore(decode(data), "image.vhdx")
    store.frozen = True
    try:
        place = current_header(store.name, read_headers(store))
        offset, size = log_place(store, place)
    except VhdkitError as error:
        assert str(error).isprintable()
        return
    if not any(place.header.log_guid):
        assert read_log(store, place) is None
        return
    ring = store.pread(offset, size) if size <= _COMPARED_LOG else None
    wanted = None if ring is None else _sequence(ring, place.raw[48:64])
    try:
        replay = read_log(store, place)
    except CorruptImage as error:
        assert str(error).isprintable()
        if wanted is not None:
            assert error.reason in _REFUSED if wanted else error.reason is CorruptReason.LOG_SEQUENCE, error
        return
    assert replay is not None
    if wanted is None:
        return
    assert [one.offset_bytes for one in replay.entries] == [one.offset for one in wanted]
    everything = [change for one in wanted for change in one.changes if change[1]]
    places = {
        at for start, length, _ in everything for at in (start, start + length - PAGE, start + length, start - PAGE)
    }
    for at in sorted(places)[:500]:
        expected = next(
            (
                bytes(PAGE) if raw is None else raw
                for start, length, raw in reversed(everything)
                if start <= at < start + length
            ),
            None,
        )
        found = replay.view.pread(at, PAGE)
        if expected is None:
            expected = store.pread(at, PAGE).ljust(len(found), b"\0")
        assert found == expected, f"byte {at:#x} is not what the log says"


def replays(data: bytes) -> bool:
    """Whether the log holds changes that are read: how the mutations are measured."""
    store = FuzzStore(decode(data), "image.vhdx")
    try:
        replay = read_log(store, current_header(store.name, read_headers(store)))
    except VhdkitError:
        return False
    return replay is not None and bool(replay.changes)


def _sequence(ring: bytes, log_guid: bytes) -> list[_Entry]:
    """The entries to replay, as the specification describes them in words."""
    entries = {one.offset: one for at in range(0, len(ring), PAGE) if (one := _entry(ring, at, log_guid)) is not None}
    for newest in sorted(entries.values(), key=lambda one: -one.number):
        run: list[_Entry] = []
        at = newest.tail
        while at in entries and len(run) <= len(entries) and (not run or run[-1].number + 1 == entries[at].number):
            run.append(entries[at])
            if at == newest.offset:
                return run
            at = entries[at].end
    return []


def _entry(ring: bytes, at: int, log_guid: bytes) -> _Entry | None:
    if ring[at : at + 4] != b"loge":
        return None
    raw = ring[at:] + ring[:at]
    length, tail, number, count = (
        int.from_bytes(raw[a:b], "little") for a, b in ((8, 12), (12, 16), (16, 24), (24, 28))
    )
    if raw[32:48] != log_guid or not PAGE <= length <= len(ring) or length % PAGE:
        return None
    if tail % PAGE or tail >= len(ring) or not number or 64 + 32 * count > length:
        return None
    raw = raw[:length]
    if sealed(raw, 4) != raw:
        return None
    changes: list[tuple[int, int, bytes | None]] = []
    page = -(-(64 + 32 * count) // PAGE) * PAGE
    for start in range(64, 64 + 32 * count, 32):
        slot = raw[start : start + 32]
        place = int.from_bytes(slot[16:24], "little")
        if slot[24:32] != raw[16:24] or slot[:4] not in (b"desc", b"zero"):
            return None
        if slot[:4] == b"zero":
            changes.append((place, int.from_bytes(slot[8:16], "little"), None))
            continue
        sector = raw[page : page + PAGE]
        if sector[:4] != b"data" or sector[4:8] + sector[-4:] != raw[20:24] + raw[16:20]:
            return None
        changes.append((place, PAGE, slot[8:16] + sector[8:-4] + slot[4:8]))
        page += PAGE
    return _Entry(at, tail, number, tuple(changes), (at + length) % len(ring)) if page == length else None


def mutate(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """Another file, near `data`, mostly with another log."""
    if rng.random() < 0.05:
        return mutate_bytes(data, rng, others)
    return mutate_vhdx(data, rng, others, MUTATE_LOG)


if __name__ == "__main__":
    sys.exit(main(target, "fuzz_vhdx_log", mutate, corpus=SEEDS))
