# SPDX-License-Identifier: Apache-2.0
"""Rounding, conversions between sectors and bytes, and sizes in human notation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhdkit import units

SIZES = st.integers(min_value=0, max_value=1 << 62)


@given(SIZES, st.sampled_from([1, 3, 512, 4096, 2 << 20]))
def test_rounding_brackets_the_value(size_bytes: int, unit_bytes: int) -> None:
    """Rounding gives the multiples on either side of a value, or the value itself if it is one."""
    up, down = units.round_up(size_bytes, unit_bytes), units.round_down(size_bytes, unit_bytes)
    assert up % unit_bytes == down % unit_bytes == 0
    assert size_bytes <= up < size_bytes + unit_bytes
    assert size_bytes - unit_bytes < down <= size_bytes


@given(SIZES)
def test_sectors_and_bytes_convert_back(sectors: int) -> None:
    """A number of sectors survives conversion to bytes and back."""
    assert units.sectors_to_bytes(sectors) == sectors * 512
    assert units.whole_sectors(units.sectors_to_bytes(sectors)) == sectors


@pytest.mark.parametrize(("size_bytes", "sectors"), [(0, 0), (1, 1), (511, 1), (512, 1), (513, 2), (1024, 2)])
def test_covering_sectors_counts_a_partial_one(size_bytes: int, sectors: int) -> None:
    """A partial sector counts."""
    assert units.covering_sectors(size_bytes) == sectors


def test_whole_sectors_asserts_that_they_are_whole() -> None:
    """A partial sector inside the engine is a bug, so it is an assertion."""
    with pytest.raises(AssertionError):
        units.whole_sectors(513)


@pytest.mark.parametrize(
    ("value", "answer"), [(-2, False), (0, False), (1, True), (2, True), (3, False), (1 << 40, True), (12, False)]
)
def test_power_of_two(value: int, answer: bool) -> None:
    """Only 1, 2, 4, 8, ... are powers of two."""
    assert units.is_power_of_two(value) is answer


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("512", 512),
        ("64K", 64 << 10),
        ("64k", 64 << 10),
        ("10G", 10 << 30),
        ("10GB", 10 << 30),
        ("2 TiB", 2 << 40),
        (" 1.5g ", 3 << 29),
        ("0.5K", 512),
        ("1.25M", (1 << 20) + (1 << 18)),
        ("1P", 1 << 50),
        ("0", 0),
    ],
)
def test_sizes_in_human_notation(text: str, size_bytes: int) -> None:
    """Units are powers of 1024, with or without B or iB, in any case, with a fraction."""
    assert units.parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text", ["", "G", "-1", "1X", "1.5.2G", "ten", "1e9", "0x10", "1 G B", "1\n2", "1,5G", "9" * 5000]
)
def test_invalid_sizes_are_refused_with_an_example(text: str) -> None:
    """The refusal quotes the text and shows a valid one."""
    with pytest.raises(ValueError, match="10G") as caught:
        units.parse_size(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "size_bytes", "asked"),
    [
        ("10G", 10 << 30, ""),
        ("0.5K", 512, ""),
        ("1.8T", 1979120930304, "1.8T"),
        (" 0.1G ", 107374592, "0.1G"),
        ("1000", 1024, "1000"),
        ("0.0001K", 512, "0.0001K"),
        ("0", 0, ""),
        ("0.3333333333333333333G", 357914112, "0.3333333333333333333G"),
    ],
)
def test_the_size_of_a_disk_is_whole_sectors(text: str, size_bytes: int, asked: str) -> None:
    """It is rounded up, never down, exactly, together with the requested size."""
    size = units.parse_disk_size(text)
    assert (size, size.asked) == (size_bytes, asked)


@given(st.integers(min_value=0, max_value=10**15))
def test_a_plain_number_is_bytes(size_bytes: int) -> None:
    """Digits alone count bytes."""
    assert units.parse_size(str(size_bytes)) == size_bytes


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 B"), (512, "512 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 << 19, "1.5 MiB"), (2 << 40, "2.0 TiB"),
     (64 << 50, "65536.0 TiB")],
)  # fmt: skip
def test_formatted_sizes(size_bytes: int, text: str) -> None:
    """One decimal, in the largest unit with a nonzero whole part."""
    assert units.format_size(size_bytes) == text
