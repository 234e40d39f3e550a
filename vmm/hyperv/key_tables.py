# SPDX-License-Identifier: Apache-2.0
"""The keys of a container (VMCX, VMRS): from its tables of keys to one tree.

Decides which of several tables counts, what an entry's value is, and which keys lie below which. Must not know where
tables lie in the file (`container`), nor what any key means.

A key may stand in an earlier table than the key above it, so they are linked when all tables have been read.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import NoReturn

from vmm.hyperv import layout
from vmm.hyperv.container import Container
from vmm.hyperv.keys import MAX_DEPTH, MAX_KEYS, Key, Value
from vmm.hyperv.problems import refuse

_MAX_TABLE_BYTES = 1 << 20  # those of real files have 4096
_NUMBERS = {
    layout.SIGNED: struct.Struct("<q"),
    layout.UNSIGNED: struct.Struct("<Q"),
    layout.DOUBLE: struct.Struct("<d"),
    layout.BOOLEAN: struct.Struct("<I"),
    layout.NODE: struct.Struct("<QI"),
}
_SIZE = struct.Struct("<I")


@dataclass(slots=True)
class _UnlinkedKey:
    """A key before it is linked."""

    name: str
    value: Value | None
    is_node: bool
    parent: tuple[int, int]  # the index of its table, its place there
    insertion: int
    place: int  # in the file
    below: list[_UnlinkedKey] = field(default_factory=list)


def read_keys(container: Container) -> Key:
    """The tree of all keys, below a key without a name. Raises BadConfiguration, OSError."""
    return _Tables(container).tree()


class _Tables:
    """One reading of one file."""

    def __init__(self, container: Container) -> None:
        self._container = container
        self._keys: dict[tuple[int, int], _UnlinkedKey] = {}
        self._objects: dict[int, int] | None = None  # with values: their places and sizes

    def tree(self) -> Key:
        """See `read_keys`."""
        for index, (start, raw) in self._tables().items():
            self._read(index, start, raw)
        return self._linked()

    def _refuse(self, problem: str, at_byte: int) -> NoReturn:
        refuse(self._container.path, problem, at_byte=at_byte)

    def _tables(self) -> dict[int, tuple[int, bytes]]:
        """The table of each index, with its place."""
        found: dict[int, tuple[int, int, bytes]] = {}
        for line in self._container.objects(layout.KEY_TABLE):
            start = line.offset_bytes
            if not layout.KEY_TABLE_BYTES <= line.size_bytes <= _MAX_TABLE_BYTES:
                self._refuse(f"a table of keys has {line.size_bytes} bytes", start)
            raw = self._container.read("a table of keys", start, line.size_bytes)
            head = layout.key_table(raw)
            if head is None or not head.number:
                self._refuse("the head of a table of keys is damaged", start)
            other = found.get(head.number)
            if other is not None and other[0] == head.sequence:
                self._refuse(f"two tables of keys have the index {head.number} and one sequence,", start)
            if other is None or other[0] < head.sequence:
                found[head.number] = head.sequence, start, raw
        if not found:
            refuse(self._container.path, "it has no table of keys")
        return {index: (start, raw) for index, (_, start, raw) in found.items()}

    def _read(self, index: int, start: int, raw: bytes) -> None:
        """Every entry of a table."""
        offset = layout.KEY_TABLE_BYTES
        while offset + layout.ENTRY_BYTES <= len(raw):
            entry = layout.entry(raw, offset)
            if not entry.size_bytes:
                return
            if entry.size_bytes < layout.ENTRY_BYTES or offset + entry.size_bytes > len(raw):
                self._refuse(f"a key has {entry.size_bytes} bytes, which its table does not hold,", start + offset)
            if entry.kind != layout.FREE:
                if len(self._keys) == MAX_KEYS:
                    self._refuse(f"it has more than {MAX_KEYS} keys,", start + offset)
                found = self._key(entry, raw[offset : offset + entry.size_bytes], start + offset)
                self._keys[index, offset] = found
            offset += entry.size_bytes

    def _key(self, entry: layout.KeyEntry, raw: bytes, place: int) -> _UnlinkedKey:
        after_name = layout.ENTRY_BYTES + entry.name_bytes
        size = self._value_bytes(entry, raw, after_name, place)
        if after_name + size > len(raw):
            self._refuse("a key is longer than its entry", place)
        if not layout.is_entry_intact(raw[: after_name + size], entry):
            self._refuse("a key is damaged: its checksum is wrong", place)
        name = raw[layout.ENTRY_BYTES : after_name]
        if not name.endswith(b"\0"):
            self._refuse("the name of a key has no end", place)
        try:
            text = name[:-1].decode()
        except UnicodeDecodeError:
            self._refuse("the name of a key is not UTF-8", place)
        value = None
        if entry.kind != layout.NODE:
            value = self._value(entry, raw[after_name : after_name + size], place)
        parent = entry.parent_table, entry.parent_offset_bytes
        return _UnlinkedKey(text, value, entry.kind == layout.NODE, parent, entry.insertion, place)

    def _value_bytes(self, entry: layout.KeyEntry, raw: bytes, start: int, place: int) -> int:
        """The length of a value, as it stands in the entry."""
        if entry.kind in _NUMBERS:
            return _NUMBERS[entry.kind].size
        if entry.kind not in (layout.STRING, layout.BYTES):
            self._refuse(f"a key is of the unknown kind {entry.kind}", place)
        if entry.flags & layout.IN_OBJECT:
            return layout.VALUE_PLACE_BYTES
        if start + _SIZE.size > len(raw):
            self._refuse("a key is longer than its entry", place)
        size: int = _SIZE.unpack_from(raw, start)[0]
        return _SIZE.size + size

    def _value(self, entry: layout.KeyEntry, raw: bytes, place: int) -> Value:
        if entry.kind == layout.BOOLEAN:
            return bool(_NUMBERS[entry.kind].unpack(raw)[0])
        if entry.kind in _NUMBERS:
            number: int | float = _NUMBERS[entry.kind].unpack(raw)[0]
            return number
        content = self._object(raw) if entry.flags & layout.IN_OBJECT else raw[_SIZE.size :]
        if entry.kind == layout.BYTES:
            return content
        try:
            return content.decode("utf-16-le")
        except UnicodeDecodeError:
            self._refuse("the text of a key is not UTF-16", place)

    def _object(self, raw: bytes) -> bytes:
        """A value that does not stand in its entry."""
        size, offset = layout.value_place(raw)
        if self._objects is None:
            lines = self._container.objects(layout.VALUE)
            self._objects = {line.offset_bytes: line.size_bytes for line in lines}
        if offset not in self._objects:
            self._refuse("the object of a value is not in the table of objects,", offset)
        if size > self._objects[offset]:
            self._refuse(f"a value of {size} bytes is longer than its object", offset)
        return self._container.read("a value", offset, size)

    def _linked(self) -> Key:
        roots: list[_UnlinkedKey] = []
        for found in sorted(self._keys.values(), key=lambda one: (one.insertion, one.place)):
            if not found.parent[0]:
                roots.append(found)
                continue
            parent = self._keys.get(found.parent)
            if parent is None or not parent.is_node:
                self._refuse("the key above a key does not exist,", found.place)
            parent.below.append(found)
        linked = 0
        levels = [roots]
        while levels[-1]:
            linked += len(levels[-1])
            if len(levels) > MAX_DEPTH:
                self._refuse(f"its keys lie deeper than {MAX_DEPTH},", levels[-1][0].place)
            levels.append([child for one in levels[-1] for child in one.below])
        if linked != len(self._keys):
            reached = {id(one) for level in levels for one in level}
            lost = next(one for one in self._keys.values() if id(one) not in reached)
            self._refuse("a key lies below itself,", lost.place)
        built: dict[int, Key] = {}
        for level in reversed(levels):
            for one in level:
                built[id(one)] = Key(one.name, one.value, tuple(built.pop(id(child)) for child in one.below))
        return Key("", None, tuple(built[id(one)] for one in roots))
