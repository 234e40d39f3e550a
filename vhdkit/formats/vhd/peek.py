# SPDX-License-Identifier: Apache-2.0
"""Which parents a file may name, found with three reads: a quick test of many files of which few matter.

Decides nothing: it returns every id that a complete reading could find, and some that it would not. If the wanted id
is among them, the caller reads the metadata.
"""

from __future__ import annotations

import struct

from vhdkit.formats.vhd import layout
from vhdkit.store import ReadStore

_DATA_OFFSET = struct.Struct(">16xQ")
_DISK_TYPE = struct.Struct(">60xI")
_PARENT_ID_OFFSET = 40  # in the dynamic header


def parent_ids(store: ReadStore) -> frozenset[bytes]:
    """The parent ids in the headers of a differencing image, whichever footer is used.

    Empty for anything else. Raises IoFailed.
    """
    size = store.size()
    if size < layout.FOOTER_SIZE + layout.HEADER_SIZE:
        return frozenset()
    end = store.pread(size - layout.FOOTER_SIZE, layout.FOOTER_SIZE)
    footers = (end, end[layout.FOOTER_SIZE - layout.SHORT_FOOTER_SIZE :], store.pread(0, layout.FOOTER_SIZE))
    places = {_DATA_OFFSET.unpack_from(raw)[0] for raw in footers if _is_differencing(raw)}
    found = set()
    for place in places:
        raw = store.pread(place, _PARENT_ID_OFFSET + layout.UUID_SIZE) if place < size else b""
        if len(raw) == _PARENT_ID_OFFSET + layout.UUID_SIZE:
            found.add(raw[_PARENT_ID_OFFSET:])
    return frozenset(found)


def _is_differencing(raw: bytes) -> bool:
    return (
        len(raw) >= layout.SHORT_FOOTER_SIZE
        and raw.startswith(layout.FOOTER_COOKIE)
        and _DISK_TYPE.unpack_from(raw)[0] == layout.DISK_TYPE_DIFFERENCING
    )
