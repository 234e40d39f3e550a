# SPDX-License-Identifier: Apache-2.0
"""INV-BOUNDED: any bytes as a VHDX end in success or a `VhdkitError`, in bounded time and memory.

Fed and tried: as `fuzz_open`, for one VHDX file. Also watched, besides what is watched there:

- a BAT that the quick examination calls sound has no fault in the thorough one;
- reading does not change the file, and a log that was not replayed reads as it does once it is replayed in the file:
  a writable opening that writes nothing changes no sector of the disk, and leaves nothing in the log.
"""

from __future__ import annotations

import sys

from fuzz.fuzz_open import examine, windows
from fuzz.loop import main
from fuzz.mutate_vhdx import mutate_vhdx
from fuzz.sparse import FuzzStore, decode
from vhdkit.errors import VhdkitError
from vhdkit.formats.probe import FormatName, open_layer
from vhdkit.formats.vhdx.bat import Bat
from vhdkit.formats.vhdx.entries import faults
from vhdkit.formats.vhdx.metadata import read_metadata
from vhdkit.formats.vhdx.sound import is_sound
from vhdkit.image import Layer, read_extents
from vhdkit.units import sectors_to_bytes

NAME = "image.vhdx"


def target(data: bytes) -> None:
    """Do with the file whatever a user could do to it."""
    examine(data, FormatName.VHDX, NAME)
    _judge_twice(data)
    _replay(data)


def _judge_twice(data: bytes) -> None:
    """What the quick examination of the BAT calls sound has no fault in the thorough one."""
    try:
        metadata = read_metadata(FuzzStore(decode(data), NAME))
    except VhdkitError:
        return
    bat = Bat.load(metadata.view, metadata.regions.bat.file_offset, metadata.shape)
    if is_sound(metadata, bat):
        assert not list(faults(metadata, bat)), "the quick examination of the BAT overlooks a fault"


def _replay(data: bytes) -> None:
    store = FuzzStore(decode(data), NAME)
    try:
        before = _content(open_layer(store, format_name=FormatName.VHDX), data)
        layer = open_layer(store, format_name=FormatName.VHDX, writable=True)
    except VhdkitError:
        return
    try:
        assert _content(layer, data) == before, "the disk reads differently when it is opened for writing"
    finally:
        layer.close()
    assert read_metadata(store).replay is None, "closing left something in the log"
    again = open_layer(store, format_name=FormatName.VHDX)
    assert _content(again, data) == before, "replaying the log changed the disk"


def _content(layer: Layer, data: bytes) -> tuple[int, list[bytes]]:
    found = []
    for first, count in windows(layer, data):
        buffer = bytearray(sectors_to_bytes(count))
        read_extents(layer.store, layer.extents(first, count), memoryview(buffer))
        found.append(bytes(buffer))
    return layer.size_bytes, found


if __name__ == "__main__":
    sys.exit(main(target, "fuzz_vhdx_open", mutate_vhdx))
