# SPDX-License-Identifier: Apache-2.0
"""A chain of VHDs read by the specification's offsets alone: the independent path by which disks are judged.

Slow and plain: footer, header, BAT and bitmaps as `ParsedVhd` parses them, each parent by the relative locator in the
child's header. This module opens no file through vhdkit, holds no lock and follows no record: what it reads is what
is on the disk at this moment.
"""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path

from tests.harness.model import ParsedVhd
from tests.harness.stores import MemStore
from vhdkit.units import SECTOR_SIZE

_LOCATOR_SLOTS, _RELATIVE = range(8), b"W2ru"
MAX_LAYERS = 300


class Unreadable(AssertionError):
    """A file of the chain is missing, damaged, or is not the parent that its child recorded."""


def read_chain(path: str | Path, begin_bytes: int = 0, end_bytes: int | None = None) -> bytes:
    """The content of the disk whose leaf this is, or a range of it. Raises Unreadable."""
    return _read(Path(path), None, MAX_LAYERS)[begin_bytes:end_bytes]


def digest_of(path: Path) -> str:
    """The hash of that content."""
    return hashlib.sha256(read_chain(path)).hexdigest()


def _read(path: Path, wanted_id: bytes | None, depth: int) -> bytes:
    if depth == 0:
        raise Unreadable(f"{path}: more than {MAX_LAYERS} layers")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise Unreadable(f"{path}: {error.strerror}") from error
    store = _stored(path, raw)
    footer = raw[:SECTOR_SIZE] if raw.startswith(b"conectix") else raw[-SECTOR_SIZE:]
    if wanted_id is not None and footer[68:84] != wanted_id:
        raise Unreadable(f"{path}: is not the parent that its child recorded")
    try:
        parsed = ParsedVhd.parse(store)
    except AssertionError as error:
        raise Unreadable(f"{path}: {error}") from error
    content = bytearray(parsed.size_bytes)
    if parsed.is_differencing:
        header = store.pread(struct.unpack_from(">Q", footer, 16)[0], 1024)
        below = _read(_parent_of(path, store, header), header[40:56], depth - 1)
        content[: min(len(below), len(content))] = below[: len(content)]
    for block, entry in enumerate(parsed.entries):
        if entry != 0xFFFFFFFF:
            _lay_over(content, raw, parsed, block, entry * SECTOR_SIZE)
    return bytes(content)


def _stored(path: Path, raw: bytes) -> MemStore:
    store = MemStore(str(path))
    store.pwrite(0, raw)
    return store


def _lay_over(content: bytearray, raw: bytes, parsed: ParsedVhd, block: int, start: int) -> None:
    """Put the sectors that the block owns over what lies below it."""
    bits = raw[start : start + parsed.bitmap_bytes]
    data, first = start + parsed.bitmap_bytes, block * parsed.block_size_bytes
    for sector in range(parsed.block_size_bytes // SECTOR_SIZE):
        at = first + sector * SECTOR_SIZE
        if at >= parsed.size_bytes:
            return
        if bits[sector // 8] & (0x80 >> sector % 8):
            place = data + sector * SECTOR_SIZE
            content[at : at + SECTOR_SIZE] = raw[place : place + SECTOR_SIZE].ljust(SECTOR_SIZE, b"\0")


def _parent_of(path: Path, store: MemStore, header: bytes) -> Path:
    for slot in _LOCATOR_SLOTS:
        code, _, length, _, offset = struct.unpack_from(">4sIIIQ", header, 576 + 24 * slot)
        if code == _RELATIVE:
            name = store.pread(offset, length).decode("utf-16-le").replace("\\", "/")
            return Path(os.path.normpath(path.parent / name))
    raise Unreadable(f"{path}: has no relative locator")
