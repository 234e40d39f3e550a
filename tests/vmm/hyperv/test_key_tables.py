# SPDX-License-Identifier: Apache-2.0
"""The keys of a container: how they are linked, and that a changed byte is noticed."""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path

import pytest

from tests.vmm.hyperv.writing import PAGE, TABLES_START, Writer, entry, object_line, object_table, sealed, tree
from vmm.hyperv.keys import Key
from vmm.hyperv.reading import read
from vmm.model.errors import BadConfiguration

NODE = struct.pack("<QI", 0, 0)


def container(*tables: bytes) -> bytes:
    """A file with these entries in its tables, whose numbers and sequences are 1; or with whole tables."""
    whole = bytearray(Writer().write(tree(configuration={"a": 1})))
    lines = []
    for number, content in enumerate(tables, 1):
        place = TABLES_START + (number - 1) * PAGE
        if not content.startswith(b"\2\0"):
            content = table(number, 1, content)
        whole[place : place + PAGE] = content.ljust(PAGE, b"\0")
        lines.append(object_line(2, place, PAGE))
    whole[2 * PAGE : 3 * PAGE] = object_table(lines).ljust(PAGE, b"\0")
    return bytes(whole)


def table(number: int, sequence: int, content: bytes) -> bytes:
    """A table of keys."""
    return sealed(struct.pack("<HHHI", 2, number, sequence, 0), 6) + content


def read_from(path: Path, content: bytes) -> Key:
    """The tree of a file."""
    path.write_bytes(content)
    return read(os.fspath(path))


def test_keys_are_linked_when_all_are_read(tmp_path: Path) -> None:
    """A child may stand in an earlier table than its parent; the order is that of insertion, and names may repeat."""
    parent = entry(9, "p", NODE, (0, 0), 5)
    number = struct.pack("<q", 1)
    children = entry(3, "b", number, (2, 10), 7) + entry(1, "x", b"", (9, 9), 0) + entry(4, "B", number, (2, 10), 6)
    found = read_from(tmp_path / "a", container(children, parent))
    assert found == Key("", None, (Key("p", None, (Key("B", 1), Key("b", 1))),))
    assert len(found.every("P/b")) == 2 and found.at("P/b") is None


def test_of_two_tables_with_one_number_the_newer_counts(tmp_path: Path) -> None:
    """Two of one age are refused."""
    old, new = (table(1, age, entry(9, name, NODE, (0, 0), 1)) for age, name in ((1, "old"), (2, "new")))
    assert read_from(tmp_path / "a", container(new, old)).children[0].name == "new"
    with pytest.raises(BadConfiguration, match="one sequence"):
        read_from(tmp_path / "a", container(old, table(1, 1, b"")))


WRONG = [
    (entry(9, "a", NODE, (1, 999), 1), "the key above"),
    (entry(3, "a", bytes(8), (0, 0), 1) + entry(3, "b", bytes(8), (1, 10), 2), "the key above"),
    (entry(9, "a", NODE, (1, 10), 1), "below itself"),
    (entry(10, "a", bytes(8), (0, 0), 1), "unknown kind 10"),
    (entry(3, "a", bytes(3), (0, 0), 1), "longer than its entry"),
    (entry(6, "a", struct.pack("<I", 1 << 31), (0, 0), 1), "longer than its entry"),
    (entry(6, "a", struct.pack("<I", 2) + b"\0\xd8", (0, 0), 1), "not UTF-16"),
    (sealed(entry(9, "a", NODE, (0, 0), 1).replace(b"a\0", b"\xff\0"), 12), "not UTF-8"),
    (entry(9, "a", NODE, (0, 0), 1)[:2] + b"\5" + bytes(40), "its table does not hold"),
    (entry(6, "a", struct.pack("<IQ", 4, PAGE), (0, 0), 1, flags=1), "not in the table of objects"),
    (b"".join(entry(9, "a", NODE, (1, 10 + 35 * (n - 1)) if n else (0, 0), n) for n in range(40)), "deeper"),
]


@pytest.mark.parametrize(("content", "problem"), WRONG, ids=range(len(WRONG)))
def test_what_contradicts_itself_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    """With the place of the key."""
    with pytest.raises(BadConfiguration, match=f"{problem}.* at byte "):
        read_from(tmp_path / "a", container(content))


def test_long_values_have_objects_of_their_own(tmp_path: Path) -> None:
    """Text and bytes from 2048 bytes on."""
    whole = tree(configuration={"text": "é" * 3000, "bytes": bytes(range(256)) * 20, "short": "x"})
    assert read_from(tmp_path / "a", Writer().write(whole)) == whole


def test_every_changed_byte_of_a_key_is_noticed(tmp_path: Path) -> None:
    """In heads, names and values: refused, with a place. In the slack behind them nothing changes."""
    whole = tree(configuration={"name": "web", "memory": 1024, "running": True, "time": b"12345678"})
    writer = Writer(slack=3)
    content = writer.write(whole)
    rng = random.Random(21)
    for place, size in writer.entries:
        for at in rng.sample(range(place, place + size), 12):
            damaged = bytearray(content)
            damaged[at] ^= 1 << rng.randrange(8)
            with pytest.raises(BadConfiguration, match="at byte"):
                read_from(tmp_path / "a", bytes(damaged))
        damaged = bytearray(content)
        damaged[place + size] ^= 0xFF
        assert read_from(tmp_path / "a", bytes(damaged)) == whole
