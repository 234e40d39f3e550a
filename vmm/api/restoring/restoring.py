# SPDX-License-Identifier: Apache-2.0
"""Making a machine of a night: whole, or not at all.

    lease       the night is held, so that no prune takes what is read
    judge       everything of the definition that lies outside the night is refused at once, unless it is allowed
    copy        disks become new images in a hidden folder, after their sums were compared
    appear      the folder gets its name, and a note says that it belongs to no machine yet
    add         the machine appears in the registry, with its UEFI variables; the note is removed

Decides this order, and which ids, addresses and serials are new. What may be in a definition is decided in
`found_night`, what becomes of a killed restore's folder in `landing`. The machine is off, and starts as after the
power cut, or the shutdown, that the night shows; or it is saved, with the night's memory (`memory`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import vhdkit
from vhdkit import backups
from vmm.api.adapters import choosing_macs, refuse_taken_macs, with_new_macs
from vmm.api.export_import.importing import refuse_known
from vmm.api.restoring.found_night import (
    FoundNight,
    Planned,
    RestoreRequest,
    found_night,
    plan_machine,
    refuse_outside,
)
from vmm.api.restoring.landing import Landing
from vmm.api.restoring.memory import copy_memory, put_memory
from vmm.model.errors import AlreadyExists
from vmm.model.events import add_event
from vmm.model.interrupted import ends_with_us
from vmm.model.paths import MachinePaths, write_whole
from vmm.model.serials import keep_serials
from vmm.model.spec import MachineSpec
from vmm.processes.rpc import Progress
from vmm.snapshots.steps import store_problem
from vmm.store import registry
from vmm.store.registry import Machine
from vmm.store.state import note_unclean


@dataclass(frozen=True, slots=True)
class RestoredMachine:
    """The machine that was made, or would be. `disks`: disk id -> the path of its image. `taken`: ISO 8601.

    `outside`: what its definition has from outside the night and was not allowed -> the option that allows it.
    `granted`: what the user allowed. `is_saved`: it continues from the night's memory; `memory_left_out`: why it does
    not, although the night has one.
    """

    name: str
    machine_id: str
    night: int
    taken: str
    consistency: backups.Consistency
    folder: str | None
    disks: Mapping[str, str]
    granted: tuple[str, ...]
    outside: Mapping[str, str]
    warnings: tuple[str, ...]
    is_saved: bool = False
    memory_left_out: str | None = None


def look_at_night(request: RestoreRequest) -> RestoredMachine:
    """What `restore_machine` would make; nothing is written. Raises as it does, but for what is refused."""
    with vmm_errors(), found_night(request.repository, request.night, dry_run=True) as found:
        return result_of(found, plan_machine(found, request), None)


def restore_machine(
    request: RestoreRequest,
    *,
    announce: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> RestoredMachine:
    """Make a machine of a night. `announce` is called, before it is made, with each thing that the user allowed it,
    and with what of an interrupted restore was removed.

    Raises NotFound, InvalidSpec, Refused for a definition that reaches outside the night, AlreadyExists, NoSpace,
    StoreFailed for a damaged repository; then nothing is left. A lease keeps the night meanwhile.
    """
    with vmm_errors(), ends_with_us("the restore"), found_night(request.repository, request.night) as found:
        planned = plan_machine(found, request)
        refuse_outside(planned, request)
        refuse_taken(planned, request)
        tell(planned, announce)
        with Landing(planned.folder) as landing:
            tell_replaced(landing, announce)
            copy_disks(found, planned, landing.part, request, progress)
            if planned.has_memory:
                copy_memory(found.machine, found.manifest, landing.part, progress)
            landing.appear()
            machine = add_machine(found, planned, request, partial(_fill_memory, found, planned))
        report_restored(machine, found, planned)
        return result_of(found, planned, machine)


def refuse_taken(planned: Planned, request: RestoreRequest) -> None:
    """Raise AlreadyExists for a name, or with `register` an id or address, that another machine has."""
    if planned.spec.name in registry.names():
        other = "delete it first, or restore beside it: --as NEW, without --register"
        hint = other if request.register else "give another name: --as"
        raise AlreadyExists("a machine of that name already exists", machine=planned.spec.name, hint=hint)
    if request.register:
        refuse_known(planned.spec, request.repository)


def tell(planned: Planned, announce: Callable[[str], None] | None) -> None:
    """Announce what the machine will have from outside the night, and that it lacks the night's memory."""
    if announce is not None:
        for words in planned.granted:
            announce(f"allowed: {words}")
        if planned.memory_left_out is not None:
            announce(f"the memory of the night is left out: {planned.memory_left_out}")


