# SPDX-License-Identifier: Apache-2.0
"""Opening a VHDX for reading or writing.

Decides what is done before an image is written to: its log is replayed in the file for good, and an image with
doubtful structures is refused. Must not know how (`replay`, `journal`).
"""

from __future__ import annotations

from vhdkit import errors
from vhdkit.errors import CorruptImage, CorruptReason
from vhdkit.formats.guard import SyncGuard
from vhdkit.formats.vhdx.blocks import VhdxImage
from vhdkit.formats.vhdx.commit import Commit
from vhdkit.formats.vhdx.entries import read_bat, reserved_bits
from vhdkit.formats.vhdx.journal import Journal
from vhdkit.formats.vhdx.metadata import Metadata, read_metadata
from vhdkit.store import FileStore, Store


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
            hint="convert it to a new image",
        )
    if isinstance(store, FileStore) and store.notes_folder is not None:
        raise errors.InvalidArgument(
            "is a VHDX, whose unflushed changes cannot be noted", path=store.name, hint="leave out --remember"
        )
    damage = reserved_bits(metadata, bat)
    if damage is not None:
        raise damage
    guard = SyncGuard(store)
    journal = Journal(store, metadata.current, metadata.log, guard)
    if metadata.replay is not None:
        _replay(store, metadata, journal)
        metadata = read_metadata(store)
        bat = read_bat(metadata)
    return VhdxImage(store, metadata, bat, Commit(store, metadata, bat, journal, guard))


def _replay(store: Store, metadata: Metadata, journal: Journal) -> None:
    """Make the changes of the log in the file, durable, then let the headers forget it; can be done again."""
    assert metadata.replay is not None
    if store.size() < metadata.view.size():
        store.truncate(metadata.view.size())
    for one in metadata.replay.changes:
        if one.data is None:
            store.punch(one.file_offset_bytes, one.size_bytes)
        else:
            store.pwrite(one.file_offset_bytes, one.data)
    journal.forget()
