# SPDX-License-Identifier: Apache-2.0
"""The note of a backup in progress: the new image that stands on each disk meanwhile.

    MACHINE-FOLDER/backup.json        {disk id: {"frozen": image, "child": the one that takes the writes}}

Decides what the note contains and how it is validated. It is untrusted, and images are merged because of it, so a
child must lie beside the image on which it stands and have a name of the form that `vmm backup` gives. Light: every
command looks for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

from vmm.model.errors import StoreFailed, of_os_error
from vmm.model.paths import MachinePaths, sync_folder, write_whole

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
    """True while a backup is in progress or was interrupted."""
    return os.path.lexists(note_path(machine))


def child_name(path: str) -> str:
    """An unused name for a new image beside this one."""
    stem = f"{os.path.splitext(path)[0]}.backup-{int(time.time())}"
    name, number = f"{stem}.avhd", 1
    while os.path.lexists(name):
        name, number = f"{stem}-{number}.avhd", number + 1
    return name


def is_child_name(path: str) -> bool:
    """True if `child_name` could have returned this path."""
    return _CHILD_NAME.fullmatch(os.path.basename(path)) is not None


def write_note(machine: MachinePaths, stacked: Mapping[str, Stacked]) -> None:
    """Write the note; called before the first new image is made. Raises VmmError."""
    document = {disk: {"frozen": one.frozen, "child": one.child} for disk, one in stacked.items()}
    write_whole(note_path(machine), json.dumps(document).encode() + b"\n")


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
    """Remove the note: the backup is over. Raises VmmError."""
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(note_path(machine))
        sync_folder(machine.folder)
    except OSError as error:
        raise of_os_error(error, "remove the note of a backup", path=note_path(machine)) from error
