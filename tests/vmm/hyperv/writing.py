# SPDX-License-Identifier: Apache-2.0
"""Configurations of Hyper-V written from a tree, in both encodings; and trees that tests read."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from itertools import accumulate
from typing import TypeAlias
from xml.sax.saxutils import escape
from zlib import crc32

from vmm.hyperv.keys import Key

PAGE = 0x1000
TABLES_START = 0x3000  # in a file without long values, which lie before
LOG_START = 0x8000  # if what lies before it is short enough
_KINDS: dict[type, tuple[int, str]] = {int: (3, "integer"), bool: (8, "bool"), str: (6, "string"), bytes: (7, "bytes")}

Change: TypeAlias = "tuple[int, bytes]"  # target, data


def as_xml(tree: Key, *, encoding: str = "utf-16-le", mark: bytes = b"\xff\xfe") -> bytes:
    """A tree as Windows Server 2012 R2 writes it."""
    lines = ['<?xml version="1.0" encoding="UTF-16" standalone="yes"?>']

    def put(key: Key, indent: str) -> None:
        if key.value is None:
            lines.append(f"{indent}<{key.name}>")
            for child in key.children:
                put(child, indent + "  ")
            lines.append(f"{indent}</{key.name}>")
            return
        text = base64.b64encode(key.value).decode() + "\n" if isinstance(key.value, bytes) else str(key.value)
        kind = _KINDS[type(key.value)][1]
        lines.append(f'{indent}<{key.name} type="{kind}">{escape(text)}</{key.name}>')

    for child in tree.children:
        put(child, "")
    return mark + "\r\n".join(lines).encode(encoding)


def sealed(raw: bytes, place: int) -> bytes:
    """A structure with its checksum at `place`."""
    return raw[:place] + struct.pack("<I", crc32(raw[:place] + bytes(4) + raw[place + 4 :])) + raw[place + 4 :]


def header(sequence: int, *, version: int = 0x400, log: int = LOG_START) -> bytes:
    """A header of a container."""
    return sealed(struct.pack("<IIHIQIQQI", 0x01282014, 0, sequence, version, 0, PAGE, log, PAGE, PAGE), 4)


def object_line(kind: int, offset: int, size: int, in_use: int = 1) -> bytes:
    """A line of the table of objects."""
    return sealed(struct.pack("<BIQIB", kind, 0, offset, size, in_use), 1)


def object_table(lines: Sequence[bytes], count: int = 227) -> bytes:
    """A table of objects; lines that are not given are not in use."""
    return struct.pack("<II", 0x01110001, count) + b"".join(
        [*lines, *[object_line(0, 0, 0, 0)] * (count - len(lines))]
    )


def log_head(active: int) -> bytes:
    """The head of a log."""
    return sealed(struct.pack("<IIIBI17s", 0x01110003, 0, active, 0, 145, bytes(17)), 4)


def as_log(changes: Sequence[Change], active: int | None = None) -> bytes:
    """A log with these entries, of which the first ones are active."""
    position = 34 + 28 * len(changes)
    entries, data = b"", b""
    for target, content in changes:
        raw = struct.pack("<QIIIII", target, len(content), position + len(data), 0, 0, crc32(content))
        entries += sealed(raw, 20)
        data += content
    return log_head(len(changes) if active is None else active) + entries + data


def entry(kind: int, name: str, value: bytes, parent: tuple[int, int], insertion: int, *, flags: int = 0,
          slack: int = 0) -> bytes:  # fmt: skip
    """A key of a table."""
    raw_name = name.encode() + b"\0"
    size = 21 + len(raw_name) + len(value) + slack
    head = struct.pack("<BBIHIIIB", kind, flags, size, *parent, 0, insertion, len(raw_name))
    return sealed(head + raw_name + value, 12) + bytes(range(1, slack + 1))


class Writer:
    """Writes one container. `long_bytes`: values from that size on get an object of their own."""

    def __init__(self, *, table_bytes: int = PAGE, long_bytes: int = 0x800, slack: int = 0) -> None:
        self._table_bytes = table_bytes
        self._long_bytes = long_bytes
        self._slack = slack
        self._tables: list[bytes] = [b""]
        self._values: list[bytes] = []
        self._insertion = 0
        self.entries: list[tuple[int, int]] = []  # places in the file, sizes without slack

    def write(self, tree: Key, changes: Sequence[Change] = (), *, active: int | None = None) -> bytes:
        """A whole file."""
        for child in tree.children:
            self._put(child, (0, 0))
        pages = [value.ljust(_room(value), b"\0") for value in self._values]
        starts = list(accumulate(map(len, pages), initial=TABLES_START))
        lines = [object_line(3, start, len(page)) for start, page in zip(starts, pages, strict=False)]
        place = starts[-1]
        for number, table in enumerate(self._tables, 1):
            content = sealed(struct.pack("<HHHI", 2, number, 1, 0), 6) + table
            pages.append(content.ljust(self._table_bytes, b"\0"))
            lines.append(object_line(2, place, self._table_bytes))
            place += self._table_bytes
        log = max(LOG_START, place)
        head = [header(2, log=log), header(1, log=log), object_table(lines)]
        raw = b"".join([*(part.ljust(PAGE, b"\0") for part in head), *pages])
        first = starts[-1] - TABLES_START
        self.entries = [(offset + first, size) for offset, size in self.entries]
        return raw.ljust(log, b"\0") + as_log(changes, active)

    def _put(self, key: Key, parent: tuple[int, int]) -> None:
        self._insertion += 1
        flags = 0
        if key.value is None:
            kind, value = 9, struct.pack("<QI", 0, self._insertion + 1)
        else:
            kind = _KINDS[type(key.value)][0]
            if isinstance(key.value, bool):
                value = struct.pack("<I", key.value)
            elif isinstance(key.value, int):
                value = struct.pack("<q", key.value)
            else:
                assert isinstance(key.value, str | bytes)
                content = key.value.encode("utf-16-le") if isinstance(key.value, str) else key.value
                value = struct.pack("<I", len(content)) + content
                if len(content) >= self._long_bytes:
                    flags = 1
                    value = struct.pack("<IQ", len(content), self._object(content))
        raw = entry(kind, key.name, value, parent, self._insertion, flags=flags, slack=self._slack)
        if 10 + len(self._tables[-1]) + len(raw) > self._table_bytes:
            self._tables.append(b"")
        offset = 10 + len(self._tables[-1])
        self._tables[-1] += raw
        number = len(self._tables)
        self.entries.append((TABLES_START + (number - 1) * self._table_bytes + offset, len(raw) - self._slack))
        for child in key.children:
            self._put(child, (number, offset))

    def _object(self, content: bytes) -> int:
        """Where it will lie."""
        place = TABLES_START + sum(map(_room, self._values))
        self._values.append(content)
        return place


def _room(value: bytes) -> int:
    return -(-len(value) // PAGE) * PAGE


def tree(**parts: object) -> Key:
    """A tree from nested dicts."""
    return Key("", None, tuple(_key(name, value) for name, value in parts.items()))


def _key(name: str, value: object) -> Key:
    if isinstance(value, dict):
        return Key(name, None, tuple(_key(inner, below) for inner, below in value.items()))
    assert isinstance(value, int | str | bytes)
    return Key(name, value)
