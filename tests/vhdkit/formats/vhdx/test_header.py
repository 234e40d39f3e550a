# SPDX-License-Identifier: Apache-2.0
"""The two headers: which one is current."""

from __future__ import annotations

import pytest

from tests.harness.stores import MemStore
from tests.vhdkit.formats.vhdx.images import SIZE, image, set_header
from vhdkit.errors import CorruptImage, CorruptReason
from vhdkit.finding import Severity
from vhdkit.formats.vhdx import layout
from vhdkit.formats.vhdx.check import check_vhdx
from vhdkit.formats.vhdx.header import HeaderState, current_header, current_slot, header_findings, read_headers
from vhdkit.formats.vhdx.opening import open_vhdx
from vhdkit.units import KIB


def refusal(store: MemStore) -> CorruptReason:
    """Why neither header is accepted."""
    with pytest.raises(CorruptImage) as caught:
        current_header(store.name, read_headers(store))
    assert caught.value.path == store.name
    return caught.value.reason


@pytest.mark.parametrize(("first", "second", "current"), [(1, 2, 1), (2, 1, 0), ((1 << 64) - 1, 0, 0), (0, 1, 1)])
def test_the_larger_number_is_current(first: int, second: int, current: int) -> None:
    """Sequence numbers are compared as unsigned 64-bit numbers."""
    store = image()
    set_header(store, [0], sequence_number=first)
    set_header(store, [1], sequence_number=second)
    assert current_header(store.name, read_headers(store)).slot == current


def test_equal_numbers_need_equal_headers() -> None:
    """Two headers with one number are accepted if they are equal, and refused if they differ."""
    store = image()
    set_header(store, sequence_number=5)
    assert current_slot(read_headers(store)) == 0
    set_header(store, [1], file_write_guid=b"x" * 16)
    assert refusal(store) is CorruptReason.HEADER_PAIR


def test_a_number_that_cannot_be_increased_is_only_read() -> None:
    """An image with one of the largest numbers can be read, but not written, and `check` reports it."""
    store = image()
    set_header(store, sequence_number=layout.MAX_HEADER_NUMBER)
    assert not any(one.severity is Severity.ERROR for one in check_vhdx(store))
    open_vhdx(store.copy(), writable=True).close()
    set_header(store, [1], sequence_number=layout.MAX_HEADER_NUMBER + 1)
    assert [one.code for one in check_vhdx(store) if one.severity is Severity.ERROR] == ["header-number"]
    store.frozen = True
    assert open_vhdx(store).size_bytes == SIZE
    with pytest.raises(CorruptImage) as caught:
        open_vhdx(store, writable=True)
    assert caught.value.reason is CorruptReason.HEADER_NUMBER and caught.value.offset_bytes == 128 * KIB


@pytest.mark.parametrize("torn", [0, 1])
def test_a_torn_header_does_not_count(torn: int) -> None:
    """If one header is torn, the other one is current whatever its number; that is reported. If both are, none is."""
    store = image()
    set_header(store, [torn], sequence_number=9)
    set_header(store, [1 - torn], sequence_number=8)
    store.pwrite(layout.HEADER_OFFSETS[torn] + 2000, b"torn")
    places = read_headers(store)
    current = current_header(store.name, places)
    assert (current.slot, places[torn].state) == (1 - torn, HeaderState.CHECKSUM)
    (finding,) = header_findings(store.name, places, current)
    assert finding.code == "header-damaged" and finding.offset_bytes == layout.HEADER_OFFSETS[torn]
    store.pwrite(layout.HEADER_OFFSETS[1 - torn], b"gone")
    assert refusal(store) is CorruptReason.HEADER_CHECKSUM


def test_a_header_outside_the_file() -> None:
    """A header that the end of the file cuts is reported as outside the file."""
    store = image()
    store.truncate(layout.HEADER_OFFSETS[1] + 100)
    assert [one.state for one in read_headers(store)] == [HeaderState.GOOD, HeaderState.OUTSIDE]
    store.truncate(layout.HEADER_OFFSETS[0])
    assert refusal(store) is CorruptReason.HEADER_OUTSIDE_FILE
