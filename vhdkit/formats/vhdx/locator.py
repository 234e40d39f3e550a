# SPDX-License-Identifier: Apache-2.0
"""The parent locator of a VHDX: the keys and values by which a child names its parent.

Decides how the pairs are encoded, which ids of a parent are accepted, and in which order its names are tried. Where a
name leads on this machine is decided in `chain.names.parents`; nothing here looks at a file.

Source: [MS-VHDX] 2.6.2.6; the order in which paths are tried is that of 2.6.2.6.3.
"""

from __future__ import annotations

import uuid
from typing import Any

from vhdkit.errors import CorruptImage, CorruptReason, printable
from vhdkit.formats.vhdx import layout
from vhdkit.formats.vhdx.layout import LocatorEntry, LocatorHeader
from vhdkit.image import NULL_ID, ParentName, ParentRef

LINKAGE = "parent_linkage"
LINKAGE_2 = "parent_linkage2"
RELATIVE = "relative_path"
VOLUME = "volume_path"
ABSOLUTE = "absolute_win32_path"
PATH_KEYS = (RELATIVE, VOLUME, ABSOLUTE)  # in the order in which they are tried
MAX_PAIRS = 256
MAX_TEXT_BYTES = 0xFFFE


def parse_locator(raw: bytes, path: str, offset_bytes: int) -> dict[str, str]:
    """The pairs of a locator item at this offset of the file, in stored order. Raises CorruptImage."""
    where: dict[str, Any] = {"path": path, "structure": "parent locator", "offset_bytes": offset_bytes}
    if len(raw) < layout.LOCATOR_HEADER_SIZE:
        raise CorruptImage(CorruptReason.LOCATOR_LENGTH, "is truncated", found=f"{len(raw)} bytes", **where)
    header = layout.parse_locator_header(raw[: layout.LOCATOR_HEADER_SIZE])
    if header.locator_type != layout.LOCATOR_TYPE_VHDX:
        raise CorruptImage(
            CorruptReason.LOCATOR_TYPE,
            "has a type other than that of a VHDX parent",
            expected=uuid.UUID(bytes=layout.LOCATOR_TYPE_VHDX),
            found=uuid.UUID(bytes=header.locator_type),
            **where,
        )
    end = layout.LOCATOR_HEADER_SIZE + header.key_value_count * layout.LOCATOR_ENTRY_SIZE
    if not 0 < header.key_value_count <= MAX_PAIRS or end > len(raw):
        raise CorruptImage(
            CorruptReason.LOCATOR_LENGTH,
            "has an impossible number of pairs",
            expected=f"from 1 to {MAX_PAIRS}, inside the item",
            found=header.key_value_count,
            **where,
        )
    pairs: dict[str, str] = {}
    for start in range(layout.LOCATOR_HEADER_SIZE, end, layout.LOCATOR_ENTRY_SIZE):
        entry = layout.parse_locator_entry(raw[start : start + layout.LOCATOR_ENTRY_SIZE])
        key = _text(raw, entry.key_offset, entry.key_length, where)
        if key in pairs:
            raise CorruptImage(CorruptReason.LOCATOR_TEXT, f"has the key {printable(key)!r} twice", **where)
        pairs[key] = _text(raw, entry.value_offset, entry.value_length, where)
    return pairs


def _text(raw: bytes, offset: int, length: int, where: dict[str, Any]) -> str:
    if offset < layout.LOCATOR_HEADER_SIZE or length == 0 or length % 2 or offset + length > len(raw):
        raise CorruptImage(
            CorruptReason.LOCATOR_LENGTH,
            "has a key or value in an impossible place",
            expected=f"whole UTF-16 units inside the item of {len(raw)} bytes",
            found=f"{length} bytes at byte {offset}",
            **where,
        )
    try:
        text = raw[offset : offset + length].decode("utf-16-le")
    except UnicodeDecodeError as error:
        raise CorruptImage(CorruptReason.LOCATOR_TEXT, "has a key or value that is not UTF-16", **where) from error
    if "\0" in text:
        raise CorruptImage(CorruptReason.LOCATOR_TEXT, f"has a zero character in {printable(text)!r}", **where)
    return text


def parent_ref(pairs: dict[str, str], path: str, offset_bytes: int) -> ParentRef:
    """The parent that the pairs name. Raises CorruptImage if the id or every path is missing."""
    where: dict[str, Any] = {"path": path, "structure": "parent locator", "offset_bytes": offset_bytes}
    if LINKAGE not in pairs:
        raise CorruptImage(CorruptReason.LOCATOR_KEYS, f"has no key {LINKAGE}", **where)
    ids = [_linkage(pairs[key], where) for key in (LINKAGE, LINKAGE_2) if key in pairs]
    names = tuple(ParentName(key, pairs[key]) for key in PATH_KEYS if key in pairs)
    if not names:
        raise CorruptImage(CorruptReason.LOCATOR_KEYS, "has no path to the parent", **where)
    accepted = tuple(one for one in ids if one != NULL_ID)
    if not accepted:
        raise CorruptImage(CorruptReason.LOCATOR_KEYS, f"has a {LINKAGE} of all zeros", **where)
    return ParentRef(accepted, 0, names)


def _linkage(text: str, where: dict[str, Any]) -> bytes:
    """An id from its text, in any case and with or without braces, as other programs write it."""
    try:
        if len(text.strip("{}")) != 36:
            raise ValueError(text)
        return uuid.UUID(text).bytes
    except ValueError as error:
        raise CorruptImage(
            CorruptReason.LOCATOR_KEYS, "has a linkage that is not a GUID", found=repr(printable(text[:64])), **where
        ) from error


def linkage_text(linkage_id: bytes) -> str:
    """An id as a locator records it: readers compare it as text, in lower case and with braces."""
    return f"{{{uuid.UUID(bytes=linkage_id)}}}"


def build_locator(pairs: dict[str, str]) -> bytes:
    """The bytes of a locator item with these pairs, in this order."""
    texts = [(key.encode("utf-16-le"), value.encode("utf-16-le")) for key, value in pairs.items()]
    assert all(0 < len(raw) <= MAX_TEXT_BYTES for pair in texts for raw in pair)
    head = layout.build_locator_header(LocatorHeader(layout.LOCATOR_TYPE_VHDX, 0, len(texts)))
    offset = layout.LOCATOR_HEADER_SIZE + len(texts) * layout.LOCATOR_ENTRY_SIZE
    entries, data = [], []
    for key, value in texts:
        entry = LocatorEntry(offset, offset + len(key), len(key), len(value))
        entries.append(layout.build_locator_entry(entry))
        data += [key, value]
        offset += len(key) + len(value)
    return head + b"".join(entries) + b"".join(data)
