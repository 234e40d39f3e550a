# SPDX-License-Identifier: Apache-2.0
"""Damage with a plan, for VHDX: changes to headers, region tables, items, locators, BAT, bitmaps and log.

Decides what is changed. The checksums of headers, region tables and log entries are made right again nearly always,
and a log is usually given a whole entry, with changes that lead anywhere: without that nearly every change ends at the
first comparison. Offsets are those of the specification, written down once more here. Everything comes from the
`random.Random` that is handed in.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence

from fuzz.mutate import Field, extreme, flip_bits, mutate_bytes, splice
from fuzz.sparse import MAX_OFFSET, Sparse, decode
from vhdkit.formats.vhdx import layout, log
from vhdkit.formats.vhdx.crc import sealed
from vhdkit.formats.vhdx.log import LogChange
from vhdkit.units import KIB, MIB, TIB

HEADERS = (64 * KIB, 128 * KIB)
REGION_TABLES = (192 * KIB, 256 * KIB)
HEADER_SIZE, REGION_TABLE_SIZE, PAGE = 4 * KIB, 64 * KIB, 4 * KIB
HEADER_FIELDS: tuple[Field, ...] = ((8, 8), (16, 8), (32, 8), (48, 16), (64, 2), (66, 2), (68, 4), (72, 8))
REGION_FIELDS: tuple[Field, ...] = ((0, 16), (16, 8), (24, 4), (28, 4))
ITEM_FIELDS: tuple[Field, ...] = ((0, 16), (16, 4), (20, 4), (24, 4))
LOG_FIELDS: tuple[Field, ...] = ((8, 4), (12, 4), (16, 8), (24, 4), (32, 16), (48, 8), (56, 8))
DESCRIPTOR_FIELDS: tuple[Field, ...] = ((0, 4), (4, 4), (8, 8), (16, 8), (24, 8))
LOG_GUID = bytes(range(16))  # of the seeds' logs, as it is stored
LOG_ID = layout.read_guid(LOG_GUID)
REGION_BAT = bytes.fromhex("6677c22d23f600429d64115e9bfd4a08")
REGION_METADATA = bytes.fromhex("06a27c8b90479a4bb8fe575f050f886e")
LOCATOR_TYPE = bytes.fromhex("b7ef4ab09ed1814ab78925b8e9445913")
_KEYS = ("parent_linkage", "parent_linkage2", "relative_path", "volume_path", "absolute_win32_path", "note", "\x1b[2J")
_VALUES = (
    "{00000000-0000-0000-0000-000000000000}", "{70707070-7070-7070-7070-707070707070}", ".\\base.vhdx", "..\\..\\x",
    "C:\\base.vhdx", "\\\\?\\Volume{acf5}\\base.vhdx", "leaf.vhdx", "", "\0", "a" * 300, "\x1b[31m\r\n", "not a guid",
)  # fmt: skip
_MOST_LOG_BYTES = 2 * MIB  # of one entry whose checksum is made right


def little(rng: random.Random, size: int) -> bytes:
    """A number of `size` bytes that programs stumble over, as VHDX stores it; often one of whole mebibytes."""
    if size >= 4 and rng.random() < 0.5:
        number = rng.choice((0, 1, 2, 3, 4, 5, 6, 8, 64, 1023, 1024, 4095)) * MIB + rng.choice(
            (0, 0, 0, PAGE, -PAGE, 1)
        )
        return (number & (1 << 8 * size) - 1).to_bytes(size, "little")
    return extreme(rng, size)[::-1]


def _put(image: Sparse, offset: int, raw: bytes) -> None:
    if raw and 0 <= offset <= MAX_OFFSET - len(raw):
        image.put(offset, raw)


def regions(image: Sparse) -> dict[bytes, tuple[int, int]]:
    """(offset, length) of each region by its stored id, by the first table."""
    raw = image.peek(REGION_TABLES[0], 16 + 8 * 32)
    count = min(int.from_bytes(raw[8:12], "little"), 8) if len(raw) == 16 + 8 * 32 else 0
    entries = [raw[16 + 32 * number : 48 + 32 * number] for number in range(count)]
    return {one[:16]: struct.unpack_from("<QI", one, 16) for one in entries}


def log_place(image: Sparse) -> tuple[int, int]:
    """(offset, length) of the log, by the first header."""
    raw = image.peek(HEADERS[0] + 68, 12)
    return (int.from_bytes(raw[4:], "little"), int.from_bytes(raw[:4], "little")) if len(raw) == 12 else (MIB, 0)


def items(image: Sparse) -> list[tuple[int, int, int]]:
    """(place of its entry, offset in the file, length) of the first items of metadata."""
    start, _ = regions(image).get(REGION_METADATA, (0, 0))
    raw = image.peek(start, 32 + 8 * 32)
    count = min(int.from_bytes(raw[10:12], "little"), 8) if len(raw) == 32 + 8 * 32 else 0
    found = []
    for number in range(count):
        offset, length = struct.unpack_from("<II", raw, 32 + 32 * number + 16)
        found.append((start + 32 + 32 * number, start + offset, length))
    return found


def entry_places(image: Sparse) -> list[int]:
    """Where entries of the log begin."""
    starts = {offset + at for offset, raw, _ in image.records if (at := raw.find(b"loge")) >= 0}
    return sorted(at for at in starts if image.peek(at, 4) == b"loge")


def repair(image: Sparse) -> None:
    """Make the checksums of headers, region tables and log entries right."""
    for offset in HEADERS:
        raw = image.peek(offset, HEADER_SIZE)
        if len(raw) == HEADER_SIZE and raw.startswith(b"head"):
            image.put(offset + 4, sealed(raw, 4)[4:8])
    for offset in REGION_TABLES:
        raw = image.peek(offset, REGION_TABLE_SIZE)
        if len(raw) == REGION_TABLE_SIZE and raw.startswith(b"regi"):
            image.put(offset + 4, sealed(raw, 4)[4:8])
    start, log_size = log_place(image)
    for place in entry_places(image):
        size = int.from_bytes(image.peek(place + 8, 4), "little")
        if not 0 < size <= _MOST_LOG_BYTES:
            continue
        inside = start + log_size - place if start <= place < start + log_size else size
        raw = image.peek(place, min(size, inside)) + image.peek(start, max(size - inside, 0))  # it may wrap around
        if len(raw) == size:
            image.put(place + 4, sealed(raw, 4)[4:8])


def _header(rng: random.Random, image: Sparse) -> None:
    offset, size = rng.choice(HEADER_FIELDS)
    raw = little(rng, size)
    if offset == 8 and rng.random() < 0.7:
        raw = rng.randrange(4).to_bytes(8, "little")
    elif offset == 48:
        raw = rng.choice((LOG_GUID, LOG_GUID, bytes(16), raw))
    for at in HEADERS if rng.random() < 0.6 else (rng.choice(HEADERS),):
        _put(image, at + offset, raw)


def _region(rng: random.Random, image: Sparse) -> None:
    offset, size = rng.choice(REGION_FIELDS)
    raw = little(rng, size)
    if offset == 0 and rng.random() < 0.6:
        raw = rng.choice((REGION_BAT, REGION_METADATA))
    number = rng.randrange(4)
    count = rng.choice((0, 1, 3, 4, 2047, 2048, 0xFFFFFFFF)) if rng.random() < 0.3 else None
    for at in REGION_TABLES if rng.random() < 0.8 else (rng.choice(REGION_TABLES),):
        _put(image, at + 16 + 32 * number + offset, raw)
        if count is not None:
            _put(image, at + 8, count.to_bytes(4, "little"))


def _item(rng: random.Random, image: Sparse) -> None:
    known = items(image)
    if not known:
        return
    entry, _, _ = rng.choice(known)
    offset, size = rng.choice(ITEM_FIELDS)
    raw = little(rng, size)
    if offset == 0 and rng.random() < 0.6:
        raw = image.peek(rng.choice(known)[0], 16)
    elif offset == 24:
        raw = rng.randrange(8).to_bytes(4, "little")
    elif offset in (16, 20) and rng.random() < 0.6:
        low = 64 * KIB if offset == 16 else 0
        raw = (low + rng.choice((-1, 0, 1, 4, 8, 16, 512, 65536, MIB - 64 * KIB))).to_bytes(5, "little", signed=True)[
            :4
        ]
    _put(image, entry + offset, raw)
    if rng.random() < 0.2:
        table = entry // MIB * MIB
        count = rng.choice((0, 1, 4, 5, 6, 7, 8, 2047, 2048, 65535))
        _put(image, table + 10, count.to_bytes(2, "little"))


def _value(rng: random.Random, image: Sparse) -> None:
    """The value of an item of 4 or 8 bytes: sizes and flags."""
    known = [one for one in items(image) if one[2] in (4, 8)]
    if not known:
        return
    _, offset, size = rng.choice(known)
    if size == 4:
        raw = rng.choice((512, 4096, 0, 1024, 513)).to_bytes(4, "little")
    elif rng.random() < 0.5:  # file parameters, or what is taken for them
        raw = struct.pack("<II", 1 << rng.randrange(19, 30), rng.choice((0, 0, 1, 2, 2, 3, 4)))
    else:
        number = rng.choice((512, MIB, 4 * MIB, 3 * MIB + 512, 4096 * MIB, TIB, 64 * TIB, 64 * TIB + 512))
        raw = (number + rng.choice((0, 0, 0, -512, 512, 1))).to_bytes(8, "little")
    _put(image, offset, raw)


def locator(rng: random.Random) -> bytes:
    """A locator: pairs that mean something in places that need not."""
    pairs = [
        (rng.choice(_KEYS).encode("utf-16-le"), rng.choice(_VALUES).encode("utf-16-le"))
        for _ in range(rng.randint(1, 6))
    ]
    count = len(pairs) if rng.random() < 0.8 else rng.choice((0, 1, 255, 256, 257, 65535))
    head = (LOCATOR_TYPE if rng.random() < 0.9 else rng.randbytes(16)) + struct.pack("<HH", 0, count)
    position, entries, data = 20 + 12 * len(pairs), b"", b""
    for key, value in pairs:
        places = [position, position + len(key), len(key), len(value)]
        if rng.random() < 0.15:
            number = rng.randrange(4)
            places[number] = int.from_bytes(little(rng, 4 if number < 2 else 2), "little")
        entries += struct.pack("<IIHH", *places)
        data += key + value
        position += len(key) + len(value)
    return head + entries + data


def _locator(rng: random.Random, image: Sparse) -> None:
    known = [one for one in items(image) if one[2] > 16]
    if not known:
        return
    entry, offset, _ = rng.choice(known)
    raw = locator(rng)
    _put(image, offset, raw)
    if rng.random() < 0.8:
        _put(image, entry + 20, len(raw).to_bytes(4, "little"))


def _table(rng: random.Random, image: Sparse) -> None:
    start, _ = regions(image).get(REGION_BAT, (0, 0))
    for _ in range(rng.randint(1, 4)):
        number = rng.choice((rng.randrange(6), rng.randrange(64), 4096, 2048, 128, 16))
        state = rng.choice((0, 1, 2, 3, 6, 6, 6, 7, 7, 4, 5))
        near = image.size // MIB + rng.randint(-3, 2)
        place = rng.choice((rng.randrange(12), near, near, 0, rng.getrandbits(44)))
        reserved = rng.choice((0, 0, 0, 0, 0, 8, 1 << 19))
        _put(image, start + 8 * number, (max(place, 0) << 20 | reserved | state).to_bytes(8, "little"))


def _patch(rng: random.Random, page: bytes) -> bytes:
    """A page for a log to write: often one of the file's own, changed a little."""
    raw = bytearray(page)
    for _ in range(rng.randrange(4)):
        raw[rng.choice((rng.randrange(64), rng.randrange(PAGE)))] = rng.randrange(256)
    return rng.choice((bytes(raw), bytes(raw), bytes(PAGE), b"\x5a" * PAGE))


