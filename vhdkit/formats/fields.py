# SPDX-License-Identifier: Apache-2.0
"""Where the fields of a format's structures lie: for the documentation, `dump` and their tests. Decides nothing."""

from __future__ import annotations

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
