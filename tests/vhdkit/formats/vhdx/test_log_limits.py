# SPDX-License-Identifier: Apache-2.0
"""INV-BOUNDED for hostile logs: whatever a ring of up to 1 GiB holds, reading it takes bounded time and memory.

Each case is a process of its own with a limit of addresses and of processor time, so that neither can be exceeded
unnoticed. The rings are not stored: a store repeats a few sectors. Everyday runs take a small part of the largest log.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.harness.stores import MemStore
from tests.support import ROOT, daily_or_nightly
from tests.vhdkit.formats.vhdx.images import LOG_GUID, image, page, set_header
from vhdkit.errors import CorruptImage
from vhdkit.formats.vhdx import layout, log
from vhdkit.formats.vhdx.header import current_header, read_headers
from vhdkit.formats.vhdx.layout import LogEntryHeader
from vhdkit.formats.vhdx.log import LogChange
from vhdkit.formats.vhdx.replay import Replay, read_log
from vhdkit.units import GIB, MIB, TIB

LOG = 32 * MIB
MAX_ADDRESSES = 3 * GIB  # numpy and the program take half a gigabyte of them
MAX_CPU_SECONDS = daily_or_nightly(40, 300)  # ten times what they take
LOG_BYTES = daily_or_nightly(32 * MIB, layout.MAX_LOG_BYTES)
ZERO_RANGES = daily_or_nightly(1 << 14, 1 << 18)
CASES = {
    "heads": "log-sequence",
    "empty entries": "1 entries",
    "one sequence": "replayed",
    "many zeros": "replayed",
    "too many zeros": "log-entry",
    "zeros far away": "log-offset",
}


class Ring(MemStore):
    """An image whose log begins with `front` and then repeats `piece`."""

    def __init__(self, size_bytes: int, piece: bytes, front: bytes = b"") -> None:
        base = image()
        set_header(base, log_guid=LOG_GUID, log_offset=LOG, log_length=size_bytes)
        super().__init__("image.vhdx", sectors=base._sectors, size_bytes=LOG + size_bytes)
        self._piece, self._front = piece * (-(-MIB // len(piece)) + 1), front
        self._step = len(piece)

    def pread(self, offset_bytes: int, size_bytes: int) -> bytes:
        """See `ReadStore.pread`."""
        if offset_bytes < LOG:
            return super().pread(offset_bytes, size_bytes)
        place, found = offset_bytes - LOG, bytearray()
        while len(found) < size_bytes:
            at = place + len(found)
            wanted = min(size_bytes - len(found), MIB)
            if at < len(self._front):
                found += self._front[at : at + wanted]
            else:
                start = (at - len(self._front)) % self._step
                found += self._piece[start : start + wanted]
        return bytes(found)

    def data_runs(self, offset_bytes: int, size_bytes: int):  # type: ignore[no-untyped-def]
        """See `ReadStore.data_runs`: nothing is a hole."""
        yield offset_bytes, size_bytes, True


def entry(changes: list[LogChange], number: int = 5, tail: int = 0) -> bytes:
    """An entry of the log."""
    return log.build_entry(LOG_GUID, number, tail, changes, flushed_file_offset=0, last_file_offset=0)


def ring(case: str, size: int) -> Ring:
    """The log of a case."""
    if case == "heads":  # each claims all that follows
        head = LogEntryHeader(b"loge", 1, size, 0, 5, 0, 0, LOG_GUID, 0, 0)
        return Ring(size, layout.build_log_entry_header(head).ljust(log.SECTOR, b"\0"))
    if case == "empty entries":
        return Ring(size, entry([]))
    if case == "one sequence":
        parts, at = [], 0
        for number in range(size // MIB * 2):
            raw = entry([LogChange(layout.REGION_TABLE_OFFSETS[0], log.SECTOR, page(b"p"))] * 100, 1 + number)
            parts.append(raw)
            at += len(raw)
        return Ring(size, bytes(log.SECTOR), b"".join(parts))
    zeros = {"many zeros": ZERO_RANGES, "too many zeros": (1 << 19) + 1, "zeros far away": 10}[case]
    far = 60 * TIB if case == "zeros far away" else 8 * MIB
    many = [LogChange(2 * MIB + log.SECTOR * (one % 250), log.SECTOR * (1 + one % 7), None) for one in range(zeros)]
    return Ring(size, bytes(log.SECTOR), entry([*many, LogChange(far, 8 * TIB if far > TIB else log.SECTOR, None)]))


def read(case: str, size: int) -> str:
    """How reading the log of a case ends."""
    store = ring(case, size)
    try:
        found = read_log(store, current_header(store.name, read_headers(store)))
    except CorruptImage as error:
        return str(error.reason)
    assert isinstance(found, Replay)
    return f"{len(found.entries)} entries" if case == "empty entries" else "replayed"


PROGRAM = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[3]),) * 2)
resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[4]),) * 2)
from tests.vhdkit.formats.vhdx.test_log_limits import read
print(read(sys.argv[1], int(sys.argv[2])))
"""


@pytest.mark.parametrize("case", CASES)
def test_a_hostile_log(case: str) -> None:
    """INV-BOUNDED: it ends in bounded time and memory, with the changes or with the reason why there are none."""
    command = [sys.executable, "-c", PROGRAM, case, str(LOG_BYTES), str(MAX_ADDRESSES), str(MAX_CPU_SECONDS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:] or f"ended by signal {-done.returncode}"
    assert done.stdout.strip() == CASES[case]


def test_the_limits_are_watched() -> None:
    """Self-test: with less time or fewer addresses the same program fails."""
    for addresses, seconds in ((MAX_ADDRESSES, 0), (64 * MIB, MAX_CPU_SECONDS)):
        command = [sys.executable, "-c", PROGRAM, "heads", str(64 * MIB), str(addresses), str(seconds)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode != 0
