# SPDX-License-Identifier: Apache-2.0
"""The parts of a container: headers, the log, tables of objects."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from tests.vmm.hyperv.writing import (
    LOG_START,
    PAGE,
    TABLES_START,
    Writer,
    header,
    log_head,
    object_line,
    object_table,
    sealed,
    tree,
)
from vmm.hyperv.reading import read
from vmm.model.errors import BadConfiguration

OLD, NEW = tree(configuration={"name": "old"}), tree(configuration={"name": "new"})


def name_in(path: Path, content: bytes) -> object:
    """The name in a file, which is left as it is."""
    path.write_bytes(content)
    found = read(os.fspath(path)).at("configuration/name")
    assert path.read_bytes() == content
    return None if found is None else found.value


def refused(path: Path, content: bytes) -> str:
    """The message with which a file is refused."""
    path.write_bytes(content)
    with pytest.raises(BadConfiguration) as caught:
        read(os.fspath(path))
    return str(caught.value)


def test_active_entries_of_the_log_count(tmp_path: Path) -> None:
    """They lie over the file, the later over the earlier; those that are not active are old. The file stays."""
    new = Writer().write(NEW)
    table = new[TABLES_START : TABLES_START + PAGE]
    for changes, active, expected in (
        ([(TABLES_START, table)], 1, "new"),
        ([(TABLES_START, table)], 0, "old"),
        ([(TABLES_START, bytes(PAGE)), (TABLES_START, table)], 2, "new"),
        ([(TABLES_START + at, table[at : at + 16]) for at in range(0, 128, 16)], 8, "new"),
        ([(LOG_START + 2 * PAGE, bytes(512))], 1, "old"),
    ):
        assert name_in(tmp_path / "a.vmcx", Writer().write(OLD, changes, active=active)) == expected


def test_a_damaged_log_is_refused(tmp_path: Path) -> None:
    """Its head, an active entry and the data of one, each with its place; more entries than there can be, too."""
    whole = Writer().write(OLD, [(TABLES_START, bytes(PAGE))])
    for place, words in ((LOG_START + 9, "head"), (LOG_START + 34 + 9, "an entry"), (LOG_START + 34 + 28, "holds is")):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        assert words in refused(tmp_path / "a", bytes(damaged))
    for target in (1 << 63, (1 << 64) - 1):
        assert "far past the end" in refused(tmp_path / "a", Writer().write(OLD, [(target, b"data")]))
    for active in (1 << 31, 257, 2):
        damaged = bytearray(whole)
        damaged[LOG_START : LOG_START + 34] = log_head(active)
        assert "log" in refused(tmp_path / "a", bytes(damaged))


def test_the_newer_header_counts(tmp_path: Path) -> None:
    """Of two valid ones; a damaged one counts for nothing, two leave nothing, and another version is refused."""
    whole = bytearray(Writer().write(OLD))
    whole[PAGE : PAGE + 46] = header(3, log=LOG_START + PAGE)
    assert "past the end" in refused(tmp_path / "a", bytes(whole)), "the log of the newer header"
    whole[PAGE] ^= 1
    assert name_in(tmp_path / "a", bytes(whole)) == "old"
    whole[5] ^= 1
    assert "neither" in refused(tmp_path / "a", bytes(whole))
    whole[:46] = header(9, version=0x300)
    assert "0x300" in refused(tmp_path / "a", bytes(whole))


def test_further_tables_of_objects_are_read(tmp_path: Path) -> None:
    """A table may name another one; a circle of them, one past the end and one that is none are refused."""
    whole = bytearray(Writer().write(OLD))
    further = LOG_START - PAGE
    line = object_line(2, TABLES_START, PAGE)
    whole[further : further + PAGE] = object_table([line]).ljust(PAGE, b"\0")
    whole[2 * PAGE : 3 * PAGE] = object_table([object_line(1, further, PAGE)]).ljust(PAGE, b"\0")
    assert name_in(tmp_path / "a", bytes(whole)) == "old"
    for lines, words in (
        ([object_line(1, 2 * PAGE, PAGE)], "no end"),
        ([object_line(1, 1 << 40, PAGE)], "past the end"),
        ([object_line(1, LOG_START, PAGE)], "no signature"),
        ([], "no table of keys"),
        ([line[:3] + b"\1" + line[4:]], "damaged"),
    ):
        whole[2 * PAGE : 3 * PAGE] = object_table(lines).ljust(PAGE, b"\0")
        assert words in refused(tmp_path / "a", bytes(whole))


def test_no_more_is_read_than_may_belong_to_keys(tmp_path: Path) -> None:
    """A file of any size whose tables claim more than 64 MiB of it is refused before that is read."""
    path = tmp_path / "large.vmrs"
    whole = bytearray(Writer().write(OLD))
    places = [(2 + number) << 20 for number in range(200)]
    whole[2 * PAGE : 3 * PAGE] = object_table([object_line(2, at, 1 << 20) for at in places]).ljust(PAGE, b"\0")
    path.write_bytes(whole)
    with path.open("r+b") as file:
        file.truncate(1 << 40)
        for number, place in enumerate(places, 1):
            file.seek(place)
            file.write(sealed(struct.pack("<HHHI", 2, number, 1, 0), 6))
    with pytest.raises(BadConfiguration, match="belong to keys"):
        read(os.fspath(path))
