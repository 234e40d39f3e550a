# SPDX-License-Identifier: Apache-2.0
"""The folder of a restored machine's disks, from when it is made until the machine is in the registry.

Decides that it appears whole, and that what a killed restore left of it is found again: until the machine is
registered, the folder holds a note that names the process which makes it, and the lease that this process has taken.
A folder whose maker is dead, and of which no machine has an image, was abandoned: the next restore to that place
removes it, and ends the lease. Must not know what the images contain.

    FOLDER/.NAME.MAKER.part/  ->  FOLDER/NAME/  with the note  ->  the machine is registered  ->  the note is removed
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from types import TracebackType
from typing import Self

import vhdkit
from vhdkit import backups
from vmm.model import unfinished
from vmm.model.errors import AlreadyExists, of_os_error
from vmm.model.paths import make_folders, sync_folder, write_whole
from vmm.store import known_images

NOTE = ".vmm-restore.json"
_MAX_NOTE_BYTES = 1 << 16
_FORMAT = "vmm restore 1"


class Landing:
    """One folder being made. `part` is where it is until `appear`. If the block fails, it is removed again.

    Entering raises AlreadyExists if something else is in the way, and errors of the file system as VmmError.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.part = unfinished.folder_of(folder)
        self._has_appeared = False
        self.has_replaced = False  # what a killed restore had left there

    def __enter__(self) -> Self:
        above = os.path.dirname(self.folder)
        self.has_replaced = remove_abandoned(self.folder)
        if os.path.lexists(self.folder) and not _is_empty(self.folder):
            raise _in_the_way(self.folder)
        try:
            make_folders(above)
            unfinished.sweep(above, folders=True)
            os.mkdir(self.part, 0o700)
        except OSError as error:
            raise of_os_error(error, "make the folder of the disks", path=above) from error
        try:
            _write_note(self.part, None, None)
        except BaseException:
            shutil.rmtree(self.part, ignore_errors=True)
            raise
        return self

    def appear(self) -> None:
        """Give the folder its name; what is in it is on the device. Raises AlreadyExists, VmmError."""
        try:
            sync_folder(self.part)
            os.rename(self.part, self.folder)
            self._has_appeared = True
            sync_folder(os.path.dirname(self.folder))
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise _in_the_way(self.folder) from error
            raise of_os_error(error, "name the folder of the disks", path=self.folder) from error

    def note_lease(self, repository: str, lease: str) -> None:
        """Record a lease that is about to be taken, so that it ends with the folder. Raises VmmError."""
        _write_note(self.folder, repository, lease)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or (self._has_appeared and _is_used(self.folder)):  # an interrupt may come after the last step
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(self.folder, NOTE))
            return
        end_lease(self.folder)
        for one in (self.part, *([self.folder] if self._has_appeared else [])):
            shutil.rmtree(one, ignore_errors=True)


def remove_abandoned(folder: str) -> bool:
    """Remove a folder that a killed restore left, with its lease; False if it is not such a folder."""
    note = _read_note(folder)
    if note is None or not note[1] or _is_used(folder):
        return False
    end_lease(folder)
    shutil.rmtree(folder, ignore_errors=True)
    return not os.path.lexists(folder)


def end_lease(folder: str) -> None:
    """End the lease that is noted in a folder. One that cannot be ended stays: `backup status` shows it."""
    note = _read_note(folder)
    repository, lease = (None, None) if note is None else (note[0].get("repository"), note[0].get("lease"))
    if isinstance(repository, str) and isinstance(lease, str):
        with contextlib.suppress(vhdkit.VhdkitError), backups.open_repository(repository) as opened:
            backups.release(opened.root, lease)


def _write_note(folder: str, repository: str | None, lease: str | None) -> None:
    note = {"format": _FORMAT, "maker": vhdkit.maker_word(), "repository": repository, "lease": lease}
    write_whole(os.path.join(folder, NOTE), json.dumps(note).encode() + b"\n")


def _read_note(folder: str) -> tuple[dict[str, object], bool] | None:
    """The note in a folder, and whether its maker is dead; None if there is none of ours."""
    try:
        descriptor = os.open(os.path.join(folder, NOTE), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            facts, note = os.fstat(descriptor), json.loads(file.read(_MAX_NOTE_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(note, dict) or note.get("format") != _FORMAT or facts.st_uid != os.geteuid():
        return None
    maker = note.get("maker")
    return note, isinstance(maker, str) and vhdkit.is_maker_dead(maker, facts)


def _is_used(folder: str) -> bool:
    """True if a machine has an image there, or may have one: not all machines could be read."""
    found, inside = known_images.look(), os.path.realpath(folder) + os.sep
    return bool(found.unread) or any(path.startswith(inside) for path in found.images)


def _is_empty(folder: str) -> bool:
    return os.path.isdir(folder) and not os.path.islink(folder) and not os.listdir(folder)


def _in_the_way(folder: str) -> AlreadyExists:
    return AlreadyExists("is in the way of the machine's disks", path=folder, hint="give another name: --as")