def changes(rng: random.Random, image: Sparse) -> list[LogChange]:
    """What a log says: pages and ranges of zeros, most of them where a log may change something."""
    made = []
    bases = [*(at for at, _ in regions(image).values()), *REGION_TABLES]
    if rng.random() < 0.15:
        bases += [*HEADERS, 0, MIB, image.size]
    page = image.peek(rng.choice(bases), PAGE).ljust(PAGE, b"\0")
    for _ in range(rng.choice((0, 1, 1, 2, 3, 127, 200) if rng.random() < 0.2 else (0, 1, 1, 2, 3))):
        offset = (rng.choice(bases) + PAGE * rng.choice((0, 0, 0, 1, 7, 16))) & (1 << 64) - 1
        if rng.random() < 0.04:
            offset = int.from_bytes(little(rng, 8), "little")
        if rng.random() < 0.3:
            size = rng.choice((0, PAGE, PAGE, 3 * PAGE, 16 * PAGE, 64 * KIB))
            if rng.random() < 0.1:
                size = rng.choice((MIB, 1 << 40, PAGE - 1, int.from_bytes(little(rng, 8), "little")))
            made.append(LogChange(offset, size, None))
        else:
            made.append(LogChange(offset, PAGE, _patch(rng, page)))
    return made


def _often(rng: random.Random, usual: Sequence[int], strange: Sequence[int]) -> int:
    return rng.choice(usual if rng.random() < 0.9 else strange)