def tell_replaced(landing: Landing, announce: Callable[[str], None] | None) -> None:
    """Announce what was in the way."""
    if landing.has_replaced and announce is not None:
        announce(f"removed what an interrupted restore had left: {landing.folder}")


def copy_disks(
    found: FoundNight, planned: Planned, folder: str, request: RestoreRequest, progress: Progress | None
) -> None:
    """Make the images of the disks in a folder, under the names that they will have. Raises VhdkitError, OSError."""
    if not planned.paths:
        return

    def stage(doing: str) -> vhdkit.Progress:
        def show(done_bytes: int, total_bytes: int) -> None:
            if progress is not None:
                progress({"step": doing, "done": done_bytes, "total": total_bytes})

        return show

    done = backups.restore(
        request.repository, found.word, folder, disks=list(planned.paths), check=request.check, stage=stage
    )
    for disk_id, path in done.disks.items():
        os.rename(path, os.path.join(folder, os.path.basename(planned.paths[disk_id])))


def add_machine(
    found: FoundNight,
    planned: Planned,
    request: RestoreRequest,
    fill: Callable[[MachinePaths], None] = lambda machine: None,
) -> Machine:
    """Add the machine to the registry. `fill` puts further files into its folder. Raises VmmError."""

    def files(machine: MachinePaths) -> None:
        if found.manifest.consistency is not backups.Consistency.OFF_CLEAN:
            note_unclean(machine)
        if found.variables is not None:
            write_whole(machine.uefi_variables, found.variables)
        fill(machine)

    with contextlib.ExitStack() as held:
        spec: MachineSpec = planned.spec
        if spec.adapters:
            held.enter_context(choosing_macs())
            if request.register:
                refuse_taken_macs(spec)
            else:
                spec = with_new_macs(spec)
        return registry.add(spec, fill=files)


def _fill_memory(found: FoundNight, planned: Planned, machine: MachinePaths) -> None:
    if planned.has_memory and found.memory_state is not None:
        put_memory(machine, planned.folder, planned.spec, found.memory_state)


def report_restored(machine: Machine, found: FoundNight, planned: Planned, **more: Any) -> None:
    """Record the restore as the machine's first event, and the serials of its images."""
    add_event(
        machine.paths.events, "restored", repository=found.machine.repository.path, night=found.manifest.night,
        consistency=found.manifest.consistency.value, granted=list(planned.granted), **more,
    )  # fmt: skip
    keep_serials(machine.spec.disks)


def result_of(found: FoundNight, planned: Planned, machine: Machine | None) -> RestoredMachine:
    """What was made of a night, or without a machine, what would be."""
    manifest = found.manifest
    return RestoredMachine(
        planned.spec.name,
        planned.spec.id,
        manifest.night,
        manifest.local_time.isoformat(),
        manifest.consistency,
        None if machine is None else machine.paths.folder,
        dict(planned.paths),
        planned.granted,
        dict(planned.refused),
        manifest.warnings,
        planned.has_memory,
        planned.memory_left_out,
    )


@contextlib.contextmanager
def vmm_errors() -> Iterator[None]:
    """Failures of files and images in the block, as VmmErrors."""
    try:
        yield
    except (OSError, vhdkit.VhdkitError) as error:
        raise store_problem(error, "restore the machine") from error
