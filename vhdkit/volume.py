# SPDX-License-Identifier: Apache-2.0
"""Where the files of a chain are, as everything that follows names sees it.

Decides what can be asked of whatever holds the files: to open one, to follow a name, to list a folder. The code that
looks for parents and children, and that opens and holds layers, asks a `Volume`, so it is the same for a file system
and for anything else. The file system is `local_volume`. Must not know images or chains.

A place is the name of a file on a volume: parts with "/" between them, as in a path. `real` and `absolute` make it
absolute. Splitting and joining places is a matter of text, the same for every volume (`os.path`).

- `INV-NAME-WITHIN`: what a name in an image leads to is decided and opened in one step (`follow`), because between a
  check and an opening by name the name could come to lead out of the allowed folders.
- A file is identified and held through the opened file, not by its place, which may now lead to another file
  (`INV-NAME-HELD`).
- Reads and writes go to the opened file; the volume is not involved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, Self, TypeAlias

from vhdkit import errors
from vhdkit.store import FileStore, Store

Trail: TypeAlias = tuple[tuple[int, bool], ...]


class VolumeFile(Store, Protocol):
    """A file that a volume has opened. `name` is the place by which it was opened.

    A volume that can only be read raises ReadOnly from whatever would change the file.
    """

    @property
    def is_device(self) -> bool:
        """True for a block device, which has no records beside it."""
        ...

    def allocated_bytes(self) -> int:
        """Bytes that the file takes where it is kept."""
        ...

    def lock(self, *, writer: bool) -> None:
        """Hold the file until it is closed: as a reader, so that it does not change, or as its only writer.

        Raises ImageInUse, and `Replaced` if its place now leads to another file; `named.opened_again` retries.
        """
        ...

    def in_use(self) -> bool:
        """True when another program holds the file for writing."""
        ...

    def lacks_locks(self) -> bool:
        """True when nothing keeps other programs from writing to the file while it is read."""
        ...

    def __enter__(self) -> Self: ...
    def __exit__(self, *exc_info: object) -> None: ...


class Outcome(StrEnum):
    """The result of following a name."""

    FOUND = "found"
    MISSING = "missing"
    OUTSIDE = "outside"  # it leads out of the allowed folders; nothing there was examined
    SPECIAL = "special"  # a folder, device, pipe or socket


@dataclass(frozen=True, slots=True)
class Place:
    """Where a name led: `path` is free of links, as far as the name could be followed."""

    outcome: Outcome
    path: str
    store: VolumeFile | None = None


class Volume(Protocol):
    """Holds the files of chains. Every method may raise AccessDenied and IoFailed."""

    # -- places ---------------------------------------------------------------------------------------------------

    def real(self, place: str) -> str:
        """The absolute place with every link followed; for a name that leads nowhere, as far as it can be followed."""
        ...

    def absolute(self, place: str) -> str:
        """The absolute place as it is spelled, no link followed."""
        ...

    def exists(self, place: str) -> bool:
        """True when the name is taken, even by a link that leads nowhere."""
        ...

    def siblings(self, folder: str, limit: int | None = None) -> Iterator[str]:
        """The places of the regular files directly in a folder, sorted, without links and unfinished files.

        A folder that cannot be read has none. With a `limit`, only that many names are examined.
        """
        ...

    # -- opening --------------------------------------------------------------------------------------------------

    def open(self, place: str) -> VolumeFile:
        """Open for reading a file that the caller named; links are followed anywhere, and it may be a device.

        Raises NotFound, and InvalidArgument for what can hold no image.
        """
        ...

    def open_for_writing(self, place: str) -> FileStore:
        """The same for writing; only files of the file system are written to. Raises ReadOnly where there are none."""
        ...

    def open_regular(self, place: str, *, follow_links: bool = True) -> VolumeFile:
        """Open for reading a file that a listing or a record named; only a regular file is opened.

        Raises NotFound, and InvalidArgument for anything else, which is not opened.
        """
        ...

    def open_record(self, place: str) -> VolumeFile:
        """Open for reading a record beside an image: a regular file; a link is not followed.

        Raises NotFound, and InvalidArgument for anything else.
        """
        ...

    def follow(self, place: str, folders: Sequence[str]) -> Place:
        """Open for reading the file to which an untrusted absolute name leads, if it stays beneath `folders`.

        Nothing outside the absolute folders is examined, listed or opened, even if names change meanwhile, and only a
        regular file is opened. A component that does not exist as spelled is matched ignoring case. The caller closes
        the store. Raises for a file inside that cannot be opened.
        """
        ...

    # -- missing files --------------------------------------------------------------------------------------------

    def trail_of(self, folder: str) -> Trail:
        """What identifies the folders that lead to a folder, for `was_removed`. Raises NotFound."""
        ...

    def was_removed(self, folder: str, trail: Trail) -> bool:
        """True if what was in the folder with this trail and is missing now is gone, and not only out of sight."""
        ...


def read_whole(volume: Volume, place: str, limit_bytes: int) -> bytes | None:
    """The bytes of a small record; None if it is missing, not a regular file, or longer than the limit.

    Raises AccessDenied, IoFailed.
    """
    try:
        record = volume.open_record(place)
    except (errors.NotFound, errors.InvalidArgument):
        return None
    with record:
        return record.pread(0, limit_bytes) if record.size() <= limit_bytes else None
