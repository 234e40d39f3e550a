# SPDX-License-Identifier: Apache-2.0
"""Read an export of `vhdkit serve` with libnbd: its size, how much of it is data, and a hash of the data.

    vhdkit serve leaf.avhd --read-only --socket /tmp/disk.sock
    /usr/bin/python3 examples/read_over_nbd.py 'nbd+unix:///?socket=/tmp/disk.sock'

libnbd's Python module is a package of the system (python3-libnbd in Debian and Fedora), so the system's Python runs
this. vhdkit itself need not be installed there: the program can read any other NBD server, too.

Several reads are in flight at once, which is what makes NBD fast.
"""

from __future__ import annotations

import hashlib
import sys

import nbd

PIECE_BYTES = 1 << 20
IN_FLIGHT = 8  # reads that are sent before the first answer is awaited
MAP_BYTES = 1 << 30  # bytes covered by one block status request
HOLE = nbd.STATE_HOLE | nbd.STATE_ZERO


def data_runs(handle: nbd.NBD) -> list[tuple[int, int]]:
    """The (offset, size) of everything that may differ from zeros."""
    size = handle.get_size()
    if not handle.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION):
        return [(0, size)]
    runs = []
    position = 0

    def note(context: str, offset: int, entries: list[int], error: object) -> None:
        nonlocal position
        for length, flags in zip(entries[::2], entries[1::2], strict=True):
            if not flags & nbd.STATE_ZERO:
                runs.append((offset, min(length, size - offset)))
            offset += length
        position = offset

    while position < size:  # a server may answer for less, or for more, than was requested
        handle.block_status(min(MAP_BYTES, size - position), position, note)
    return runs


def pieces(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The runs, cut into requests."""
    return [
        (offset, min(PIECE_BYTES, start + size - offset))
        for start, size in runs
        for offset in range(start, start + size, PIECE_BYTES)
    ]


def digest(handle: nbd.NBD, runs: list[tuple[int, int]]) -> str:
    """The SHA-256 of all runs one after the other, read with several requests in flight."""
    total = hashlib.sha256()
    waiting: list[tuple[int, nbd.Buffer]] = []  # by the cookie; in the order of the disk

    def finish_first() -> None:
        cookie, buffer = waiting.pop(0)
        while not handle.aio_command_completed(cookie):  # raises nbd.Error if the read failed
            handle.poll(-1)
        total.update(buffer.to_bytearray())

    for offset, size in pieces(runs):
        if len(waiting) == IN_FLIGHT:
            finish_first()
        buffer = nbd.Buffer(size)
        waiting.append((handle.aio_pread(buffer, offset), buffer))
    while waiting:
        finish_first()
    return total.hexdigest()


def main(uri: str) -> int:
    """Print what `uri` offers."""
    handle = nbd.NBD()
    handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    try:
        handle.connect_uri(uri)
        runs = data_runs(handle)
        print(f"{handle.get_size()} bytes, {sum(size for _, size in runs)} of them data in {len(runs)} runs")
        print(f"SHA-256 of the data: {digest(handle, runs)}")
        handle.shutdown()
    except nbd.Error as error:
        print(f"{uri}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} URI")
    sys.exit(main(sys.argv[1]))
