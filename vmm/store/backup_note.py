# SPDX-License-Identifier: Apache-2.0
"""The note in which vmm 0.1.0 recorded a backup in progress: the image of each disk, and the new image on top of it.

    MACHINE-FOLDER/backup.json        {disk id: {"frozen": image, "child": the one that takes the writes}}

Now a backup has a journal like every other operation, and a note that is found is turned into one
(`snapshots.recovery`). Decides which notes are accepted. A note is untrusted, and images are merged because of it, so
a child must lie beside the image on which it stands and have a name of the form that 0.1.0 used. Light: every command
looks for a note.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from dataclasses import dataclass

from vmm.model.errors import StoreFailed, of_os_error
from vmm.model.paths import MachinePaths, sync_folder

_MAX_NOTE_BYTES = 4 << 20
_CHILD_NAME = re.compile(r".+\.backup-[0-9]{1,20}(-[0-9]{1,9})?\.avhd")


@dataclass(frozen=True, slots=True)
class Stacked:
    """A disk's image during a backup, and the new image that takes its writes."""

    frozen: str
    child: str


def note_path(machine: MachinePaths) -> str:
    """The path of the note."""
    return os.path.join(machine.folder, "backup.json")


def has_note(machine: MachinePaths) -> bool:
    """True if a backup by vmm 0.1.0 is in progress or was interrupted."""
    return os.path.lexists(note_path(machine))


def is_child_name(path: str) -> bool:
    """True for the path of an image that 0.1.0 made for a backup."""
    return _CHILD_NAME.fullmatch(os.path.basename(path)) is not None


def read_note(machine: MachinePaths) -> dict[str, Stacked]:
    """The content of the note; empty if there is none. Raises StoreFailed for a damaged one."""
    path = note_path(machine)
    try:
        with open(path, "rb") as file:
            document = json.loads(file.read(_MAX_NOTE_BYTES))
        found = {str(disk): _stacked(one) for disk, one in document.items()}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise of_os_error(error, "read the note of a backup", path=path) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StoreFailed(
            "the note of an interrupted backup is damaged", path=path,
            hint="vmm repair MACHINE shows the newest images of its disks",
        ) from error  # fmt: skip
    return found


def _stacked(row: dict[str, object]) -> Stacked:
    frozen, child = row["frozen"], row["child"]
    if not (isinstance(frozen, str) and isinstance(child, str)) or "\0" in frozen + child:
        raise TypeError("path")
    if not os.path.isabs(frozen) or os.path.dirname(child) != os.path.dirname(frozen) or not is_child_name(child):
        raise ValueError("path")
    return Stacked(frozen, child)


def remove_note(machine: MachinePaths) -> None:
    """Remove the note: the backup is over, or a journal has replaced the note. Raises VmmError."""
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(note_path(machine))
        sync_folder(machine.folder)
    except OSError as error:
        raise of_os_error(error, "remove the note of a backup", path=note_path(machine)) from error
