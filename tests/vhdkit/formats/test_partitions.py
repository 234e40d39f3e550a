# SPDX-License-Identifier: Apache-2.0
"""Partition tables: those of real tools, odd ones, and hostile ones."""

from __future__ import annotations

import struct
import subprocess
import uuid
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.harness.stores import MemStore
from tests.support import require_tool
from vhdkit.formats.partitions import MAX_LOGICAL_PARTITIONS, PartitionTable, read_partitions
from vhdkit.units import KIB, MIB

SECTOR = 512
LINUX = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"


def mbr(*entries: tuple[int, int, int]) -> bytes:
    """A table of (type, first sector, count)."""
    raw = b"".join(struct.pack("<B3sB3sII", 0, b"", kind, b"", first, count) for kind, first, count in entries)
    return (bytes(446) + raw).ljust(510, b"\0") + b"\x55\xaa"


def write_gpt(
    store: MemStore, size: int, *partitions: tuple[int, int, str], primary: bool = True, sector: int = SECTOR
) -> None:
    """A protective MBR and both copies of a GPT, as the UEFI specification lays them out."""
    last = size // sector - 1
    entries = b"".join(
        struct.pack("<16s16sQQQ72s", uuid.UUID(LINUX).bytes_le, b"u" * 16, first, end, 0, name.encode("utf-16-le"))
        for first, end, name in partitions
    ).ljust(128 * 128, b"\0")
    store.pwrite(0, mbr((0xEE, 1, last)))
    count = -(-len(entries) // sector)
    for own, other, place in ((1, last, 2), (last, 1, last - count)):
        if own == 1 and not primary:
            continue
        fields = (own, other, 2 + count, last - count - 1, b"d" * 16, place, 128, 128, zlib.crc32(entries))
        head = struct.pack("<8sII", b"EFI PART", 0x10000, 92)
        body = struct.pack("<4xQQQQ16sQIII", *fields)
        crc = zlib.crc32(head + bytes(4) + body)
        store.pwrite(own * sector, head + struct.pack("<I", crc) + body)
        store.pwrite(place * sector, entries)


def disk(size: int = 16 * MIB, raw: bytes = b"") -> MemStore:
    """A disk of zeros that begins with `raw`."""
    store = MemStore("disk.img")
    store.truncate(size)
    store.pwrite(0, raw)
    return store


def table_of(store: MemStore) -> PartitionTable | None:
    """The table that is read from the store."""
    return read_partitions(store.pread, store.size())


def test_mbr_with_logical_partitions() -> None:
    """Primary partitions are numbered by their place in the table, logical ones from 5, along the chain of tables."""
    store = disk(raw=mbr((0x83, 2048, 2048), (0, 0, 0), (0x0F, 8192, 16384)))
    store.pwrite(8192 * SECTOR, mbr((0x07, 64, 1000), (0x05, 4096, 4096)))
    store.pwrite((8192 + 4096) * SECTOR, mbr((0x82, 64, 2000)))
    table = table_of(store)
    assert table is not None and table.scheme == "mbr" and table.backup_ranges == ()
    assert [
        (one.number, one.offset_bytes // SECTOR, one.size_bytes // SECTOR, one.kind) for one in table.partitions
    ] == [
        (1, 2048, 2048, "0x83"),
        (3, 8192, 16384, "0x0f"),
        (5, 8192 + 64, 1000, "0x07"),
        (6, 8192 + 4096 + 64, 2000, "0x82"),
    ]


def test_gpt_with_names() -> None:
    """Numbers, offsets, types and names of a GPT, and the place of its second copy."""
    store = disk()
    write_gpt(store, 16 * MIB, (2048, 4095, "boot"), (4096, 20000, "Ünicode ☃"))
    table = table_of(store)
    assert table is not None and table.scheme == "gpt"
    assert [(one.number, one.end_bytes, one.name, one.kind) for one in table.partitions] == [
        (1, 2 * MIB, "boot", LINUX),
        (2, 20001 * SECTOR, "Ünicode ☃", LINUX),
    ]
    assert table.backup_ranges == ((16 * MIB - 33 * SECTOR, 32 * SECTOR), (16 * MIB - SECTOR, SECTOR))


def test_the_second_gpt_is_used_if_the_first_is_lost() -> None:
    """Partitions are read from the copy at the end, which then is not spare: it has no range to give up."""
    store = disk()
    write_gpt(store, 16 * MIB, (2048, 4095, "boot"), primary=False)
    table = table_of(store)
    assert table is not None and [one.name for one in table.partitions] == ["boot"] and table.backup_ranges == ()


@pytest.mark.parametrize("offset", [8 * MIB - 33 * SECTOR, 8 * MIB - SECTOR + 60])
def test_a_second_gpt_that_differs_is_not_given_up(offset: int) -> None:
    """A second copy that is damaged or different has no range."""
    store = disk(8 * MIB)
    write_gpt(store, 8 * MIB, (2048, 4095, "boot"))
    store.pwrite(offset, b"\1")
    table = table_of(store)
    assert table is not None and len(table.partitions) == 1 and table.backup_ranges == ()


def test_a_disk_without_a_table() -> None:
    """Zeros, a file system's boot sector, and a disk of one sector have no table."""
    assert table_of(disk()) is None
    assert table_of(disk(SECTOR)) is None
    boot = bytearray(mbr())
    boot[446:510] = b"\x4f\x53 not found\r\n" * 4 + bytes(8)
    assert table_of(disk(raw=bytes(boot))) is None


def test_extended_partitions_that_never_end() -> None:
    """A chain that leads back to itself, or never ends, is read up to the limit."""
    store = disk(raw=mbr((0x05, 64, 20000)))
    store.pwrite(64 * SECTOR, mbr((0x83, 1, 1), (0x05, 0, 1)))
    table = table_of(store)
    assert table is not None and len(table.partitions) == 2
    long = disk(raw=mbr((0x05, 64, 20000)))
    for number in range(MAX_LOGICAL_PARTITIONS + 50):
        long.pwrite((64 + number) * SECTOR, mbr((0x83, 1, 1), (0x05, number + 1, 1)))
    table = table_of(long)
    assert table is not None and len(table.partitions) == MAX_LOGICAL_PARTITIONS + 1


@given(st.lists(st.tuples(st.integers(0, 16 * KIB), st.binary(min_size=1, max_size=16)), max_size=8), st.booleans())
def test_arbitrary_bytes_are_a_table_or_none(changes: list[tuple[int, bytes]], gpt: bool) -> None:
    """INV-BOUNDED: whatever a guest writes there, reading the table ends, with or without a table."""
    store = disk(64 * KIB, raw=mbr((0x05, 3, 90), (0x83, 0xFFFFFFFF, 0xFFFFFFFF)))
    if gpt:
        write_gpt(store, 64 * KIB, (40, 50, "x"))
    for offset, raw in changes:
        store.pwrite(offset, raw)
    table = table_of(store)
    assert table is None or all(one.size_bytes > 0 for one in table.partitions)


@pytest.mark.parametrize("primary", [True, False])
def test_a_gpt_that_counts_in_large_sectors(primary: bool) -> None:
    """On a disk with sectors of 4096 bytes the table lies and counts in those, and with other sectors it is none."""
    store = disk(16 * MIB)
    write_gpt(store, 16 * MIB, (256, 511, "boot"), (512, 4000, "data"), primary=primary, sector=4096)
    table = read_partitions(store.pread, 16 * MIB, 4096)
    assert table is not None and table.scheme == "gpt"
    assert [(one.offset_bytes, one.size_bytes) for one in table.partitions] == [
        (256 * 4096, 256 * 4096),
        (512 * 4096, 3489 * 4096),
    ]
    backup = ((16 * MIB - 5 * 4096, 16 * KIB), (16 * MIB - 4096, 4096))
    assert table.backup_ranges == (backup if primary else ())
    found = read_partitions(store.pread, 16 * MIB)
    assert found is None or found.scheme == "mbr"


def test_an_mbr_that_counts_in_large_sectors() -> None:
    """Primary and logical partitions count in the disk's sectors, too."""
    store = disk(64 * MIB, mbr((0x83, 256, 1024), (0x05, 2048, 4096)))
    store.pwrite(2048 * 4096, mbr((0x83, 16, 512)))
    table = read_partitions(store.pread, 64 * MIB, 4096)
    assert table is not None
    assert [(one.number, one.offset_bytes, one.size_bytes) for one in table.partitions] == [
        (1, 256 * 4096, 1024 * 4096),
        (2, 2048 * 4096, 4096 * 4096),
        (5, 2064 * 4096, 512 * 4096),
    ]


@pytest.mark.interop
def test_a_table_of_fdisk_with_large_sectors(tmp_path: Path) -> None:
    """What fdisk wrote with sectors of 4096 bytes is read as fdisk reads it."""
    tool = require_tool("fdisk")
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(64 * MIB))
    script = "g\nn\n1\n\n+8M\nn\n2\n\n+16M\nw\n"
    subprocess.run([tool, "-b", "4096", path], input=script, text=True, check=True, capture_output=True)
    shown = subprocess.run([tool, "-b", "4096", "-l", "-o", "Start,Sectors", path], text=True, check=True,
                           capture_output=True).stdout  # fmt: skip
    expected = [tuple(int(word) * 4096 for word in line.split()) for line in shown.split("Sectors\n")[-1].splitlines()]
    raw = path.read_bytes()
    table = read_partitions(lambda offset, size: raw[offset : offset + size], len(raw), 4096)
    assert table is not None and len(expected) == 2
    assert [(one.offset_bytes, one.size_bytes) for one in table.partitions] == expected


@pytest.mark.interop
@pytest.mark.parametrize("label", ["gpt", "dos"])
def test_tables_of_sfdisk(tmp_path: Path, label: str) -> None:
    """What sfdisk wrote is read as sfdisk reads it."""
    tool = require_tool("sfdisk")
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(64 * MIB))
    lines = [f"label: {label}", "size=8M", "size=16M"]
    lines += ["size=20M, type=E", "size=4M", "size=5M"] if label == "dos" else ['size=4M, name="mine"']
    subprocess.run([tool, "-q", path], input="\n".join(lines), text=True, check=True, capture_output=True)
    output = subprocess.run([tool, "-d", path], text=True, check=True, capture_output=True).stdout
    lines = [line.removeprefix(str(path)) for line in output.splitlines() if "start=" in line]
    starts = {int(line.split(":")[0]): int(line.split("start=")[1].split(",")[0]) for line in lines}
    raw = path.read_bytes()
    table = read_partitions(lambda offset, size: raw[offset : offset + size], len(raw))
    assert table is not None
    assert {one.number: one.offset_bytes // SECTOR for one in table.partitions} == starts


def test_types_in_words_and_ids() -> None:
    """The type in words, the extended one by its type, and the id that Linux calls PARTUUID."""
    raw = bytearray(mbr((0x83, 2048, 64), (0x0F, 4096, 64), (0x42, 8192, 64)))
    raw[440:444] = bytes.fromhex("efbeadde")
    table = table_of(disk(raw=bytes(raw)))
    assert table is not None
    assert [one.kind_name for one in table.partitions] == ["Linux", "Extended", "0x42"]
    assert [one.is_extended for one in table.partitions] == [False, True, False]
    assert [one.unique_id for one in table.partitions] == ["deadbeef-01", "deadbeef-02", "deadbeef-03"]
    store = disk()
    write_gpt(store, 16 * MIB, (2048, 4095, "one"))
    table = table_of(store)
    assert table is not None
    assert table.partitions[0].kind_name == "Linux filesystem"
    assert table.partitions[0].unique_id == str(uuid.UUID(bytes_le=b"u" * 16))
