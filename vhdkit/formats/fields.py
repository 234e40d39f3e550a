# SPDX-License-Identifier: Apache-2.0
"""How a format's structures are declared, read and built: fields one after the other, without gaps.

Decides nothing about any format: each declares its structures in its `layout`. Built on `struct` alone, because every
command that opens an image imports it, and a merge of eight VHDX images parses six hundred structures.
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


class Packed:
    """A structure of numbers in one byte order, and of bytes."""

    def __init__(self, byte_order: str, /, **codes: str) -> None:
        """Take a byte order, `<` or `>`, and the code of each field as in `struct`, in order: `B` to `Q`, or `16s`."""
        self.packing = struct.Struct(byte_order + "".join(codes.values()))  # for callers on a hot path
        self.names = tuple(codes)
        self.size = self.packing.size  # bytes
        sizes = [struct.calcsize(byte_order + code) for code in codes.values()]
        self.fields = tuple(
            Field(name, sum(sizes[:index]), size) for index, (name, size) in enumerate(zip(codes, sizes, strict=True))
        )
        self._sizes = {field.name: field.size_bytes for field in self.fields if codes[field.name].endswith("s")}

    def parse(self, raw: bytes) -> dict[str, Any]:
        """The fields at the start of `raw`, which may be longer."""
        return dict(zip(self.names, self.packing.unpack_from(raw), strict=True))

    def build(self, values: Mapping[str, Any]) -> bytes:
        """The bytes of the structure. Bytes must have the length of their field, numbers its range."""
        assert all(len(values[name]) == size for name, size in self._sizes.items())
        return self.packing.pack(*[values[name] for name in self.names])
