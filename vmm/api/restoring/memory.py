# SPDX-License-Identifier: Apache-2.0
"""The memory of a night: whether the machine that is made of it continues from there, and how the memory gets there.

Decides when it does: it must be the old machine (`--register`), with the hardware and the media that the guest knew,
and the user must trust it, since QEMU reads it (`--allow memory`). Otherwise the machine is off. A machine that
continues is saved, with the state of a saved machine (`store.saved`).
"""

from __future__ import annotations

import os

import vhdkit
from vhdkit import backups
from vmm.model.errors import VmmError
from vmm.model.paths import MachinePaths
from vmm.model.spec import MachineSpec
from vmm.processes.rpc import Progress
from vmm.store import saved
from vmm.store.night_files import MEMORY, MEMORY_STATE

_FILE = "memory.bin"  # beside the new disks, until the machine has it


def problem_of(state: bytes, spec: MachineSpec) -> str | None:
    """Why the machine cannot continue from a memory that is described so, which is not trusted; None if it can."""
    try:
        description = saved.description_of(state, MEMORY_STATE)
    except VmmError as error:
        return str(error)
    return saved.restored_problem(description, spec)


def copy_memory(
    machine: backups.MachineFolder, manifest: backups.Manifest, folder: str, progress: Progress | None
) -> None:
    """Copy the memory into the folder of the new disks, compared with its sum. Raises VhdkitError."""

    def show(done_bytes: int, total_bytes: int) -> None:
        if progress is not None:
            progress({"step": "restoring memory", "done": done_bytes, "total": total_bytes})

    record = next((one for one in manifest.files if one.name == MEMORY), None)
    if record is None:
        raise vhdkit.NotFound(f"night {manifest.night} of {machine.name} describes a memory that it does not have")
    backups.copy_file(machine, manifest.night, record, os.path.join(folder, _FILE), show)


def put_memory(machine: MachinePaths, folder: str, spec: MachineSpec, state: bytes) -> None:
    """Make the machine, which is not visible yet, a saved one with the memory in that folder. Raises VmmError."""
    saved.put(machine, spec, os.path.join(folder, _FILE), saved.description_of(state, MEMORY_STATE))
