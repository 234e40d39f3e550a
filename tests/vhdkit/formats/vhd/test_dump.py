# SPDX-License-Identifier: Apache-2.0
"""The raw structures, field by field."""

from __future__ import annotations

import struct

from tests.harness.vhd_builder import FIXED, Vhd, child
from vhdkit.formats.format import StructureDump
from vhdkit.formats.vhd.dump import dump_vhd


def dumps(image: Vhd) -> dict[str, StructureDump]:
    """The structures, by name."""
    return {one.structure: one for one in dump_vhd(image.build().store(frozen=True))}


def value(dump: StructureDump, name: str) -> str:
    """One field's value."""
    return next(one.value for one in dump.fields if one.name == name)


def test_fields_carry_their_place_in_the_file() -> None:
    """The bytes at each field's offset are the value shown."""
    built = child(size=4 << 20, timestamp=77).build()
    store = built.store()
    by_name = {one.structure: one for one in dump_vhd(store)}
    for name in ("footer", "footer copy"):
        stamp = next(one for one in by_name[name].fields if one.name == "timestamp")
        assert struct.unpack(">I", store.pread(stamp.offset_bytes, stamp.size_bytes)) == (77,)
        assert stamp.value == "77 (0x4d)"
    assert value(by_name["dynamic header"], "parent_unicode_name") == "'parent.vhd'"
    assert value(by_name["parent locator 1 (W2ru)"], "text") == "'.\\\\parent.vhd'"


def test_a_fixed_image_has_one_structure() -> None:
    """Only the footer is shown, even if the guest's first sector looks like one."""
    footer = Vhd().footer()
    assert list(dumps(Vhd(disk_type=FIXED, data=footer))) == ["footer"]


def test_damaged_structures_are_shown_with_their_state() -> None:
    """A damaged footer, header or locator is shown as it is, and called damaged."""
    shown = dumps(child(tail=b"\xc7" * 512))
    assert "0xC7" in shown["footer"].state and shown["footer copy"].state == "good"
    broken = child().build()
    store = broken.store()
    store.pwrite(512 + 40, b"\xff")
    states = {one.structure: one.state for one in dump_vhd(store)}
    assert states["dynamic header"] == "checksum wrong"
    store.pwrite(512, b"nonsense")
    assert {one.structure: one.state for one in dump_vhd(store)}["dynamic header"] == "cookie wrong"


def test_anything_can_be_dumped() -> None:
    """Noise, and a file too short for any structure, give structures marked absent and no error."""
    image = Vhd().build()
    for size in (0, 1, 511, 512, 600):
        image.size = size
        for one in dump_vhd(image.store()):
            assert one.state
