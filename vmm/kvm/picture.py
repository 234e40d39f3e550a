# SPDX-License-Identifier: Apache-2.0
"""What is on a machine's screen, point by point, and whether two pictures show the same.

Decides what of two pictures counts as a difference: a cursor that blinks, or a digit that counts, does not. It takes
at most a square of `CURSOR_POINTS`. Must not know what a picture is compared for.

The source is a portable pixmap (ppm(5), binary, 8 bits a colour), as QEMU writes it. A guest decides what is in it.
Between processes it is compressed: most of a screen is one colour.
"""

from __future__ import annotations

import base64
import re
import zlib
from dataclasses import dataclass, field
from typing import Final

from vmm.model.errors import QemuFailed

CURSOR_POINTS: Final = 32  # a character of a console on a screen of many points is 16 wide and 32 high
MAX_PIXMAP_BYTES: Final = 49 * 1024 * 1024  # 16 MiB of video memory, at a byte a point, are three bytes a point here
_BYTES: Final = 3  # of a point
_HEADER: Final = re.compile(rb"P6\n(\d{1,5}) (\d{1,5})\n255\n")


@dataclass(frozen=True, slots=True)
class Picture:
    """Width and height in points, and three bytes for each point, row after row."""

    width: int
    height: int
    points: bytes = field(repr=False)

    @classmethod
    def parsed(cls, data: bytes) -> Picture:
        """Raises QemuFailed for what is not a whole pixmap."""
        header = _HEADER.match(data)
        if header is None:
            raise QemuFailed("QEMU's picture of the screen is not a pixmap")
        width, height = int(header[1]), int(header[2])
        if len(data) - header.end() != width * height * _BYTES:
            raise QemuFailed("QEMU's picture of the screen is incomplete")
        return cls(width, height, data[header.end() :])

    @classmethod
    def unpacked(cls, text: str) -> Picture:
        """From the text that `packed` made. Raises ValueError, QemuFailed."""
        try:
            return cls.parsed(zlib.decompressobj().decompress(base64.b64decode(text, validate=True), MAX_PIXMAP_BYTES))
        except zlib.error as error:
            raise ValueError(str(error)) from error

    def shows_the_same_as(self, other: Picture) -> bool:
        """True if they differ in nothing, or in no more than a cursor."""
        if (self.width, self.height) != (other.width, other.height):
            return False
        if self.points == other.points:
            return True
        size = self.width * _BYTES
        left, right, top = self.width, 0, None
        for row in range(self.height):
            begin = row * size
            own, others = self.points[begin : begin + size], other.points[begin : begin + size]
            if own == others:
                continue
            top = row if top is None else top
            differing = int.from_bytes(own, "big") ^ int.from_bytes(others, "big")
            left = min(left, (size - 1 - (differing.bit_length() - 1) // 8) // _BYTES)
            right = max(right, (size - 1 - ((differing & -differing).bit_length() - 1) // 8) // _BYTES)
            if row - top >= CURSOR_POINTS or right - left >= CURSOR_POINTS:
                return False
        return True


def packed(pixmap: bytes) -> str:
    """A pixmap as a text for a message between processes."""
    return base64.b64encode(zlib.compress(pixmap, 1)).decode()
