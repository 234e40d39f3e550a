# SPDX-License-Identifier: Apache-2.0
"""Which sectors a power cut tore while a header or a region table was written."""

from __future__ import annotations

import pytest

from tests.vhdkit.formats.vhdx.images import image
from vhdkit import formats
from vhdkit.formats.vhdx import layout
from vhdkit.units import SECTOR_SIZE


@pytest.mark.parametrize("offset", [layout.HEADER_OFFSETS[0], layout.REGION_TABLE_OFFSETS[1]])
def test_a_torn_sector_passes_no_checksum(offset: int) -> None:
    """A first sector with garbage in it is torn; an intact one is not, even if it is another image's."""
    ours, other = (image().pread(offset, SECTOR_SIZE) for _ in range(2))
    torn = ours[:40] + bytes(byte ^ 0xA5 for byte in ours[40:])
    assert formats.is_torn(torn, ours, other) and formats.is_torn(torn, bytes(SECTOR_SIZE), ours)
    assert not formats.is_torn(other, ours, torn)
    assert not formats.is_torn(torn, bytes(SECTOR_SIZE), bytes(SECTOR_SIZE)), "no header is written there"
    assert not formats.is_torn(torn[:100], ours[:100], other[:100])
