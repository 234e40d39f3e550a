# SPDX-License-Identifier: Apache-2.0
"""What in a VHDX shows that notes belong to another state of it, whatever the times of its file."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests import noting
from tests.vhdkit.formats.test_remember import content, found_in, image, killed, notes, notes_of, opened
from tests.vhdkit.formats.vhdx.images import BAT, LOG, METADATA, set_header
from vhdkit.chain.verbs.create import create_child
from vhdkit.disk import open_disk
from vhdkit.formats import linkage_id
from vhdkit.formats.vhdx import recall
from vhdkit.formats.vhdx.blocks import VhdxImage
from vhdkit.formats.vhdx.header import current_header, read_headers
from vhdkit.formats.vhdx.journal import Moment
from vhdkit.formats.vhdx.layout import Header
from vhdkit.formats.vhdx.recall import NotedBytes, continued, note_of
from vhdkit.store import FileStore
from vhdkit.units import MIB, SECTOR_SIZE, whole_sectors

# A killed process closes no file: the images that stand for one are dropped.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*was never closed:ResourceWarning"),
    pytest.mark.parametrize("image", ["vhdx", "vhdx child"], indirect=True),
]

__all__ = ["image", "notes"]
Spoil = Callable[[FileStore], object]


def header_of(path: Path) -> Header:
    """The current header of a file."""
    with FileStore.open(path) as store:
        return current_header(store.name, read_headers(store)).header


def moment_of(one: VhdxImage) -> Moment:
    """The present moment of an open image."""
    assert one._commit is not None
    return one._commit._journal.moment


def unnoticed(path: Path, change: Spoil) -> None:
    """Change the file in a way that its labels and times do not show."""
    status = path.stat()
    with FileStore.open(path, writable=True) as store:
        change(store)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def left_by_a_killed_process(path: Path) -> VhdxImage:
    """An image with a flushed block, then notes of a write to the same block, and of another block."""
    one = opened(path)
    assert isinstance(one, VhdxImage)
    one.write(5, memoryview(b"a" * SECTOR_SIZE))
    one.flush()
    one.write(50, memoryview(b"b" * SECTOR_SIZE))
    one.write(whole_sectors(2 * MIB), memoryview(b"b" * SECTOR_SIZE))
    killed(one)
    return one


def is_there(path: Path) -> bool:
    """Whether what was only in the notes is in the image."""
    return found_in(path)[2 * MIB] == ord("b")


def test_only_a_change_of_the_file_makes_notes_invalid(notes: Path, image: Path) -> None:
    """Self-test of the tests below: without a change the notes are valid."""
    left_by_a_killed_process(image)
    unnoticed(image, lambda store: None)
    assert is_there(image)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda store: set_header(store, file_write_guid=b"f" * 16),
        lambda store: set_header(store, log_guid=bytes(16)),
        lambda store: store.truncate(store.size() + 64 * MIB),
        lambda store: store.truncate(store.size() - MIB),
    ],
    ids=["FileWriteGuid", "log", "longer", "shorter"],
)
def test_a_change_that_no_time_shows(notes: Path, image: Path, spoil: Spoil) -> None:
    """INV-ANSWERED-SURVIVES: another FileWriteGuid, another log or another size of the file show that the notes are of
    another state."""
    left_by_a_killed_process(image)
    unnoticed(image, spoil)
    assert not is_there(image)
    assert [path.suffix[:6] for path in notes.iterdir()] == [".kept-"] * 3


def test_an_entry_that_is_not_in_the_notes(notes: Path, image: Path) -> None:
    """INV-ANSWERED-SURVIVES: a noted BAT entry that is now one which the block never had shows the same."""
    one = opened(image)
    one.write(5, memoryview(b"a" * SECTOR_SIZE))
    one.seal()  # the log is empty, so the table is read from its place
    one.write(whole_sectors(2 * MIB), memoryview(b"b" * SECTOR_SIZE))
    killed(one)
    unnoticed(image, lambda store: store.pwrite(BAT + 8 * 2, (2).to_bytes(8, "little")))
    assert not is_there(image)
    assert [path.suffix[:6] for path in notes.iterdir()] == [".kept-"] * 3


def test_a_backup_from_before_a_flush(notes: Path, image: Path) -> None:
    """INV-ANSWERED-SURVIVES: a backup of the same session, restored with the times of the file, is recognised: the log
    lacks an entry that had been written when the notes were taken."""
    one = opened(image)
    one.write(5, memoryview(b"a" * SECTOR_SIZE))
    one.write(whole_sectors(MIB), memoryview(b"a" * SECTOR_SIZE))
    one.write(whole_sectors(2 * MIB), memoryview(b"a" * SECTOR_SIZE))
    one.write(whole_sectors(3 * MIB), memoryview(b"a" * SECTOR_SIZE))
    one.flush()
    backup = image.read_bytes()
    one.write_zeroes(0, whole_sectors(MIB))
    one.write(whole_sectors(MIB) + 5, memoryview(b"b" * SECTOR_SIZE))
    one.flush()
    one.write(whole_sectors(2 * MIB) + 5, memoryview(b"c" * SECTOR_SIZE))
    killed(one)
    if not list(notes.iterdir()):
        assert not one.is_differencing  # all its blocks are there, so nothing had to be noted
        return
    unnoticed(image, lambda store: store.pwrite(0, backup))
    assert found_in(image)[2 * MIB + 5 * SECTOR_SIZE] == 0
    assert [path.suffix[:6] for path in notes.iterdir()] == [".kept-"] * 3


@pytest.mark.parametrize(
    "changes",
    [
        [NotedBytes(BAT, bytes(8), (1 << 40 | 6).to_bytes(8, "little"))],
        [NotedBytes(BAT, bytes(8), (MIB | 6).to_bytes(8, "little"))],
        [NotedBytes(BAT, bytes(8), (5).to_bytes(8, "little"))],
        [NotedBytes(METADATA, bytes(8), b"metadata")],
        [NotedBytes(LOG + MIB - 4096, bytes(4096), b"x" * 4096)],
        [NotedBytes(BAT + 4092, bytes(8), bytes(8))],
        [NotedBytes(BAT + (1 << 20) - 8, bytes(8), (6).to_bytes(8, "little"))],
        [],
    ],
    ids=["outside", "over the log", "state", "metadata", "no bitmap", "two pages", "no such entry", "nothing"],
)
def test_impossible_notes_are_left_out(notes: Path, image: Path, changes: list[NotedBytes]) -> None:
    """Notes after which the image would be impossible are left out, and the image is as its file says."""
    one = opened(image)
    assert isinstance(one, VhdxImage)
    one.write(5, memoryview(b"a" * SECTOR_SIZE))
    one.flush()
    notes_of(one).note(note_of(moment_of(one), changes))
    killed(one)
    assert found_in(image)[5 * SECTOR_SIZE] == ord("a")
    assert [path.suffix[:6] for path in notes.iterdir()] == [".kept-"] * 3


def test_a_note_that_is_cut_short_counts_up_to_there(notes: Path, image: Path) -> None:
    """A truncated change ends a note."""
    one = opened(image)
    assert isinstance(one, VhdxImage)
    one.write(5, memoryview(b"a" * SECTOR_SIZE))
    notes_of(one).note(note_of(moment_of(one), []) + struct.pack("<QH", BAT, 9) + b"short")
    killed(one)
    assert found_in(image)[5 * SECTOR_SIZE] == ord("a")


def test_what_the_ids_say_after_notes_were_written(notes: Path, image: Path) -> None:
    """Writing the notes completes the dead session: the DataWriteGuid stays, the FileWriteGuid follows from the old
    one, and the log is empty."""
    left_by_a_killed_process(image)
    before = header_of(image)
    with open_disk(image, options=noting.options()):
        pass
    after = header_of(image)
    assert after.data_write_guid == before.data_write_guid
    assert after.file_write_guid == continued(before.file_write_guid)
    assert after.log_guid == bytes(16) and is_there(image)


def test_an_image_that_became_a_parent_stays_one(notes: Path, image: Path) -> None:
    """A child that was made before the process died still has its parent after the notes are written."""
    with open_disk(image, writable=True, options=noting.options()) as disk:
        disk.write(0, b"x" * SECTOR_SIZE)
    left_by_a_killed_process(image)
    child = image.with_name("new.avhdx")
    create_child(child, image, options=noting.options())
    with FileStore.open(image) as store:
        recorded = linkage_id(store)
    with open_disk(child, writable=True, options=noting.options()) as disk:
        assert disk.read(2 * MIB, 1) == b"b" and disk.chain.layers[1].unique_id == recorded


def test_recovery_is_not_interrupted_for_ever(notes: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The FileWriteGuid is followed over a bounded number of interrupted recoveries."""
    one = left_by_a_killed_process(image)
    guid = one.metadata.header.file_write_guid
    monkeypatch.setattr(recall, "MAX_CONTINUATIONS", 3)
    guid = header_of(image).file_write_guid
    for _ in range(3):
        guid = continued(guid)
    moment = Moment(header_of(image).file_write_guid, bytes(16), 0)
    current = replace(one.metadata.header, file_write_guid=guid)
    assert recall._other_session(replace(one.metadata, header=current), moment) is None
    current = replace(current, file_write_guid=continued(guid))
    assert recall._other_session(replace(one.metadata, header=current), moment) is not None


def test_bits_beyond_one_page(notes: Path, image: Path) -> None:
    """Random runs over all blocks, killed twice, with the content of each layer checked after each."""
    one = opened(image)
    model = bytearray(content(one))
    for number, first in enumerate((0, 2040, 2048 * 2 - 8, 2048 * 3 + 1)):
        data = bytes([number + 1]) * SECTOR_SIZE * 16
        one.write(first, memoryview(data))
        model[first * SECTOR_SIZE : first * SECTOR_SIZE + len(data)] = data
    killed(one)
    assert found_in(image) == model
