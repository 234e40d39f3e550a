# SPDX-License-Identifier: Apache-2.0
"""INV-BOUNDED: any bytes as an image file end in success or a `VhdkitError`, in bounded time and memory.

Fed: one file (`fuzz.sparse` says how the input becomes one). Tried: dump, check, opening as every format, extents,
reads through layer and chain; then a writable opening of a copy, writes, zeros, trim, flush, close, opening again.
Also watched, because it costs nothing here:

- dump and check raise nothing at all, and what they say can be printed on a terminal;
- an image that opening refuses as corrupt is not clean to check;
- a layer's extents cover the range in order (`INV-MAP-EQUALS-WALK`: and the chain reads what they say);
- what was written through a writable opening that succeeded is read back by the next one.
"""

from __future__ import annotations

import itertools
import sys
import zlib

from fuzz.loop import main
from fuzz.mutate import mutate_image
from fuzz.sparse import FuzzStore, decode
from vhdkit.chain.engine.chain import Chain
from vhdkit.errors import CorruptImage, VhdkitError
from vhdkit.finding import Severity
from vhdkit.formats import named
from vhdkit.formats.probe import FormatName, open_layer
from vhdkit.image import Extent, ExtentKind, Layer, read_extents
from vhdkit.units import GIB, KIB, SECTOR_SIZE, sectors_to_bytes, whole_sectors

_WINDOW_SECTORS = whole_sectors(64 * KIB)
_WHOLE_BELOW = 16 * GIB  # a smaller disk's extents are listed as a whole


def target(data: bytes) -> None:
    """Do with the file whatever a user could do to it."""
    examine(data, FormatName.VHD, "image.vhd")


def examine(data: bytes, format_name: FormatName, file_name: str) -> None:
    """Do with the file whatever a user could do to it who takes it for this format, or for a raw disk."""
    store = FuzzStore(decode(data), file_name)
    store.frozen = True
    wanted = named(format_name)
    dumped = [one.structure for one in wanted.dump(store)]
    findings = wanted.check(store)
    wanted.check(store, ignore_bitmaps=True)
    for said in [*dumped, *map(str, findings)]:
        assert said.isprintable(), repr(said)
    for tried in (None, format_name, FormatName.RAW):
        for ignore_bitmaps in (False, True):
            try:
                layer = open_layer(store, format_name=tried, ignore_bitmaps=ignore_bitmaps)
            except VhdkitError as error:
                assert str(error).isprintable(), repr(str(error))
                if isinstance(error, CorruptImage):
                    assert any(one.severity is Severity.ERROR for one in findings), error
                continue
            _read(layer, data)
    for tried in (format_name, FormatName.RAW):
        _write(FuzzStore(decode(data), file_name), tried, data)


def opens(data: bytes, format_name: FormatName = FormatName.VHD) -> bool:
    """Whether the file opens as this format: how the mutations are measured."""
    try:
        open_layer(FuzzStore(decode(data)), format_name=format_name)
    except VhdkitError:
        return False
    return True


def windows(layer: Layer, data: bytes) -> list[tuple[int, int]]:
    """A few (first sector, count) ranges inside the disk: both ends, the middle, somewhere."""
    total = whole_sectors(layer.size_bytes)
    count = min(total, _WINDOW_SECTORS)
    last = total - count
    return [(first, count) for first in sorted({0, last, last // 2, zlib.crc32(data) % (last + 1)})]


def _read(layer: Layer, data: bytes) -> None:
    total = whole_sectors(layer.size_bytes)
    if layer.size_bytes <= _WHOLE_BELOW:
        _covered(list(layer.extents(0, total)), 0, total)
    chain = Chain([layer])
    for first, count in windows(layer, data):
        extents = list(layer.extents(first, count))
        _covered(extents, first, count)
        walked, mapped = (bytearray(sectors_to_bytes(count)) for _ in range(2))
        read_extents(layer.store, extents, memoryview(walked))
        chain.read_into(first, memoryview(mapped))
        assert walked == mapped, f"sectors {first} to {first + count}: the map and the layer disagree"
        _covered(list(chain.extents(first, count, find_holes=True)), first, count)


def _covered(extents: list[Extent], first: int, count: int) -> None:
    """The extents are in order and without gaps."""
    position = first
    for extent in extents:
        assert extent.sector_index == position and extent.sector_count > 0, extent
        assert (extent.store_offset_bytes is None) == (extent.kind is not ExtentKind.DATA), extent
        position = extent.end_sector
    assert position == first + count, (position, first, count)


def _write(store: FuzzStore, format_name: FormatName | None, data: bytes) -> None:
    """Write, close, and open again: what was written is there, or the opening or a write was refused."""
    try:
        layer = open_layer(store, format_name=format_name, writable=True)
    except VhdkitError:
        return
    written = {}
    unit = whole_sectors(layer.sector_bytes)
    try:
        for number, (near, most) in enumerate(windows(layer, data)):
            first, count = near - near % unit, most // unit
            raw = bytes([number + 1]) * sectors_to_bytes(min(count, 3) * unit)
            layer.write(first, memoryview(raw))
            written[first] = raw
            if number % 2:
                layer.flush()
            if count > 8:
                layer.write_zeroes(first + 4 * unit, 2 * unit)
                layer.trim(first + 6 * unit, 2 * unit)
        layer.flush()
    except VhdkitError:
        written.clear()
    finally:
        _close(layer)
    if not written:
        return
    again = open_layer(store, format_name=format_name)
    for first, raw in _last_word(written, 8 * unit).items():
        buffer = bytearray(SECTOR_SIZE)
        read_extents(store, again.extents(first, 1), memoryview(buffer))
        assert buffer == raw, f"sector {first} does not read as written"


def _last_word(written: dict[int, bytes], reach: int) -> dict[int, bytes]:
    """By sector, what it must hold now. Later writes, zeros and trims of a tiny disk may lie over earlier ones."""
    starts = sorted(written)
    apart = all(after - before > reach for before, after in itertools.pairwise(starts))
    return {first: raw[:SECTOR_SIZE] for first, raw in written.items()} if apart else {}


def _close(layer: Layer) -> None:
    try:
        layer.close()
    except VhdkitError as error:
        assert str(error)


if __name__ == "__main__":
    sys.exit(main(target, "fuzz_open", mutate_image))
