# SPDX-License-Identifier: Apache-2.0
"""The file system as a `Volume`.

Decides which way of opening a file each question of a volume stands for. How a name is followed is decided in
`beneath`, how folders are listed in `folder`, how a file is held in `named`. Must not know images or chains.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from vhdkit import beneath, errors, folder
from vhdkit.store import FileStore
from vhdkit.volume import Outcome, Place, Trail


class LocalVolume:
    """See `Volume`. Places are paths; relative ones start at the working folder."""

    def real(self, place: str) -> str:
        """See `Volume.real`."""
        return folder.real_path(place)

    def absolute(self, place: str) -> str:
        """See `Volume.absolute`."""
        return os.path.abspath(place or os.curdir)

    def exists(self, place: str) -> bool:
        """See `Volume.exists`."""
        return folder.exists(place)

    def siblings(self, folder_path: str, limit: int | None = None) -> Iterator[str]:
        """See `Volume.siblings`."""
        return folder.regular_files(folder_path, limit)

    def open(self, place: str) -> FileStore:
        """See `Volume.open`."""
        return FileStore.open(place)

    def open_for_writing(self, place: str) -> FileStore:
        """See `Volume.open_for_writing`."""
        return FileStore.open(place, writable=True)

    def open_regular(self, place: str, *, follow_links: bool = True) -> FileStore:
        """See `Volume.open_regular`."""
        return beneath.open_regular(place, follow_links=follow_links)

    def open_record(self, place: str) -> FileStore:
        """See `Volume.open_record`."""
        record = FileStore.open(place, follow_links=False)
        if record.is_device:
            record.close()
            raise errors.InvalidArgument("is a device", path=place)
        return record

    def follow(self, place: str, folders: Sequence[str]) -> Place:
        """See `Volume.follow`. Text that cannot name a file here leads nowhere."""
        if not folder.is_file_name(place):
            return Place(Outcome.MISSING, place)
        return beneath.find_beneath(place, folders)

    def trail_of(self, folder_path: str) -> Trail:
        """See `Volume.trail_of`: inodes, and where file systems begin."""
        return beneath.trail_of(folder_path)

    def was_removed(self, folder_path: str, trail: Trail) -> bool:
        """See `Volume.was_removed`: a file is out of sight if its file system is not mounted."""
        return beneath.was_removed(folder_path, trail)


LOCAL = LocalVolume()
