# SPDX-License-Identifier: Apache-2.0
"""Declared structures: where their fields lie, reading and building them."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vhdkit.formats.fields import Field, Packed
from vhdkit.formats.vhd import layout as vhd
from vhdkit.formats.vhdx import layout as vhdx

DECLARED: dict[str, Packed] = {
    f"{module.__name__}.{name}": value
    for module in (vhd, vhdx)
    for name, value in vars(module).items()
    if isinstance(value, Packed)
}
ORDER: dict[str, Any] = {vhd.__name__: "big", vhdx.__name__: "little"}


@pytest.mark.parametrize("name", DECLARED)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_any_bytes_are_read_at_the_places_of_the_fields_and_built_again(name: str, data: st.DataObject) -> None:
    """The fields follow one another without gaps, in the byte order of the format; what follows does not matter."""
    packed, order = DECLARED[name], ORDER[name.rpartition(".")[0]]
    raw = data.draw(st.binary(min_size=packed.size, max_size=packed.size))
    found, end = packed.parse(raw + b"more"), 0
    for field in packed.fields:
        assert field.offset_bytes == end
        end += field.size_bytes
        piece = raw[field.offset_bytes : end]
        value = found[field.name]
        assert value == (piece if isinstance(value, bytes) else int.from_bytes(piece, order))
    assert end == packed.size
    assert packed.build(found) == raw
    assert packed.names == tuple(found) == tuple(field.name for field in packed.fields)


def test_every_structure_of_the_documentation_is_declared_so() -> None:
    """None is left out above."""
    tables = [*vhd.STRUCTURES.values(), *vhdx.STRUCTURES.values()]
    assert len(tables) == len(DECLARED) and all(
        any(one.fields == table for one in DECLARED.values()) for table in tables
    )


def test_values_that_do_not_fit_are_refused() -> None:
    """Bytes of another length and numbers out of range are never cut, and too few bytes are not read."""
    packed = Packed("<", guid="16s", file_offset="Q", length="I", required="I")
    good = {"guid": bytes(16), "file_offset": 1, "length": 2, "required": 1}
    assert len(packed.build(good)) == packed.size == 32
    for wrong in ({"guid": bytes(15)}, {"guid": bytes(17)}):
        with pytest.raises(AssertionError):
            packed.build(good | wrong)
    for number in ({"length": 1 << 32}, {"length": -1}, {"file_offset": 1 << 64}):
        with pytest.raises(struct.error):
            packed.build(good | number)
    with pytest.raises(struct.error):
        packed.parse(bytes(31))


def test_fields_follow_one_another_without_padding() -> None:
    """Also after a single byte, in both byte orders."""
    for order, value in (("<", 0x302), (">", 0x203)):
        packed = Packed(order, a="B", b="H")
        assert packed.parse(b"\x01\x02\x03") == {"a": 1, "b": value}
        assert packed.fields == (Field("a", 0, 1), Field("b", 1, 2))
