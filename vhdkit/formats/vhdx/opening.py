# SPDX-License-Identifier: Apache-2.0
"""Opening a VHDX for reading or writing.

Decides what happens before an image is written to: an image with doubtful structures is refused, notes of a killed
process are written into the image, and its log is replayed in the file. Must not know how (`replay`, `journal`), nor
which notes are valid (both `recall`s).
"""

from __future__ import annotations

from vhdkit.errors import CorruptImage, CorruptReason
from vhdkit.formats import recall, remember
from vhdkit.formats.guard import SyncGuard
from vhdkit.formats.vhdx.blocks import VhdxImage
from vhdkit.formats.vhdx.commit import Commit
from vhdkit.formats.vhdx.entries import read_bat, reserved_bits
from vhdkit.formats.vhdx.header import exhausted
from vhdkit.formats.vhdx.journal import Journal
from vhdkit.formats.vhdx.metadata import Metadata, read_metadata
from vhdkit.formats.vhdx.recall import NOTES_ID, Noted, recover
from vhdkit.formats.vhdx.replay import apply_replay
from vhdkit.store import Store


def open_vhdx(store: Store, *, writable: bool = False) -> VhdxImage:
    """The image, without its parents. Raises CorruptImage, NoSpace, IoFailed, SyncFailed."""
    metadata = read_metadata(store)
    bat = read_bat(metadata)
    if not writable:
        return VhdxImage(store, metadata, bat)
    if not metadata.log[1]:
        raise CorruptImage(
            CorruptReason.LOG_PLACE,
            "the image has no log, so it can only be read",
            path=store.name,
            structure=metadata.current.structure,
            offset_bytes=metadata.current.offset_bytes,
            hint="`vhdkit check --repair` makes one",
        )
    damage = exhausted(store.name, metadata.current) or reserved_bits(metadata, bat)
    if damage is not None:
        raise damage
    noted = recover(store, metadata, bat)
    if noted is not None:
        _write_noted(store, metadata, noted)
        metadata = read_metadata(store)
        bat = read_bat(metadata)
    remember.disown(store)
    guard = SyncGuard(store)
    journal = Journal(store, metadata.current, metadata.log, guard)
    if metadata.replay is not None:
        _replay(store, metadata, journal)
        metadata = read_metadata(store)
        bat = read_bat(metadata)
    notes = remember.begin(store, NOTES_ID)
    return VhdxImage(store, metadata, bat, Commit(store, metadata, bat, journal, guard, notes))


def _write_noted(store: Store, metadata: Metadata, noted: Noted) -> None:
    """Write what a killed process had only in memory and in its notes, and remove the notes.

    That completes the dead process's session: the disk's DataWriteGuid, which children may have recorded, stays.
    """
    store.sync()
    recall.writing_begins(store, NOTES_ID)
    guard = SyncGuard(store)
    journal = Journal(store, metadata.current, metadata.log, guard, file_write_guid=noted.file_write_guid)
    if metadata.replay is not None:
        _replay(store, metadata, journal)
        metadata = read_metadata(store)
    commit = Commit(store, metadata, read_bat(metadata), journal, guard)
    commit.put_noted(noted)
    commit.settle()
    recall.written(store, NOTES_ID)


def _replay(store: Store, metadata: Metadata, journal: Journal) -> None:
    """Durably apply the log's changes to the file, then remove its id from the headers. Repeating it is harmless."""
    assert metadata.replay is not None
    apply_replay(store, metadata.replay)
    journal.forget()
