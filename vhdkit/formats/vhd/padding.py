# SPDX-License-Identifier: Apache-2.0
"""The footer of a fixed image that was enlarged as if it were a raw one, so that zeros follow the footer.

Decides how far from the end such a footer is looked for, and when it counts: its size must match its place, and only
zeros may follow. Repair goes further (it also cuts off bytes other than zeros).
"""

from __future__ import annotations

from vhdkit.formats.vhd import geometry, layout
from vhdkit.store import ReadStore
from vhdkit.units import MIB, SECTOR_SIZE, round_down

MAX_PADDING_BYTES = 2 * MIB  # after the footer; programs that round files up use whole MiB
SEARCH_BYTES = MAX_PADDING_BYTES + layout.FOOTER_SIZE  # before the end of the file
_READ_BYTES = MIB // 2
_ZEROS = bytes(_READ_BYTES)


def footer_before_zeros(store: ReadStore) -> tuple[int, bytes] | None:
    """(offset, footer) of a fixed image's footer that only zeros follow, or None. Raises IoFailed."""
    size = store.size()
    end, limit = size, max(size - SEARCH_BYTES, 0)
    while end > limit:  # from the end: the first byte that is not zero decides
        start = max(round_down(end - 1, _READ_BYTES), limit)
        raw = store.pread(start, end - start)
        if raw != _ZEROS[: len(raw)]:
            return _footer_at(store, start + _end_of_data(raw))
        end = start
    return None


def _end_of_data(raw: bytes) -> int:
    """Where the zeros at the end of `raw` begin: `rstrip`, many times faster. Every file that is no VHD comes here."""
    end, step = len(raw), _READ_BYTES // 2
    while step >= SECTOR_SIZE:
        if raw[max(end - step, 0) : end] == _ZEROS[:step]:
            end -= step
        step //= 2
    return len(raw[:end].rstrip(b"\0"))


def _footer_at(store: ReadStore, end_of_data: int) -> tuple[int, bytes] | None:
    """The footer whose last nonzero byte is before `end_of_data`. Its last 427 bytes are all reserved."""
    first = round_down(end_of_data - 1, SECTOR_SIZE)
    raw = store.pread(first, layout.FOOTER_SIZE)
    is_near = store.size() - first <= SEARCH_BYTES
    return (first, raw) if is_near and is_fixed_footer(raw, first) else None


def is_fixed_footer(raw: bytes, offset_bytes: int) -> bool:
    """True for the footer of a fixed image whose data ends at the footer."""
    if not raw.startswith(layout.FOOTER_COOKIE) or len(raw) < layout.FOOTER_SIZE:
        return False
    stored = layout.stored_checksum(raw, layout.FOOTER_CHECKSUM_OFFSET)
    if layout.checksum(raw, layout.FOOTER_CHECKSUM_OFFSET) != stored:
        return False
    footer = layout.parse_footer(raw)
    return footer.disk_type == layout.DISK_TYPE_FIXED and geometry.virtual_size(footer, offset_bytes) == offset_bytes
