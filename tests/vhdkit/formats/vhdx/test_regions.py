# SPDX-License-Identifier: Apache-2.0
"""The region tables: what is refused, and where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.vhdkit.formats.vhdx.images import LOG, image, set_regions
from vhdkit.errors import CorruptImage, CorruptReason
from vhdkit.formats.vhdx.layout import RegionEntry
from vhdkit.formats.vhdx.metadata import read_metadata
from vhdkit.units import MIB

Entries = list[RegionEntry]
OTHER = RegionEntry(b"o" * 16, 1 << 30, MIB, 0)
REASON = CorruptReason


def bat(**fields: int) -> Callable[[Entries], object]:
    """Change the entry of the BAT region."""

    def change(entries: Entries) -> None:
        entries[0] = replace(entries[0], **fields)  # type: ignore[arg-type]

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (bat(file_offset=3 * MIB + 512), REASON.REGION_ENTRY),
        (bat(length=MIB - 512), REASON.REGION_ENTRY),
        (bat(length=0), REASON.REGION_ENTRY),
        (bat(file_offset=0), REASON.REGION_ENTRY),
        (bat(file_offset=1 << 40), REASON.REGION_OUTSIDE_FILE),
        (bat(file_offset=2 * MIB), REASON.STRUCTURES_OVERLAP),
        (bat(file_offset=LOG), REASON.STRUCTURES_OVERLAP),
        (lambda entries: entries.pop(0), REASON.REGION_ENTRY),
        (lambda entries: entries.append(entries[0]), REASON.REGION_ENTRY),
        (lambda entries: entries.append(replace(OTHER, required=1)), REASON.REGION_REQUIRED),
    ],
)
def test_impossible_regions_are_refused(change: Callable[[Entries], object], reason: CorruptReason) -> None:
    """Errors name the file, the structure and its offset."""
    store = image()
    set_regions(store, change)
    with pytest.raises(CorruptImage) as caught:
        read_metadata(store)
    found = caught.value
    assert (found.reason, found.path) == (reason, store.name)
    assert found.structure and found.offset_bytes is not None


def test_an_unknown_region_is_left_alone() -> None:
    """An unknown region that is not required is kept, even outside the file."""
    store = image()
    set_regions(store, lambda entries: entries.append(OTHER))
    assert [one.guid for one in read_metadata(store).regions.others] == [OTHER.guid]
