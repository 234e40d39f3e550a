# SPDX-License-Identifier: Apache-2.0
"""An image file as a few bytes: sparse, so that claims of 2 TiB and tables far away fit into a seed of kilobytes.

Decides how the input of a fuzz target becomes a file. Input that begins with the mark is a list of records, any
other input is the file itself, byte for byte; every input means something, so a fuzzer never wastes one.

    "SPRS" | size u64 | records: offset u64, length u16, repeat u32, bytes      numbers big-endian

`FuzzStore` is the file in memory. It refuses what the system would refuse: offsets beyond 63 bits are an
OverflowError, as they are from `os.pread`, and no file grows past what ext4 holds.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.harness.stores import MemStore
from vhdkit import errors
from vhdkit.store import Buffer
from vhdkit.units import MIB, SECTOR_SIZE, TIB

MARK = b"SPRS"
MAX_STORED_BYTES = 20 * MIB  # of records spread out: one table of 4 Mi entries fits
MAX_OFFSET = (1 << 63) - 1
MAX_FILE_BYTES = 16 * TIB
_HEAD = struct.Struct(">4sQ")
_RECORD = struct.Struct(">QHI")


@dataclass
class Sparse:
    """A file: its size and (offset, bytes, how often they are repeated) records; later ones lie over earlier ones."""

    size: int
    records: list[tuple[int, bytes, int]] = field(default_factory=list)

    def put(self, offset: int, raw: bytes, repeat: int = 1) -> None:
        """Lay bytes over the file; it does not grow."""
        self.records.append((offset, raw, repeat))

    def peek(self, offset: int, size: int) -> bytes:
        """What stands there, as far as the file goes."""
        size = max(0, min(size, self.size - offset))
        raw = bytearray(size)
        for start, piece, repeat in self.records:
            stop = start + len(piece) * repeat
            low, high = max(start, offset), min(stop, offset + size)
            if low < high:
                skip = (low - start) % len(piece)
                count = -(-(skip + high - low) // len(piece))
                raw[low - offset : high - offset] = (piece * count)[skip : skip + high - low]
        return bytes(raw)

    def encode(self) -> bytes:
        """The input that means this file."""
        body = [_RECORD.pack(offset, len(raw), repeat) + raw for offset, raw, repeat in self.records if raw]
        return _HEAD.pack(MARK, self.size) + b"".join(body)


def decode(data: bytes) -> Sparse:
    """The file that `data` means. Never fails: what is cut off or too much is left out."""
    if not data.startswith(MARK) or len(data) < _HEAD.size:
        return Sparse(len(data), [(0, data, 1)] if data else [])
    image = Sparse(min(_HEAD.unpack_from(data)[1], MAX_OFFSET))
    position, room = _HEAD.size, MAX_STORED_BYTES
    while position + _RECORD.size < len(data):
        offset, size, repeat = _RECORD.unpack_from(data, position)
        position += _RECORD.size
        raw = data[position : position + size]
        position += size
        repeat = min(repeat, room // max(len(raw), 1))
        if raw and repeat and offset < image.size:
            image.put(offset, raw, repeat)
            room -= len(raw) * repeat
    return image


class FuzzStore(MemStore):
    """A `Sparse` file in memory, with the limits of a real one."""

    def __init__(self, image: Sparse, name: str = "image.vhd") -> None:
        super().__init__(name, size_bytes=image.size)
        for offset, raw, repeat in image.records:
            self._fill(offset, raw, repeat)

    def _fill(self, offset: int, raw: bytes, repeat: int) -> None:
        whole = raw * repeat if SECTOR_SIZE % len(raw) or offset % SECTOR_SIZE else raw * (SECTOR_SIZE // len(raw))
        size = min(len(raw) * repeat, self._size - offset)
        if len(whole) != SECTOR_SIZE:
            self._change(offset, whole[:size])
            return
        first, count = offset // SECTOR_SIZE, size // SECTOR_SIZE  # a table of equal entries: one object for all
        if any(whole):
            self._sectors.update(dict.fromkeys(range(first, first + count), whole))
        else:
            self._clear(offset, count * SECTOR_SIZE)
        self._change(offset + count * SECTOR_SIZE, whole[: size - count * SECTOR_SIZE])

    def pread(self, offset_bytes: int, size_bytes: int) -> bytes:
        """See `ReadStore.pread`."""
        _refuse_overflow(offset_bytes)
        return super().pread(offset_bytes, size_bytes)

    def pread_into(self, offset_bytes: int, buffer: memoryview) -> None:
        """See `ReadStore.pread_into`."""
        _refuse_overflow(offset_bytes)
        super().pread_into(offset_bytes, buffer)

    def pwrite(self, offset_bytes: int, data: Buffer) -> None:
        """See `Store.pwrite`."""
        self._refuse_growth(offset_bytes + len(data))
        super().pwrite(offset_bytes, data)

    def reserve(self, offset_bytes: int, size_bytes: int) -> None:
        """See `Store.reserve`."""
        self._refuse_growth(offset_bytes + size_bytes)
        super().reserve(offset_bytes, size_bytes)

    def _refuse_growth(self, end: int) -> None:
        _refuse_overflow(end)
        if end > max(self._size, MAX_FILE_BYTES):
            raise errors.NoSpace("simulated: larger than the file system can hold", path=self.name)

    def data_runs(self, offset_bytes: int, size_bytes: int) -> Iterator[tuple[int, int, bool]]:
        """See `ReadStore.data_runs`: as `MemStore` has it, but quick over holes of terabytes."""
        position, end = offset_bytes, offset_bytes + size_bytes
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


def _refuse_overflow(offset: int) -> None:
    if offset > MAX_OFFSET:
        raise OverflowError("Python int too large to convert to C long")
