# SPDX-License-Identifier: Apache-2.0
"""The files of a chain in memory: a `vhdkit.volume.Volume` without a file system.

It holds `MemStore`s by absolute places, and links. An opened file can only be read: what would change it raises
ReadOnly. What was opened, and what is held, is recorded. `write_to` makes real files of everything, so that a test can
compare a memory volume with the file system.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Self

from tests.harness.stores import MemStore
from vhdkit import errors
from vhdkit.formats.patched import Patches, ReadOnlyView
from vhdkit.store import FileStore
from vhdkit.volume import Outcome, Place, Trail

_MAX_LINKS = 40  # as on Linux


class MemoryFile(ReadOnlyView):
    """See `VolumeFile`: a file of a `MemoryVolume`, opened for reading."""

    is_device = False

    def __init__(self, volume: MemoryVolume, place: str, store: MemStore) -> None:
        super().__init__(store, store.size(), Patches(), "lies in memory and can only be read")
        self._volume, self._place, self._store = volume, place, store
        volume.open_files.append(self)

    @property
    def name(self) -> str:
        """See `ReadStore.name`: the place by which it was opened."""
        return self._place

    @property
    def identity(self) -> Hashable:
        """See `ReadStore.identity`."""
        return self._store.identity

    def allocated_bytes(self) -> int:
        """See `VolumeFile.allocated_bytes`."""
        return self._store.allocated_bytes()

    def lock(self, *, writer: bool) -> None:
        """See `VolumeFile.lock`: any number of readers."""
        if writer:
            raise errors.ReadOnly("lies in memory and can only be read", path=self._place)
        self._volume.when_locked(self._place)
        if self._volume.files.get(self._volume.real(self._place)) is not self._store:
            raise errors.Replaced("was replaced by another file while it was open", path=self._place)
        self._volume.held.append(self._place)

    def in_use(self) -> bool:
        """See `VolumeFile.in_use`: nothing else writes."""
        return False

    def lacks_locks(self) -> bool:
        """See `VolumeFile.lacks_locks`."""
        return False

    def close(self) -> None:
        """See `ReadStore.close`."""
        if self in self._volume.open_files:
            self._volume.open_files.remove(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class MemoryVolume:
    """See `Volume`. `files` and `links` (to a place, absolute or from the link's folder) may be changed at any time.

    `when_locked` is called with a place before the file there is locked. `opened` and `held` are places in order;
    `open_files` are those that are not closed.
    """

    def __init__(self) -> None:
        self.files: dict[str, MemStore] = {}
        self.links: dict[str, str] = {}
        self.opened: list[str] = []
        self.held: list[str] = []
        self.open_files: list[MemoryFile] = []
        self.when_locked: Callable[[str], None] = lambda place: None

    def add(self, place: str, store: MemStore | None = None) -> MemStore:
        """Put a file there, empty unless a store is given; it may replace another one."""
        self.files[place] = MemStore(place) if store is None else store
        return self.files[place]

    def write_to(self, root: Path) -> None:
        """Make real files of all, below `root`, which stands for "/"."""
        for place, store in self.files.items():
            path = root / place.lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(store.contents())
        for place, text in self.links.items():
            path = root / place.lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(f"{root}{text}" if os.path.isabs(text) else text)

    # -- places ---------------------------------------------------------------------------------------------------

    def real(self, place: str) -> str:
        """See `Volume.real`."""
        place = self.absolute(place)
        for _ in range(_MAX_LINKS):
            linked = self._first_link(place)
            if linked is None:
                return place
            place = self._beyond(place, linked)
        return place

    def absolute(self, place: str) -> str:
        """See `Volume.absolute`: the working folder is "/"."""
        return os.path.normpath(os.path.join("/", place))

    def exists(self, place: str) -> bool:
        """See `Volume.exists`."""
        folder, name = os.path.split(self.absolute(place))
        place = os.path.join(self.real(folder), name)
        return place in self.links or place in self.files or place in self._folders()

    def siblings(self, folder: str, limit: int | None = None) -> Iterator[str]:
        """See `Volume.siblings`."""
        found = [place for place in self.files if os.path.dirname(place) == self.real(folder)]
        yield from sorted(os.path.join(folder, os.path.basename(place)) for place in found[:limit])

    def _folders(self) -> set[str]:
        found = {"/"}
        for place in (*self.files, *self.links):
            while (place := os.path.dirname(place)) not in found:
                found.add(place)
        return found

    def _first_link(self, place: str) -> str | None:
        """The shortest part of an absolute place that is a link."""
        parts = place.split("/")
        return next((one for end in range(2, len(parts) + 1) if (one := "/".join(parts[:end])) in self.links), None)

    def _beyond(self, place: str, link: str) -> str:
        """The place to which `place` leads with this one link in it followed."""
        rest = place[len(link) :].lstrip("/")
        return os.path.normpath(os.path.join(os.path.dirname(link), self.links[link], rest))

    # -- opening --------------------------------------------------------------------------------------------------

    def open(self, place: str) -> MemoryFile:
        """See `Volume.open`."""
        if self.real(place) in self._folders():
            raise errors.InvalidArgument("is a folder, not a disk image", path=place)
        return self.open_regular(place)

    def open_for_writing(self, place: str) -> FileStore:
        """See `Volume.open_for_writing`."""
        raise errors.ReadOnly("lies in memory and can only be read", path=place)

    def open_regular(self, place: str, *, follow_links: bool = True) -> MemoryFile:
        """See `Volume.open_regular`."""
        real = self.real(place) if follow_links else self.absolute(place)
        if real not in self.files:
            if real in self.links or real in self._folders():
                raise errors.InvalidArgument("is not a regular file", path=place)
            raise errors.NotFound("cannot open: No such file or directory", path=place)
        self.opened.append(real)
        return MemoryFile(self, place, self.files[real])

    def open_record(self, place: str) -> MemoryFile:
        """See `Volume.open_record`."""
        if self.absolute(place) in self.links:
            raise errors.InvalidArgument(f"cannot open: {os.strerror(errno.ELOOP)}", path=place)
        return self.open_regular(place, follow_links=False)

    def follow(self, place: str, folders: Sequence[str]) -> Place:
        """See `Volume.follow`."""
        place = os.path.normpath(place)
        for _ in range(_MAX_LINKS + 1):
            roots = [folder for folder in folders if place.startswith(folder.rstrip("/") + "/")]
            if not roots:
                return Place(Outcome.OUTSIDE, place)
            root = max(roots, key=len)
            found = self._step(self.real(root), os.path.relpath(place, root).split("/"))
            if isinstance(found, Place):
                return found
            place = found
        return Place(Outcome.MISSING, place)

    def _step(self, here: str, names: Sequence[str]) -> Place | str:
        """Where the names lead from the folder `here`, or the place beyond the first link among them."""
        for index, name in enumerate(names):
            place = self._spelled(os.path.join(here, name))
            if place in self.links:
                return self._beyond("/".join((place, *names[index + 1 :])), place)
            is_last = index == len(names) - 1
            if place in self.files and is_last:
                self.opened.append(place)
                return Place(Outcome.FOUND, place, MemoryFile(self, place, self.files[place]))
            if place not in self._folders():
                return Place(Outcome.MISSING, place)
            here = place
        return Place(Outcome.SPECIAL, here)

    def _spelled(self, place: str) -> str:
        """The place as it exists, ignoring case if it does not exist as spelled."""
        known = {*self.files, *self.links, *self._folders()}
        if place in known:
            return place
        folder, name = os.path.split(place)
        alike = [one for one in known if os.path.dirname(one) == folder]
        return min((one for one in alike if os.path.basename(one).casefold() == name.casefold()), default=place)

    # -- missing files --------------------------------------------------------------------------------------------

    def trail_of(self, folder: str) -> Trail:
        """See `Volume.trail_of`: every folder of a memory volume is always in sight."""
        return ()

    def was_removed(self, folder: str, trail: Trail) -> bool:
        """See `Volume.was_removed`."""
        return True
