# SPDX-License-Identifier: Apache-2.0
"""Examines PNG files with only the standard library: completeness, size, colours.

It reads what QEMU writes: 8 bits a channel, grey, RGB or RGBA, not interlaced (PNG specification, 3rd edition).
"""

from __future__ import annotations

import zlib
from collections import Counter
from dataclasses import dataclass

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHANNELS = {0: 1, 2: 3, 6: 4}


@dataclass(frozen=True)
class Picture:
    """A picture: its size and how many points have which colour (three or one channels)."""

    width: int
    height: int
    colours: Counter[tuple[int, ...]]

    @property
    def colour_count(self) -> int:
        """How many different colours it has."""
        return len(self.colours)

    def share_of_other_than(self, colour: tuple[int, ...]) -> float:
        """The share of points that have another colour."""
        return 1 - self.colours[colour] / (self.width * self.height)


def read_png(data: bytes) -> Picture:
    """The picture in a PNG file. Fails if the file is incomplete: every checksum is verified."""
    assert data.startswith(_SIGNATURE), data[:8]
    position, compressed = len(_SIGNATURE), b""
    width = height = channels = 0
    kind = b""
    while kind != b"IEND":
        length = int.from_bytes(data[position : position + 4], "big")
        kind, content = data[position + 4 : position + 8], data[position + 8 : position + 8 + length]
        checksum = int.from_bytes(data[position + 8 + length : position + 12 + length], "big")
        assert zlib.crc32(kind + content) == checksum, f"the checksum of {kind!r} is wrong"
        position += 12 + length
        if kind == b"IHDR":
            width, height = int.from_bytes(content[:4], "big"), int.from_bytes(content[4:8], "big")
            assert content[8] == 8 and content[12] == 0, "the picture must have 8 bits a channel and not be interlaced"
            channels = _CHANNELS[content[9]]
        elif kind == b"IDAT":
            compressed += content
    assert position == len(data), "data follows the end"
    lines = _unfiltered(zlib.decompress(compressed), width * channels, height, channels)
    colours: Counter[tuple[int, ...]] = Counter()
    for line in lines:
        colours.update(zip(*(line[channel::channels] for channel in range(min(channels, 3))), strict=True))
    return Picture(width, height, colours)


def _unfiltered(raw: bytes, line_bytes: int, height: int, channels: int) -> list[bytes]:
    assert len(raw) == (line_bytes + 1) * height
    lines = []
    above = bytes(line_bytes)
    for number in range(height):
        start = number * (line_bytes + 1)
        method, line = raw[start], bytearray(raw[start + 1 : start + 1 + line_bytes])
        for place in range(line_bytes if method else 0):
            left = line[place - channels] if place >= channels else 0
            corner = above[place - channels] if place >= channels else 0
            line[place] = (line[place] + _predicted(method, left, above[place], corner)) & 255
        above = bytes(line)
        lines.append(above)
    return lines


def _predicted(method: int, left: int, above: int, corner: int) -> int:
    if method == 1:
        return left
    if method == 2:
        return above
    if method == 3:
        return (left + above) // 2
    assert method == 4, method
    guess = left + above - corner
    distances = (abs(guess - left), abs(guess - above), abs(guess - corner))
    return (left, above, corner)[distances.index(min(distances))]
