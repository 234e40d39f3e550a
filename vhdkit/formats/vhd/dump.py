# SPDX-License-Identifier: Apache-2.0
"""The raw structures of a VHD, field by field with their offsets, whether they are valid or not.

Decides how a field is shown. For examining damaged files: no value is refused here.
"""

from __future__ import annotations

from vhdkit.formats.format import FieldValue, StructureDump
from vhdkit.formats.vhd import layout
from vhdkit.formats.vhd.footers import read_footers
from vhdkit.formats.vhd.locator import Locator, read_locators
from vhdkit.formats.vhd.metadata import batmap_header_offset
from vhdkit.store import ReadStore

_SHOWN_BYTES = 64
_HEADER_FOLLOWS_BYTES = layout.FOOTER_SIZE


def dump_vhd(store: ReadStore) -> list[StructureDump]:
    """Everything that could be a structure: both footers, the header that the better one points at, its locators.

    Raises only IoFailed.
    """
    tail, copy = read_footers(store)
    dumps = [_dump("footer", tail.offset_bytes, tail.raw, layout.parse_footer, str(tail.state))]
    best = tail if tail.state.usable else copy
    if best.state.usable and best.footer.disk_type == layout.DISK_TYPE_FIXED:
        return dumps
    dumps.append(_dump("footer copy", 0, copy.raw, layout.parse_footer, str(copy.state)))
    offset = best.footer.data_offset if best.state.usable else _HEADER_FOLLOWS_BYTES
    raw = store.pread(offset, layout.HEADER_SIZE) if offset < store.size() else b""
    if len(raw) < layout.HEADER_SIZE:
        dumps.append(StructureDump("dynamic header", offset, "outside the file", ()))
        return dumps
    good = layout.checksum(raw, layout.HEADER_CHECKSUM_OFFSET) == layout.stored_checksum(
        raw, layout.HEADER_CHECKSUM_OFFSET
    )
    state = "good" if good else "checksum wrong"
    if not raw.startswith(layout.HEADER_COOKIE):
        state = "cookie wrong"
    dumps.append(_dump("dynamic header", offset, raw, layout.parse_header, state))
    if state == "cookie wrong":
        return dumps
    header = layout.parse_header(raw)
    dumps += [_dump_locator(one, header, offset) for one in read_locators(store, header)]
    batmap_offset = batmap_header_offset(header)
    batmap = store.pread(batmap_offset, layout.BATMAP_HEADER_SIZE) if batmap_offset < store.size() else b""
    if batmap.startswith(layout.BATMAP_COOKIE) and len(batmap) == layout.BATMAP_HEADER_SIZE:
        dumps.append(_dump("batmap header", batmap_offset, batmap, layout.parse_batmap_header, "present"))
    return dumps


def _dump(structure: str, offset: int, raw: bytes, parse: object, state: str) -> StructureDump:
    assert callable(parse)
    values = parse(raw)
    name = "footer" if structure == "footer copy" else structure
    fields = tuple(
        FieldValue(one.name, offset + one.offset_bytes, one.size_bytes, _shown(one.name, getattr(values, one.name)))
        for one in layout.STRUCTURES[name]
        if one.name != "parent_locators"
    )
    return StructureDump(structure, offset, state, fields)


def _dump_locator(one: Locator, header: layout.DynamicHeader, header_offset: int) -> StructureDump:
    entry = header.parent_locators[one.slot]
    offset = header_offset + layout.HEADER_LOCATORS_OFFSET + one.slot * layout.LOCATOR_SIZE
    fields = [
        FieldValue(f.name, offset + f.offset_bytes, f.size_bytes, _shown(f.name, getattr(entry, f.name)))
        for f in layout.STRUCTURES["parent locator entry"]
    ]
    fields.append(FieldValue("text", one.data_offset_bytes, one.data_length_bytes, repr(one.text)))
    return StructureDump(one.structure, offset, str(one.fault or "good"), tuple(fields))


def _shown(name: str, value: object) -> str:
    if isinstance(value, int):
        return f"{value} ({value:#x})"
    assert isinstance(value, bytes)
    if name == "parent_unicode_name":
        return repr(value.decode("utf-16-be", "replace").rstrip("\0"))
    if name == "unique_id" or name == "parent_unique_id":
        return value.hex()
    if not any(value):
        return f"{len(value)} zero bytes"
    text = value[:_SHOWN_BYTES]
    return repr(text)[1:] + ("..." if len(value) > len(text) else "")
