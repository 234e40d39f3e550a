# SPDX-License-Identifier: Apache-2.0
"""Damage with a plan: changes to an image that keep it alive long enough to reach deep code.

Decides what is changed. The checksums of both footers and of the header are made right again nearly always:
without that nearly every change ends at the first comparison. Offsets are those of the specification, written
down once more here. Everything comes from the `random.Random` that is handed in.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence

from fuzz.sparse import MAX_OFFSET, Sparse, decode
from tests.harness.vhd_builder import SECTOR, seal

Field = tuple[int, int]  # offset, size

FOOTER_FIELDS: tuple[Field, ...] = (
    (8, 4), (12, 4), (16, 8), (24, 4), (28, 4), (32, 4), (36, 4), (40, 8), (48, 8), (56, 2), (58, 1), (59, 1),
    (60, 4), (68, 8), (84, 1), (85, 1), (86, 4),
)  # fmt: skip
HEADER_FIELDS: tuple[Field, ...] = ((8, 8), (16, 8), (24, 4), (28, 4), (32, 4), (40, 8), (56, 4), (60, 4), (64, 2))
LOCATOR_FIELDS: tuple[Field, ...] = ((0, 4), (4, 4), (8, 4), (12, 4), (16, 8))
BATMAP_FIELDS: tuple[Field, ...] = ((0, 8), (8, 8), (16, 4), (20, 4), (24, 4))
_CODES = (b"W2ru", b"W2ku", b"MacX", b"Wi2r", b"Wi2k", b"Mac ", b"\0\0\0\0", b"\x1b[2J", b"\xff\xfe\r\n")
_CREATORS = (b"vpc ", b"qemu", b"tap\0", b"win ", b"\x1b[2J")
_POWERS = tuple(1 << bit for bit in range(64))
_EDGES = (0, 1, 2, 3, 4, 511, 512, 513, 1024, 1536, 4096, 65535, 65536, 0xC7C7C7C7)


def extreme(rng: random.Random, size: int) -> bytes:
    """A number of `size` bytes that programs stumble over."""
    top = (1 << 8 * size) - 1
    kind = rng.randrange(4)
    if kind == 0:
        value = rng.choice(_EDGES)
    elif kind == 1:
        value = rng.choice(_POWERS) + rng.choice((-512, -1, 0, 1, 512))
    elif kind == 2:
        value = top - rng.choice((0, 1, 2, 511, 512, 1023, 1 << 9, 1 << 20)) >> rng.choice((0, 0, 1, 9))
    else:
        value = rng.getrandbits(8 * size) >> rng.randrange(8 * size)
    return (value & top).to_bytes(size, "big")


def footer_places(image: Sparse) -> list[int]:
    """Where footers begin: at the end (512 or 511 bytes) and at the beginning."""
    places = {image.size - SECTOR, image.size - SECTOR + 1, 0}
    return sorted(at for at in places if at >= 0 and image.peek(at, 8) == b"conectix")


def header_place(image: Sparse) -> int | None:
    """Where a footer says the header is, or where it usually is."""
    offsets = [struct.unpack(">Q", image.peek(at + 16, 8))[0] for at in footer_places(image) if at + 24 <= image.size]
    return next((at for at in [*offsets, SECTOR] if image.peek(at, 8) == b"cxsparse"), None)


def repair(image: Sparse) -> None:
    """Make the checksums of both footers and of the header right."""
    for at in footer_places(image):
        raw = image.peek(at, SECTOR)
        if len(raw) >= SECTOR - 1:
            image.put(at, seal(raw, 64))
    at_header = header_place(image)
    if at_header is not None and len(raw := image.peek(at_header, 1024)) == 1024:
        image.put(at_header, seal(raw, 36))


def _footer(rng: random.Random, image: Sparse) -> None:
    places = footer_places(image)
    offset, size = rng.choice(FOOTER_FIELDS)
    raw = extreme(rng, size)
    if offset == 28 and rng.random() < 0.8:
        raw = rng.choice(_CREATORS)
    elif offset == 60 and rng.random() < 0.8:
        raw = struct.pack(">I", rng.randrange(1, 6))
    elif offset == 48 and rng.random() < 0.5:
        raw = struct.pack(">Q", rng.choice((512, 1 << 20, 1 << 30, 1 << 41, (1 << 41) + 512, 3 << 20, 1 << 46)))
    for at in places if rng.random() < 0.7 else places[:1]:
        image.put(at + offset, raw)


def _header(rng: random.Random, image: Sparse) -> None:
    at = header_place(image)
    if at is None:
        return
    offset, size = rng.choice(HEADER_FIELDS)
    raw = extreme(rng, size)
    if offset == 32 and rng.random() < 0.8:
        raw = struct.pack(">I", 1 << rng.randrange(18, 30))
    elif offset == 16 and rng.random() < 0.6:
        raw = struct.pack(">Q", rng.choice((0, 1, 256, 512, 1024, 1535, 1536, 2048, image.size, image.size - 512)))
    image.put(at + offset, raw)


def _locator(rng: random.Random, image: Sparse) -> None:
    at = header_place(image)
    if at is None:
        return
    entry = at + 576 + 24 * rng.randrange(8)
    for offset, size in rng.sample(LOCATOR_FIELDS, rng.randint(1, len(LOCATOR_FIELDS))):
        raw = rng.choice(_CODES) if offset == 0 else extreme(rng, size)
        if offset == 16 and rng.random() < 0.7:
            raw = struct.pack(">Q", rng.choice((0, 512, 576, 1536, 2048, max(image.size - 1, 0), image.size)))
        elif offset == 8 and rng.random() < 0.7:
            raw = struct.pack(">I", rng.choice((0, 1, 2, 3, 24, 25, 512, 65535, 65536, 65537)))
        image.put(entry + offset, raw)


def _table(rng: random.Random, image: Sparse) -> None:
    at = header_place(image)
    if at is None:
        return
    table, count = struct.unpack(">Q4xI", image.peek(at + 16, 16).ljust(16, b"\0"))
    for _ in range(rng.randint(1, 4)):
        entry = table + 4 * (rng.randrange(min(count, 64) or 1) if rng.random() < 0.8 else max(count - 1, 0))
        near = rng.choice((0, 1, 2, 3, 4, 5, 8, 16, 0xFFFFFFFE, 0xFFFFFFFF, image.size // SECTOR & 0xFFFFFFFF))
        number = (near + rng.randint(-2, 2)) & 0xFFFFFFFF if rng.random() < 0.7 else rng.getrandbits(32)
        if entry <= MAX_OFFSET:
            image.put(entry, struct.pack(">I", number))


def _batmap(rng: random.Random, image: Sparse) -> None:
    found = [offset for offset, raw, _ in image.records if raw.startswith(b"tdbatmap")]
    for at in found:
        offset, size = rng.choice(BATMAP_FIELDS)
        image.put(at + offset, extreme(rng, size))


def _size(rng: random.Random, image: Sparse) -> None:
    kind = rng.randrange(4)
    if kind == 0:
        image.size = rng.randrange(image.size + 1)
    elif kind == 1:
        image.size = max(0, image.size - rng.choice((1, 2, 511, 512, 513, 1024, 4096)))
    elif kind == 2:
        image.size = min(image.size + rng.choice((1, 511, 512, 4096, 1 << 20, 1 << 41)), MAX_OFFSET)
    else:
        image.size = min(rng.choice(_POWERS) + rng.choice((-1, 0, 1, 511, 512)), MAX_OFFSET)
    if rng.random() < 0.5 and image.size >= SECTOR:  # the footer moves along
        image.put(image.size - SECTOR, image.peek(0, SECTOR))


def flip_bits(rng: random.Random, image: Sparse) -> None:
    """Flip a few bits of what is stored."""
    if not image.records:
        return
    offset, raw, repeat = rng.choice(image.records)
    for _ in range(rng.randint(1, 8)):
        at = offset + rng.randrange(len(raw) * repeat)
        old = image.peek(at, 1)
        if old:
            image.put(at, bytes([old[0] ^ 1 << rng.randrange(8)]))


def splice(rng: random.Random, image: Sparse, other: Sparse) -> None:
    """Lay some of what another file stores over this one."""
    if not other.records:
        return
    for offset, raw, repeat in rng.sample(other.records, min(len(other.records), rng.randint(1, 3))):
        if offset < image.size:
            image.put(offset, raw, repeat)


def _poison(rng: random.Random, image: Sparse) -> None:
    for at in footer_places(image):
        if rng.random() < 0.5:
            image.put(at, rng.choice((b"v_poison", b"\xc7" * SECTOR, bytes(SECTOR), bytes(8))))


_STEPS: tuple[Callable[[random.Random, Sparse], None], ...] = (
    _footer, _footer, _footer, _header, _header, _header, _locator, _locator, _table, _table, _batmap, _size,
    flip_bits, _poison,
)  # fmt: skip


def mutate_image(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """Another image, near `data`; `others` are for splices. Sometimes only bytes are changed, without a plan."""
    if rng.random() < 0.08:
        return mutate_bytes(data, rng, others)
    image = decode(data)
    image.records = list(image.records)
    for _ in range(rng.choice((1, 1, 2, 3, 6))):
        if rng.random() < 0.07:
            splice(rng, image, decode(rng.choice(others)))
        else:
            rng.choice(_STEPS)(rng, image)
        if rng.random() < 0.93:
            repair(image)
    return image.encode()


def mutate_bytes(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """`data` with bytes flipped, overwritten, cut, doubled or joined with another input; no plan."""
    raw = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        kind, at = rng.randrange(6), rng.randrange(len(raw) + 1)
        if kind == 0 and at < len(raw):
            raw[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            number = extreme(rng, rng.choice((1, 2, 4, 8)))
            raw[at : at + len(number)] = number
        elif kind == 2 and rng.random() < 0.5:
            del raw[at:]
        elif kind == 3:
            del raw[at : at + rng.randint(1, 16)]
        elif kind == 4:
            raw[at:at] = raw[at : at + rng.randint(1, 64)]
        elif others:
            other = rng.choice(others)
            start = rng.randrange(len(other) + 1)
            raw[at : at + rng.randint(1, 256)] = other[start : start + rng.randint(1, 256)]
    return bytes(raw[: 1 << 16])
