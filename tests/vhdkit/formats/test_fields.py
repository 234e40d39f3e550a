# SPDX-License-Identifier: Apache-2.0
"""Structures read and built with `struct` are those that `construct` declares."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from construct import Int8ub, Int16ub, Int16ul
from construct import Struct as Declared
from hypothesis import given, settings
from hypothesis import strategies as st

from vhdkit.formats.fields import Packed, fields_of
from vhdkit.formats.vhd import layout as vhd
from vhdkit.formats.vhdx import layout as vhdx

DECLARED: dict[str, Any] = {
    f"{module.__name__}.{name}": value
    for module in (vhd, vhdx)
    for name, value in vars(module).items()
    if isinstance(value, Declared)
}


def plain(value: Any, declared: Any) -> dict[str, Any]:
    """What `construct` has parsed, with arrays as the bytes that they are."""
    found = {}
    for part in declared.subcons:
        one = value[part.name]
        found[part.name] = one if isinstance(one, int | bytes) else bytes(part.build(one))
    return found


@pytest.mark.parametrize("name", DECLARED)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_both_read_and_build_the_same(name: str, data: st.DataObject) -> None:
    """For any bytes the fields are the same, and those that follow the structure do not matter."""
    declared = DECLARED[name]
    size, packed = declared.sizeof(), Packed(declared)
    raw = data.draw(st.binary(min_size=size, max_size=size))
    found = packed.parse(raw + b"more")
    assert found == plain(declared.parse(raw), declared)
    assert packed.build(found) == raw
    assert packed.names == tuple(field.name for field in fields_of(declared))


def test_every_structure_of_the_documentation_is_declared_so() -> None:
    """None is left out above."""
    tables = [*vhd.STRUCTURES.values(), *vhdx.STRUCTURES.values()]
    assert all(any(fields_of(one) == table for one in DECLARED.values()) for table in tables)


def test_values_that_do_not_fit_are_refused() -> None:
    """Bytes of another length and numbers out of range are never cut, and too few bytes are not read."""
    packed = Packed(vhdx._REGION_ENTRY)
    good = {"guid": bytes(16), "file_offset": 1, "length": 2, "required": 1}
    assert len(packed.build(good)) == 32
    for wrong in ({"guid": bytes(15)}, {"guid": bytes(17)}):
        with pytest.raises(AssertionError):
            packed.build(good | wrong)
    for number in ({"length": 1 << 32}, {"length": -1}, {"file_offset": 1 << 64}):
        with pytest.raises(struct.error):
            packed.build(good | number)
    with pytest.raises(struct.error):
        packed.parse(bytes(31))


def test_two_byte_orders_are_refused() -> None:
    """`struct` has one for a whole structure; single bytes have none."""
    assert Packed(Declared("a" / Int8ub, "b" / Int16ul)).parse(b"\x01\x02\x03") == {"a": 1, "b": 0x302}
    with pytest.raises(AssertionError, match="one byte order"):
        Packed(Declared("a" / Int16ub, "b" / Int16ul))
