# SPDX-License-Identifier: Apache-2.0
"""INV-BOUNDED for configurations of Hyper-V: any bytes are read or refused, in bounded time and memory.

Fed: one file, XML or VMCX, packed by zlib, as a container consists mostly of zeros. Tried: reading its keys, and what
they say about a machine. Also watched: a refusal is one line that names the file, every sixteenth file reads alike
twice, and a tree has no more keys and no greater depth than it may.
"""

from __future__ import annotations

import os
import random
import struct
import sys
import zlib
from collections.abc import Sequence

from fuzz.loop import main
from fuzz.mutate import extreme, mutate_bytes
from tests.vmm.hyperv.writing import sealed
from vmm.hyperv import layout
from vmm.hyperv.configuration import configuration
from vmm.hyperv.keys import MAX_DEPTH, MAX_KEYS, Key
from vmm.hyperv.reading import read_open
from vmm.model.errors import BadConfiguration

_NAME = "machine.vmcx"
_MAX_BYTES = 1 << 20


def packed_file(content: bytes) -> bytes:
    """An input."""
    return zlib.compress(content, 1)


def _unpacked(data: bytes) -> bytes:
    """The file of an input; an input that is not packed is the file."""
    try:
        return zlib.decompressobj().decompress(data, _MAX_BYTES)
    except zlib.error:
        return data


def target(data: bytes) -> None:
    """Read one file, twice."""
    data = _unpacked(data)
    descriptor = os.memfd_create(_NAME, os.MFD_CLOEXEC)
    try:
        os.write(descriptor, data)
        try:
            tree = read_open(_NAME, descriptor, len(data))
            assert sum(1 for _ in tree.walk()) <= MAX_KEYS and _depth(tree) <= MAX_DEPTH
            if zlib.crc32(data) % 16 == 0:
                assert read_open(_NAME, descriptor, len(data)) == tree or _has_nan(tree)
            found = configuration(_NAME, tree)
            assert found.name and found.generation in (1, 2) and found.memory.start_mib > 0
        except BadConfiguration as error:
            assert str(error).isprintable() and _NAME in str(error)
    finally:
        os.close(descriptor)


def _depth(tree: Key) -> int:
    """How many keys lie above one another, below the root."""
    level, depth = tree.children, 0
    while level:
        level, depth = tuple(below for key in level for below in key.children), depth + 1
    return depth


def _has_nan(tree: Key) -> bool:
    """Whether a number in it equals nothing, not even itself."""
    return any(isinstance(key.value, float) and key.value != key.value for _, key in tree.walk())


def mutate(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """Changed bytes; in containers mostly with checksums made right again."""
    content = _unpacked(data)
    if not content.startswith(layout.HEADER_SIGNATURE.to_bytes(4, "little")) or rng.random() < 0.2:
        return packed_file(mutate_bytes(content, rng, [_unpacked(other) for other in others]))
    raw = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        rng.choice((_change_header, _change_object, _change_log, _change_key, _change_key, _change_key))(raw, rng)
    return packed_file(bytes(raw))


def _put(raw: bytearray, place: int, size: int, sum_place: int, rng: random.Random, fields: Sequence[tuple[int, int]]
         ) -> None:  # fmt: skip
    """Change a field of a structure, and seal it."""
    if place + size > len(raw):
        return
    offset, length = rng.choice(fields)
    raw[place + offset : place + offset + length] = extreme(rng, length)
    raw[place : place + size] = sealed(bytes(raw[place : place + size]), sum_place)


def _change_header(raw: bytearray, rng: random.Random) -> None:
    fields = ((8, 2), (10, 4), (26, 8), (34, 8))
    _put(raw, rng.choice(layout.HEADER_OFFSETS), layout.HEADER_BYTES, 4, rng, fields)


def _change_object(raw: bytearray, rng: random.Random) -> None:
    place = layout.OBJECT_TABLE_OFFSET + layout.OBJECT_TABLE_BYTES + layout.OBJECT_BYTES * rng.randrange(8)
    _put(raw, place, layout.OBJECT_BYTES, 1, rng, ((0, 1), (5, 8), (13, 4), (17, 1)))


def _change_log(raw: bytearray, rng: random.Random) -> None:
    start = int(struct.unpack_from("<Q", raw, 26)[0])
    if rng.random() < 0.5:
        _put(raw, start, layout.LOG_BYTES, 4, rng, ((8, 4),))
    else:
        place = start + layout.LOG_BYTES + layout.LOG_ENTRY_BYTES * rng.randrange(3)
        _put(raw, place, layout.LOG_ENTRY_BYTES, 20, rng, ((0, 8), (8, 4), (12, 4)))


def _change_key(raw: bytearray, rng: random.Random) -> None:
    """A field of a key in a table, or the head of the table."""
    start = layout.OBJECT_TABLE_OFFSET + 0x1000 * rng.randrange(1, 3)
    place, places = start + layout.KEY_TABLE_BYTES, []
    while place + layout.ENTRY_BYTES < min(start + 0x1000, len(raw)):
        size = int(struct.unpack_from("<I", raw, place + 2)[0])
        if size < layout.ENTRY_BYTES or place + size > len(raw):
            break
        places.append((place, size))
        place += size
    if not places or rng.random() < 0.1:
        _put(raw, start, layout.KEY_TABLE_BYTES, 6, rng, ((0, 2), (2, 2), (4, 2)))
        return
    place, size = rng.choice(places)
    fields = ((0, 1), (1, 1), (2, 4), (6, 2), (8, 4), (16, 4), (20, 1), (21, 1), (size - 4, 4))
    _put(raw, place, size, 12, rng, fields)


if __name__ == "__main__":
    sys.exit(main(target, "fuzz_hyperv", mutate))
