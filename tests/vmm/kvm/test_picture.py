# SPDX-License-Identifier: Apache-2.0
"""Pictures are compared point by point; a guest decides what is in them."""

from __future__ import annotations

import base64
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.kvm.picture import CURSOR_POINTS, Picture, packed
from vmm.model.errors import QemuFailed

WIDTH, HEIGHT = 100, 80


def with_points(*changed: tuple[int, int]) -> Picture:
    """A black picture with some white points, (column, row)."""
    points = bytearray(WIDTH * HEIGHT * 3)
    for column, row in changed:
        points[(row * WIDTH + column) * 3 + 1] = 255
    return Picture(WIDTH, HEIGHT, bytes(points))


@given(st.lists(st.tuples(st.integers(0, WIDTH - 1), st.integers(0, HEIGHT - 1)), max_size=4))
def test_a_cursor_is_no_difference(changed: list[tuple[int, int]]) -> None:
    """Pictures show the same exactly if a square of a cursor's size covers all that differs."""
    spans = [max(line) - min(line) if line else 0 for line in ([x for x, _ in changed], [y for _, y in changed])]
    expected = all(span < CURSOR_POINTS for span in spans)
    black, other = with_points(), with_points(*changed)
    assert black.shows_the_same_as(other) == other.shows_the_same_as(black) == expected


def test_pictures_of_other_sizes_differ() -> None:
    """A change of the mode of the screen is a difference."""
    assert not Picture(2, 3, bytes(18)).shows_the_same_as(Picture(3, 2, bytes(18)))


def test_parsing() -> None:
    """A pixmap becomes a picture, also packed."""
    data = b"P6\n2 3\n255\n" + bytes(range(18))
    assert Picture.parsed(data) == Picture.unpacked(packed(data)) == Picture(2, 3, bytes(range(18)))


@pytest.mark.parametrize(
    ("header", "size"),
    [("", 0), ("P6\n2 3\n255\n", 17), ("P6\n2 3\n255\n", 19), ("P5\n2 3\n255\n", 18), ("P6 1 1 255\n", 3)],
)
def test_what_is_not_a_pixmap(header: str, size: int) -> None:
    """Data that is cut off, too long or of another kind is refused."""
    with pytest.raises(QemuFailed):
        Picture.parsed(header.encode() + bytes(size))


@pytest.mark.parametrize("text", ["!", base64.b64encode(b"no zlib").decode()])
def test_what_is_not_packed(text: str) -> None:
    """A message that is something else is a ValueError."""
    with pytest.raises(ValueError):  # whatever base64 and zlib say
        Picture.unpacked(text)


def test_a_bomb() -> None:
    """What would become larger than any screen is not unpacked."""
    bomb = base64.b64encode(zlib.compress(b"P6\n99999 99999\n255\n" + bytes(60 << 20))).decode()
    with pytest.raises(QemuFailed, match="incomplete"):
        Picture.unpacked(bomb)