def _log(rng: random.Random, image: Sparse) -> None:
    """A run of whole entries from somewhere in the ring, and headers that name it."""
    start, size = log_place(image)
    if not PAGE <= size <= 8 * MIB or start > MAX_OFFSET - size:
        return
    head = PAGE * rng.choice((0, 0, 0, 1, size // PAGE - 1, rng.randrange(size // PAGE or 1)))
    tail, number = head, rng.choice((1, 1, 2, 1 << 32, (1 << 64) - 3, rng.getrandbits(60) + 1))
    for _ in range(rng.choice((1, 1, 2, 3))):
        raw = log.build_entry(
            LOG_ID if rng.random() < 0.95 else bytes(16),
            min(number, (1 << 64) - 1),
            tail if rng.random() < 0.9 else PAGE * rng.randrange(size // PAGE or 1),
            changes(rng, image),
            flushed_file_offset=_often(rng, (0, image.size, MIB), (image.size + 1, 1 << 60)),
            last_file_offset=_often(rng, (0, image.size, image.size + MIB), (image.size + TIB, 66 * TIB, 1 << 60)),
        )
        for at in range(0, len(raw), PAGE):
            image.put(start + (head + at) % size, raw[at : at + PAGE].rstrip(b"\0") or b"\0")
            tail_of_page = len(raw[at : at + PAGE].rstrip(b"\0")) or 1
            if tail_of_page < PAGE:
                image.put(start + (head + at) % size + tail_of_page, b"\0", PAGE - tail_of_page)
        head = (head + len(raw)) % size
        number += 1 if rng.random() < 0.95 else rng.randrange(3)
    for offset in HEADERS:
        image.put(offset + 48, LOG_GUID)


def _log_field(rng: random.Random, image: Sparse) -> None:
    places = entry_places(image)
    if not places:
        return
    at = rng.choice(places)
    if rng.random() < 0.5:
        offset, size = rng.choice(LOG_FIELDS)
    else:
        offset, size = rng.choice(DESCRIPTOR_FIELDS)
        offset += 64 + 32 * rng.randrange(4)
    _put(image, at + offset, little(rng, size))


def _size(rng: random.Random, image: Sparse) -> None:
    kind = rng.randrange(3)
    if kind == 0:
        image.size = rng.randrange(image.size + 1)
    elif kind == 1:
        image.size = max(0, image.size - rng.choice((1, 512, PAGE, MIB, 2 * MIB)))
    else:
        image.size = min(image.size + rng.choice((1, 512, PAGE, MIB, TIB)), MAX_OFFSET)


_Step = Callable[[random.Random, Sparse], None]
_STEPS: tuple[_Step, ...] = (
    _header, _header, _region, _region, _item, _item, _value, _value, _locator, _table, _table, _table, _log, _log,
    _log_field, _size, flip_bits,
)  # fmt: skip
MUTATE_LOG: tuple[_Step, ...] = (*[_log] * 10, _log_field, _log_field, _header, _size, flip_bits)


def mutate_vhdx(data: bytes, rng: random.Random, others: Sequence[bytes], steps: Sequence[_Step] = _STEPS) -> bytes:
    """Another image, near `data`; `others` are for splices. Sometimes only bytes are changed, without a plan."""
    if rng.random() < 0.05:
        return mutate_bytes(data, rng, others)
    image = decode(data)
    image.records = list(image.records)
    for _ in range(rng.choice((1, 1, 2, 3, 6))):
        if rng.random() < 0.05:
            splice(rng, image, decode(rng.choice(others)))
        else:
            rng.choice(steps)(rng, image)
    if rng.random() < 0.95:
        repair(image)
    return image.encode()
