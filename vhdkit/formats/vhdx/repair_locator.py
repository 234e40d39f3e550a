# SPDX-License-Identifier: Apache-2.0
"""The repair of a parent locator that cannot be read.

Decides which parts of it are kept. Must not know where a parent lies: `chain.verbs.repair` searches for it by its id,
and writes names that lead to it.

- Legible ids and paths are kept, and so are ids whose text is found anywhere in the item.
- With an id, a child finds its parent again whatever the names are. Without one, and with consent, the child gets an
  id that no image has, after which `rebase` can set the parent.
- A locator of another type comes from a newer program, and is left alone.

Source: [MS-VHDX] 2.6.2.6.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from dataclasses import replace

from vhdkit.errors import CorruptImage, CorruptReason
from vhdkit.formats.draft import DraftStore
from vhdkit.formats.format import Consent, Fix
from vhdkit.formats.vhdx import layout
from vhdkit.formats.vhdx.items import Item, free_place, read_table
from vhdkit.formats.vhdx.layout import MetadataEntry, RegionEntry
from vhdkit.formats.vhdx.locator import (
    LINKAGE,
    LINKAGE_2,
    MAX_PAIRS,
    PATH_KEYS,
    RELATIVE,
    build_locator,
    linkage_text,
    parse_locator,
)
from vhdkit.formats.vhdx.metadata import read_metadata
from vhdkit.formats.vhdx.regions import read_regions
from vhdkit.formats.vhdx.repair_headers import LOSS
from vhdkit.image import NULL_ID

UNKNOWN_PARENT = (
    ".\\unknown.vhdx"  # a path is required; a file there is not accepted as the parent, because its id differs
)
_REBASE = "`vhdkit rebase` with --accept-parent-id then sets the parent"
_ID = re.compile(r"(?<!Volume)\{[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\}")
_DAMAGED = (CorruptReason.LOCATOR_LENGTH, CorruptReason.LOCATOR_TEXT, CorruptReason.LOCATOR_KEYS)


def mend_locator(draft: DraftStore, consent: Consent) -> Iterator[Fix]:
    """Leave a readable locator in a child, if the rest of its metadata can be read."""
    try:
        read_metadata(draft)
        return
    except CorruptImage as error:
        if error.reason not in (*_DAMAGED, CorruptReason.ITEM_MISSING):
            return
    region = read_regions(draft, (layout.HEADER_SECTION_SIZE, 0)).metadata
    items = read_table(draft, region)
    known = {one.entry.item_id: one for one in items if not one.is_user}
    item = known.get(layout.ITEM_PARENT_LOCATOR)
    parameters = known.get(layout.ITEM_FILE_PARAMETERS)
    if item is None and (parameters is None or not parameters.raw[4:5] or not parameters.raw[4] & layout.HAS_PARENT):
        return
    pairs = {} if item is None else _legible(item.raw, draft.name)
    ids = [one for one in (_id_of(pairs.get(LINKAGE)), _id_of(pairs.get(LINKAGE_2))) if one is not None]
    ids = (ids or ([] if item is None else _ids_in(item.raw)))[:2]
    is_known = bool(ids)
    if not is_known and not consent.data_loss:
        message = "the parent's id can no longer be read; with an id that no image has"
        yield Fix("locator", f"{message}, the image can be repaired, and {_REBASE}", LOSS)
        return
    new = {LINKAGE: linkage_text(ids[0] if ids else uuid.uuid4().bytes)}
    new |= {key: pairs[key] for key in PATH_KEYS if pairs.get(key)}
    if len(new) == 1:
        new[RELATIVE] = UNKNOWN_PARENT
    if len(ids) > 1:
        new[LINKAGE_2] = linkage_text(ids[1])
    trial = DraftStore(draft)
    if not _put(trial, region, items, item, build_locator(new)):
        return
    try:
        read_metadata(trial)
    except CorruptImage:
        return
    _put(draft, region, items, item, build_locator(new))
    if is_known:
        yield Fix("locator", "wrote the parent locator anew with its legible parts; the parent's id is kept")
    else:
        yield Fix("locator", f"wrote a parent locator with an id that no image has: {_REBASE}")


def _legible(raw: bytes, path: str) -> dict[str, str]:
    """The pairs that can be read, each on its own."""
    pairs: dict[str, str] = {}
    count = layout.parse_locator_header(raw[: layout.LOCATOR_HEADER_SIZE].ljust(20, b"\0")).key_value_count
    for number in range(min(count, MAX_PAIRS)):
        start = layout.LOCATOR_HEADER_SIZE + number * layout.LOCATOR_ENTRY_SIZE
        if start + layout.LOCATOR_ENTRY_SIZE > len(raw):
            break
        entry = layout.parse_locator_entry(raw[start : start + layout.LOCATOR_ENTRY_SIZE])
        key = raw[entry.key_offset : entry.key_offset + entry.key_length]
        value = raw[entry.value_offset : entry.value_offset + entry.value_length]
        try:
            pairs |= parse_locator(build_locator({key.decode("utf-16-le"): value.decode("utf-16-le")}), path, 0)
        except (CorruptImage, UnicodeError, AssertionError):
            continue
    return pairs


def _id_of(text: str | None) -> bytes | None:
    """The id in the text of a linkage, or None."""
    try:
        found = uuid.UUID(text or "").bytes
    except ValueError:
        return None
    return found if found != NULL_ID else None


def _ids_in(raw: bytes) -> list[bytes]:
    """The ids in the item that are written as linkages are, at any position."""
    found: list[bytes] = []
    for shift in range(2):
        text = raw[shift:].decode("utf-16-le", "replace")
        found += [one for match in _ID.findall(text) if (one := _id_of(match)) is not None and one not in found]
    return found


def _put(draft: DraftStore, region: RegionEntry, items: list[Item], item: Item | None, raw: bytes) -> bool:
    """Write the locator and its entry in the metadata table; returns False if they do not fit."""
    others = ((one.entry.offset, one.entry.length) for one in items if one is not item and one.entry.length)
    offset = free_place(others, len(raw), region.length)
    number = len(items) if item is None else items.index(item)
    if offset is None or number >= layout.MAX_ITEMS:
        return False
    entry = MetadataEntry(layout.ITEM_PARENT_LOCATOR, offset, len(raw), layout.ITEM_IS_REQUIRED, 0)
    place = region.file_offset + layout.METADATA_TABLE_HEADER_SIZE + number * layout.METADATA_ENTRY_SIZE
    draft.pwrite(place, layout.build_metadata_entry(entry))
    head = layout.parse_metadata_table(draft.pread(region.file_offset, layout.METADATA_TABLE_HEADER_SIZE))
    head = replace(head, entry_count=max(number + 1, len(items)))
    draft.pwrite(region.file_offset, layout.build_metadata_table(head))
    draft.pwrite(region.file_offset + offset, raw)
    return True
