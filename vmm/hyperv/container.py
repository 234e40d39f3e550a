# SPDX-License-Identifier: Apache-2.0
"""The container of keys in which Hyper-V stores configurations since Windows Server 2016 (VMCX, VMRS): its parts.

Decides which header counts, what of the log is taken into account, and which objects there are. Must not know what is
in a table of keys (`key_tables`).

The file is not trusted, and never written: the log is replayed in memory. Everything has a checksum, and what does not
fit its own is refused with its place. A file may hold the memory of a machine, too: of such a one, only what belongs
to the keys is read.

    headers ──► log ──► its active entries over the file ──► tables of objects ──► tables of keys
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from vmm.hyperv import layout
from vmm.hyperv.problems import refuse

MAX_READ_BYTES = 64 << 20  # of one file
_MAX_OBJECT_TABLES = 1024
_MAX_LOG_ENTRIES = 256  # real logs have room for 145


class Container:
    """A file, read as its log says that it should be."""

    def __init__(self, path: str, descriptor: int, size_bytes: int) -> None:
        """Of a file that stays open. Use `open_container`, which reads what is needed first."""
        self.path = path
        self._descriptor = descriptor
        self._size = size_bytes
        self._left = MAX_READ_BYTES
        self._changes: list[tuple[int, bytes]] = []

    def read(self, what: str, offset_bytes: int, size_bytes: int) -> bytes:
        """A part of the file, which `what` names. Raises BadConfiguration if the file ends before, OSError."""
        if offset_bytes + size_bytes > self._size:
            refuse(self.path, f"{what} lies past the end of the file,", at_byte=offset_bytes)
        self._left -= size_bytes
        if self._left < 0:
            refuse(self.path, f"more than {MAX_READ_BYTES} bytes of it belong to keys", hint=None)
        found = os.pread(self._descriptor, size_bytes, offset_bytes).ljust(size_bytes, b"\0")
        for start, data in self._changes:
            first, last = max(start, offset_bytes), min(start + len(data), offset_bytes + size_bytes)
            if first < last:
                found = b"".join(
                    (found[: first - offset_bytes], data[first - start : last - start], found[last - offset_bytes :])
                )
        return found

    def replay(self) -> None:
        """Take into account what the log says. Raises BadConfiguration, OSError."""
        header = self._header()
        start = header.log_offset_bytes
        if not header.log_size_bytes:
            return
        head = layout.log(self.read("the log", start, layout.LOG_BYTES))
        if head is None:
            refuse(self.path, "the head of the log is damaged", at_byte=start)
        if head.active > _MAX_LOG_ENTRIES:
            refuse(self.path, f"the log has {head.active} entries; {_MAX_LOG_ENTRIES} are read", at_byte=start)
        changes = []
        for number in range(head.active):
            place = start + layout.LOG_BYTES + number * layout.LOG_ENTRY_BYTES
            entry = layout.log_entry(self.read("an entry of the log", place, layout.LOG_ENTRY_BYTES))
            if entry is None:
                refuse(self.path, "an entry of the log is damaged", at_byte=place)
            data = self.read("what the log holds", start + entry.position_bytes, entry.size_bytes)
            if layout.checksum(data) != entry.data_checksum:
                refuse(self.path, "what the log holds is damaged", at_byte=start + entry.position_bytes)
            if entry.target_bytes + len(data) > self._size + MAX_READ_BYTES:
                refuse(self.path, "an entry of the log belongs far past the end of the file,", at_byte=place)
            changes.append((entry.target_bytes, data))
        self._changes = changes
        self._size = max(self._size, *(target + len(data) for target, data in changes), 0)

    def _header(self) -> layout.ContainerHeader:
        """The valid header with the highest sequence."""
        found = []
        for place in layout.HEADER_OFFSETS:
            if place + layout.HEADER_BYTES <= self._size:
                one = layout.header(self.read("a header", place, layout.HEADER_BYTES))
                if one is not None:
                    found.append(one)
        if not found:
            refuse(self.path, "neither of the two headers is intact, at bytes 0 and 4096")
        header = max(found, key=lambda one: one.sequence)
        if header.version != layout.VERSION:
            refuse(
                self.path,
                f"it has the version 0x{header.version:x}; only 0x{layout.VERSION:x} is known",
                hint="export the machine from a host with Windows Server 2016 to 2022, or import its disks alone",
            )
        return header

    def objects(self, kind: int) -> Iterator[layout.Object]:
        """Every object of a kind that is in use. Raises BadConfiguration, OSError."""
        tables, seen = [layout.OBJECT_TABLE_OFFSET], {layout.OBJECT_TABLE_OFFSET}
        while tables:
            place = tables.pop()
            count = layout.object_count(self.read("a table of objects", place, layout.OBJECT_TABLE_BYTES))
            if count is None:
                refuse(self.path, "the table of objects has no signature", at_byte=place)
            start = place + layout.OBJECT_TABLE_BYTES
            raw = self.read("a table of objects", start, count * layout.OBJECT_BYTES)
            for offset in range(0, len(raw), layout.OBJECT_BYTES):
                line = layout.object_line(raw[offset : offset + layout.OBJECT_BYTES])
                if line is None:
                    refuse(self.path, "a line of the table of objects is damaged", at_byte=start + offset)
                if not line.in_use:
                    continue
                if line.kind == layout.FURTHER_TABLE:
                    if line.offset_bytes in seen or len(seen) >= _MAX_OBJECT_TABLES:
                        refuse(self.path, "its tables of objects have no end,", at_byte=start + offset)
                    seen.add(line.offset_bytes)
                    tables.append(line.offset_bytes)
                elif line.kind == kind:
                    yield line


def is_container(start: bytes, second: bytes) -> bool:
    """Whether a file that holds these bytes at the places of the two headers is one, perhaps a damaged one."""
    signature = layout.HEADER_SIGNATURE.to_bytes(4, "little")
    return start.startswith(signature) or second.startswith(signature)
