# SPDX-License-Identifier: Apache-2.0
"""The note that vmm 0.1.0 wrote of a backup under way, and the names that it gave to the new images."""

from __future__ import annotations

import json
import os

from vmm.model.paths import MachinePaths
from vmm.store.backup_note import Stacked, is_child_name, note_path


def child_name(path: str) -> str:
    """The name of a new image beside this one."""
    name = f"{os.path.splitext(path)[0]}.backup-1764460800.avhd"
    assert is_child_name(name)
    return name


def write_note(machine: MachinePaths, stacked: dict[str, Stacked]) -> None:
    """Write the note: disk id -> its frozen image and the new one."""
    document = {disk: {"frozen": one.frozen, "child": one.child} for disk, one in stacked.items()}
    with open(note_path(machine), "w", encoding="utf-8") as file:
        json.dump(document, file)
