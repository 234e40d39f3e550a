# SPDX-License-Identifier: Apache-2.0
"""A second reader of chains of VHDs, for judging what the first one and its machines left: slow, short, of its own.

It follows the published layout of dynamic and differencing images and nothing else: no undo logs, no merge records, no
locks. A parent is the file beside the child whose unique id the child's header names.
"""

from __future__ import annotations

import struct
from pathlib import Path

SECTOR = 512
_NONE = 0xFFFFFFFF
_DIFFERENCING = 4


class Layer:
    """One dynamic or differencing image."""

    def __init__(self, path: Path) -> None:
        self._data = path.read_bytes()
        footer = self._data[:SECTOR]
        assert footer[:8] == b"conectix", f"{path}: no copy of the footer at its beginning"
        self.size_bytes, self.kind = struct.unpack(">Q4xI", footer[48:64])
        self.unique_id = footer[68:84]
        (at,) = struct.unpack(">Q", footer[16:24])
        header = self._data[at : at + 1024]
        assert header[:8] == b"cxsparse", f"{path}: no header"
        table, _, entries, self._block_bytes = struct.unpack(">QIII", header[16:36])
        self.parent_id = header[40:56] if self.kind == _DIFFERENCING else None
        self._table = struct.unpack(f">{entries}I", self._data[table : table + 4 * entries])
        self._bitmap_bytes = -(-self._block_bytes // SECTOR // 8 // SECTOR) * SECTOR

    def sector(self, index: int) -> bytes | None:
        """What this image says of a sector; None for nothing."""
        block, inside = divmod(index * SECTOR, self._block_bytes)
        if self._table[block] == _NONE:
            return None
        at, number = self._table[block] * SECTOR, inside // SECTOR
        if self.kind == _DIFFERENCING and not self._data[at + number // 8] >> (7 - number % 8) & 1:
            return None
        begin = at + self._bitmap_bytes + inside
        return self._data[begin : begin + SECTOR].ljust(SECTOR, b"\0")


def chain(path: str | Path) -> list[Layer]:
    """The image and what it stands on, leaf first; found by their ids in its folder."""
    layers = [Layer(Path(path))]
    others = [one for one in Path(path).parent.iterdir() if one.suffix in (".vhd", ".avhd")]
    while (wanted := layers[-1].parent_id) is not None:
        found = [one for other in others if (one := Layer(other)).unique_id == wanted]
        assert len(found) == 1, f"{path}: {len(found)} images have the id of a parent"
        layers.append(found[0])
    return layers


def content(path: str | Path, begin_bytes: int = 0, end_bytes: int | None = None) -> bytes:
    """What the disk reads as from one sector to another."""
    layers = chain(path)
    end = layers[0].size_bytes if end_bytes is None else end_bytes
    return b"".join(
        next((one for layer in layers if (one := layer.sector(index)) is not None), bytes(SECTOR))
        for index in range(begin_bytes // SECTOR, end // SECTOR)
    )
