# SPDX-License-Identifier: Apache-2.0
"""The memory of a machine for a night, of exactly the moment at which its disks are frozen.

    running, paused     a snapshot with memory is taken; the night keeps the images that it froze, its memory is
                        opened, and the snapshot is deleted again
    saved               its saved state is the memory
    off                 there is none; the night says so

Decides how that snapshot is called, and that it goes in any case. If this process is killed while the worker captures,
the snapshot stays until the machine's next backup, or until `forget`. A memory file never changes, so what was opened
here stays readable when its last name is gone, and goes with this process. Must not know how a night is written.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from typing import BinaryIO

from vmm.api.machine import FrozenMachine
from vmm.api.running_machine import RunningMachine
from vmm.api.stopped_machine import StoppedMachine
from vmm.model.errors import VmmError, of_os_error
from vmm.processes.rpc import Progress
from vmm.snapshots.create import SnapshotRequest
from vmm.snapshots.freeze import NightToCome
from vmm.store import registry, saved
from vmm.store.snapshots.memory import SnapshotFolder
from vmm.store.snapshots.snapshot import Snapshot
from vmm.store.snapshots.store import load_tree

_NOTES = "taken by a backup, and deleted by it, or by the next one"
_OWN_NAME = re.compile(r"backup-[0-9a-f-]{8,64}")


@dataclass(frozen=True, slots=True)
class OpenMemory:
    """The memory of a machine: an open file, its description (`store.saved`), and the UEFI variables of that moment
    if they are beside it.
    """

    file: BinaryIO
    description: bytes
    variables: bytes | None = None


def expected_bytes(machine: StoppedMachine | RunningMachine) -> int:
    """About how much the memory will take."""
    if machine.is_running:
        return machine.spec.memory_bytes
    with contextlib.suppress(FileNotFoundError):
        return os.stat(os.path.join(machine.opened.paths.saved, "memory.bin")).st_size
    return 0


def freeze_with_memory(
    machine: StoppedMachine | RunningMachine,
    night: NightToCome,
    stack: contextlib.ExitStack,
    *,
    consistent: bool,
    progress: Progress,
) -> tuple[FrozenMachine, OpenMemory | None]:
    """As `freeze_disks`, with the memory, which is open as long as `stack` is; None for a machine that is off.

    Raises as `freeze_disks` and as taking a snapshot does.
    """
    if not isinstance(machine, RunningMachine):
        is_saved = saved.is_saved(machine.opened.paths)
        frozen = machine.freeze_disks(night, consistent=consistent)
        paths = machine.opened.paths.saved
        if not is_saved:
            return frozen, None
        return frozen, _opened(stack, os.path.join(paths, "memory.bin"), os.path.join(paths, "state.json"))
    name = f"backup-{night.night_id}"
    try:
        snapshot = machine.take_snapshot(SnapshotRequest(name, _NOTES, consistent), progress)
        _keep(machine, night, snapshot)
        folder = SnapshotFolder(snapshot.folder)
        memory = _opened(stack, folder.memory, folder.description, folder.uefi_variables)
    except BaseException:  # Ctrl-C too; what cannot be removed now is removed by the next backup
        with contextlib.suppress(VmmError):
            remove_left(machine)
        raise
    machine.delete_snapshot(snapshot.id)
    return FrozenMachine("agent" if snapshot.consistent else "crash", snapshot.pause_seconds), memory


def remove_left(machine: StoppedMachine | RunningMachine) -> None:
    """Delete the snapshots that backups whose process was killed have left. Raises VmmError."""
    for one in list(load_tree(machine.opened.paths).snapshots.values()):
        if one.notes == _NOTES and _OWN_NAME.fullmatch(one.name):
            machine.delete_snapshot(one.id)


def without_left(machine: StoppedMachine | RunningMachine) -> list[str]:
    """Delete them before a backup, which goes on if that fails: returns what to say then."""
    try:
        remove_left(machine)
    except VmmError as error:
        return [f"the snapshot of a backup that was killed could not be deleted: {error}"]
    return []


def _keep(machine: RunningMachine, night: NightToCome, snapshot: Snapshot) -> None:
    """Keep the images that the snapshot froze for the night."""
    with machine.held_tree() as held:
        now = {disk.id: disk.path for disk in registry.load_for_change(held).spec.disks}
        frozen = {disk: path for disk, path in snapshot.disks.items() if now.get(disk) != path}
        held.tree.begin_night(night.keeps(frozen))
        held.save()


def _opened(stack: contextlib.ExitStack, memory: str, description: str, variables: str | None = None) -> OpenMemory:
    try:
        descriptor = os.open(memory, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        file = stack.enter_context(os.fdopen(descriptor, "rb"))
        with open(description, "rb") as beside:
            words = beside.read(saved.MAX_DESCRIPTION_BYTES)
        return OpenMemory(file, words, None if variables is None else _content(variables))
    except OSError as error:
        raise of_os_error(error, "open the machine's memory", path=memory) from error


def _content(path: str) -> bytes | None:
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        return file.read()
    return None
