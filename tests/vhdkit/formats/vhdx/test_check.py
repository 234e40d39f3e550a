# SPDX-License-Identifier: Apache-2.0
"""What `check` reports about one VHDX file: a repair clears each warning, and notes are not faults."""

from __future__ import annotations

import pytest

from tests.harness.stores import MemStore
from tests.vhdkit.formats.vhdx.damaged import (
    ALL,
    BLOCKS,
    HARMLESS,
    Change,
    base,
    child,
    dirty,
    equal_headers,
    faults,
    repaired,
)
from tests.vhdkit.formats.vhdx.images import BAT, image, set_entry, set_header
from tests.vhdkit.formats.vhdx.test_metadata import CASES, CHILD_CASES
from vhdkit.errors import CorruptReason
from vhdkit.finding import Severity
from vhdkit.formats.format import CreateRequest
from vhdkit.formats.vhdx.format import VHDX
from vhdkit.image import ParentRef
from vhdkit.units import MIB

R = CorruptReason


def set_bits(block: int) -> Change:
    """Set the first bits of a block in the bitmap."""

    def change(store: MemStore) -> None:
        bitmap = int.from_bytes(store.pread(BAT + 8 * 4096, 8), "little") & ~0xFFFFF
        store.pwrite(bitmap + 256 * block, b"\x01")

    return change


# Each warning of VHDX: tests/vhdkit/chain/verbs/test_check_warnings.py compares this list with the sources.
WARNINGS: dict[str, Change] = {
    "header-damaged": HARMLESS["header 1"][1],
    "region-table-damaged": HARMLESS["table 2"][1],
    "region-tables-differ": HARMLESS["tables differ"][1],
    "log-missing": HARMLESS["no log"][1],
    "block-cut": HARMLESS["block cut"][1],
    "bits-absent": set_bits(1),
}
NOTES: dict[str, Change] = {
    "headers-equal": equal_headers,
    "headers-differ": HARMLESS["headers differ"][1],
    "log-not-replayed": dirty,
    "space-unused": lambda store: store.truncate(store.size() + 2 * MIB),
    "bits-past-end": set_bits(BLOCKS),
    "block-hidden": lambda store: set_entry(store, 1, 0, 64 * MIB),
}
# What a repair leaves, and why: docs/formats-vhdx.md.
NEWER = {  # a newer program's file is not damaged
    R.HEADER_VERSION, R.LOG_VERSION, R.REGION_REQUIRED, R.ITEM_REQUIRED, R.LOCATOR_TYPE,
}  # fmt: skip
ONCE = {  # stored once, without a checksum, and said nowhere else
    R.ITEM_PLACE, R.ITEM_MISSING, R.ITEM_VALUE, R.BLOCK_SIZE, R.VIRTUAL_SIZE, R.SECTOR_SIZE, R.BAT_TOO_SHORT,
}  # fmt: skip
GONE = {R.HEADER_OUTSIDE_FILE, R.INCOMPLETE_FILE}  # there is no image in the file


@pytest.mark.parametrize("code", WARNINGS)
def test_a_repair_clears_every_warning(code: str) -> None:
    """`check` warns, and after a repair without consent the image is clean."""
    store = child()
    WARNINGS[code](store)
    assert faults(store) == [code]
    made, fixes = repaired(store)
    assert not any(fix.needs for fix in fixes) and faults(made) == []


def test_a_bitmap_without_a_parent_is_warned_of() -> None:
    """In an image with several chunks, the entry of a bitmap is not taken for that of a block."""
    store = MemStore("disk.vhdx")
    VHDX.create(store, CreateRequest(5 << 30, "vhdx", MIB))
    set_entry(store, 4096, 6, BAT)
    assert faults(store) == ["bitmap-unexpected"]
    made, fixes = repaired(store)
    assert [fix.code for fix in fixes] == ["bitmap-unexpected"] and VHDX.check(made) == []


@pytest.mark.parametrize("code", NOTES)
def test_notes_are_no_faults(code: str) -> None:
    """Notes are about files that are read correctly."""
    store = child() if code == "bits-past-end" else base()
    NOTES[code](store)
    assert [(one.code, one.severity) for one in VHDX.check(store)] == [(code, Severity.NOTE)]


def test_headers_of_one_session_are_not_worth_a_note() -> None:
    """Intact headers differ in number and checksum and, if only one was written, in FileWriteGuid and log id."""
    store = base()
    assert VHDX.check(store) == []
    set_header(store, [0], file_write_guid=b"f" * 16)
    assert VHDX.check(store) == []


@pytest.mark.parametrize(
    ("case", "parent"), [*((one, None) for one in CASES), *((one, "parent") for one in CHILD_CASES)]
)
def test_an_error_is_repaired_or_the_page_says_why_not(case: str, parent: str | None) -> None:
    """With consent every error is repaired, except those where the file does not show what was there."""
    reason, damage = (CASES if parent is None else CHILD_CASES)[case]
    reference = ParentRef.of_paths(b"p" * 16, 0, relative=".\\b.vhdx", absolute="\\b.vhdx", name="b.vhdx")
    store = image(parent=None if parent is None else reference)
    damage(store)
    made, fixes = repaired(store, ALL)
    if reason in NEWER | ONCE | GONE and case != "locator gone":
        assert fixes == [] and reason.value in faults(made)
    else:
        assert faults(made) == [], fixes
