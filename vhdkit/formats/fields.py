# SPDX-License-Identifier: Apache-2.0
"""Where the fields of a format's structures lie, for the documentation, `dump` and their tests; and reading them.

Decides nothing: `construct` declares the structures in `layout`. `Packed` reads and builds them with `struct`, which
takes a third to a sixth of the time: a merge of eight VHDX parses six hundred of them.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, NamedTuple


class Field(NamedTuple):
    """Where a field lies in its structure."""

    name: str
    offset_bytes: int
    size_bytes: int


def fields_of(structure: Any) -> tuple[Field, ...]:
    """The fields of a `construct.Struct`, in order, without gaps."""
    fields, offset = [], 0
    for part in structure.subcons:
        fields.append(Field(part.name, offset, part.sizeof()))
        offset += part.sizeof()
    return tuple(fields)


class Packed:
    """A `construct.Struct` of numbers in one byte order, and of bytes; anything else in it is taken as bytes."""

    def __init__(self, structure: Any) -> None:
        self.names = tuple(part.name for part in structure.subcons)
        codes = [getattr(part.subcon, "fmtstr", f"={part.sizeof()}s") for part in structure.subcons]
        orders = {code[0] for code in codes if code[-1] not in "sB"}
        assert len(orders) <= 1, "one byte order"
        self._struct = struct.Struct("".join([*orders] or ["="]) + "".join(code[1:] for code in codes))
        self._sizes = {part.name: part.sizeof() for part, code in zip(structure.subcons, codes, strict=True)
                       if code.endswith("s")}  # fmt: skip
        assert self._struct.size == structure.sizeof()

    def parse(self, raw: bytes) -> dict[str, Any]:
        """The fields at the start of `raw`, which may be longer."""
        return dict(zip(self.names, self._struct.unpack_from(raw), strict=True))

    def build(self, values: Mapping[str, Any]) -> bytes:
        """The bytes of the structure. Bytes must have the length of their field, numbers its range."""
        assert all(len(values[name]) == size for name, size in self._sizes.items())
        return self._struct.pack(*[values[name] for name in self.names])
