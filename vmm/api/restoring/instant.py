# SPDX-License-Identifier: Apache-2.0
"""Starting a machine from a night at once, and filling its disks while it runs.

    O (the guest writes) -> B (empty, to be filled) -> the night's image -> ...          for each disk

    0  disks that the machine only reads are copied: the disk server fills none of these
    1  B and O are made and synced, in a folder that belongs to no machine yet
    2  a lasting lease on the night, which the folder's note names first
    3  the machine appears in the registry, with the record of what is to be filled
    4  it is started; its worker fills each B, and does the rest (`worker.filling`)

Decides this order, so that whatever is killed, either no machine exists and the same command makes it, or it starts
from the night again (`INV-FILLED-SAME`). What the definition may have is decided in `found_night`, as for every
restore.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace

import vhdkit
from vhdkit import backups
from vmm.api.restoring.found_night import (
    FoundNight,
    Planned,
    RestoreRequest,
    found_night,
    plan_machine,
    refuse_outside,
)
from vmm.api.restoring.landing import Landing
from vmm.api.restoring.restoring import (
    RestoredMachine,
    add_machine,
    copy_disks,
    refuse_taken,
    report_restored,
    result_of,
    tell,
    tell_replaced,
    vmm_errors,
)
from vmm.model.errors import StoreFailed, VmmError
from vmm.model.formats import child_format, is_image_format
from vmm.model.interrupted import ends_with_us
from vmm.model.paths import MachinePaths, write_whole
from vmm.processes import worker_connection
from vmm.processes.rpc import Progress
from vmm.snapshots.steps import child_path
from vmm.store.filling import Filling, write_filling
from vmm.store.snapshots.store import tree_path
from vmm.store.snapshots.tree import Tree


def restore_now(
    request: RestoreRequest,
    *,
    max_rate_bytes: int | None = None,
    announce: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> RestoredMachine:
    """Make a machine of a night and start it; its disks are filled in the background, at most at that rate.

    Damage that is known is refused; files are compared with their sums before a disk is filled (`worker.filling`).
    Raises as `restore_machine`; then nothing is left. If the machine was made but cannot be started, raises what
    prevents that, and the machine stays.
    """
    request = replace(request, without_memory=request.without_memory or "with --now it starts from its disks")
    with vmm_errors(), ends_with_us("the restore"), found_night(request.repository, request.night) as found:
        planned = plan_machine(found, request)
        refuse_outside(planned, request)
        refuse_taken(planned, request)
        if request.check:
            _refuse_known_damage(found)
        tell(planned, announce)
        with Landing(planned.folder) as landing:
            tell_replaced(landing, announce)
            copied = {disk.id: planned.paths[disk.id] for disk in planned.spec.disks
                      if disk.id in planned.paths and disk.read_only}  # fmt: skip
            copy_disks(found, replace(planned, paths=copied), landing.part, request, progress)
            planned, leaves = _with_leaves(found, planned, landing.part)
            landing.appear()
            with _leased(found, planned, landing) if leaves else contextlib.nullcontext() as lease:
                filling = _filling(found, planned, leaves, request, lease, max_rate_bytes)
                machine = add_machine(
                    found, planned, request, lambda machine: _fill_folder(machine, planned, leaves, filling)
                )
        report_restored(machine, found, planned, now=True, lease=lease)
        done = result_of(found, planned, machine)
    try:
        worker_connection.start(done.name, progress=progress)
    except VmmError as error:
        error.hint = f"{error.hint or 'mend this'}; the machine was made: vmm start {done.name}"
        raise
    return done


def _refuse_known_damage(found: FoundNight) -> None:
    """Raise StoreFailed if a verification has found damage that reaches the night, or a file of it is missing."""
    known = backups.known_results(found.machine, found.machine.nights())
    problems = next((one.problems for one in known if one.number == found.manifest.night), ())
    if problems:
        raise StoreFailed(
            f"night {found.manifest.night} of {found.machine.name} is damaged: {problems[0]}",
            path=found.machine.repository.path,
            hint="restore another night (vmm backup list); --no-check starts this one as it is",
        )


def _with_leaves(found: FoundNight, planned: Planned, folder: str) -> tuple[Planned, dict[str, str]]:
    """Make B and O of each disk in a folder. Returns the machine with its Os, and disk id -> final path of O."""
    leaves: dict[str, str] = {}
    disks = []
    for disk in planned.spec.disks:
        if disk.id in planned.paths and not disk.read_only:
            filled = os.path.join(folder, os.path.basename(planned.paths[disk.id]))
            standing = backups.stand_on_night(found.machine, found.manifest, disk.id, filled, layers_above=1)
            leaf = child_path(filled, disk.format or "vhd")
            options = vhdkit.OpenOptions(parent_dirs=standing.folders)
            vhdkit.create_child(leaf, filled, options=options)
            leaves[disk.id] = os.path.join(planned.folder, os.path.basename(leaf))
            disk = disk.model_copy(
                update={"path": leaves[disk.id], "format": child_format(disk.format), "parent_dirs": standing.folders}
            )
        disks.append(disk)
    return replace(planned, spec=planned.spec.changed(disks=disks)), leaves


@contextlib.contextmanager
def _leased(found: FoundNight, planned: Planned, landing: Landing) -> Iterator[str | None]:
    """A lasting lease on the night; it ends if the block fails. None where the repository cannot be written to."""
    repository, machine = found.machine.repository, found.machine
    lease = os.urandom(16).hex()
    landing.note_lease(repository.path, lease)
    purpose = f"vmm restore --now: {planned.spec.name} on {os.uname().nodename}"
    try:
        backups.add_lease(repository.root, machine.id, found.manifest.night, purpose, lasting=True, lease_id=lease)
    except (vhdkit.ReadOnly, vhdkit.AccessDenied):
        yield None
        return
    machine.require_night(found.manifest.night)
    yield lease  # what ends it after a failure is the landing, by its note


def _filling(
    found: FoundNight,
    planned: Planned,
    leaves: Collection[str],
    request: RestoreRequest,
    lease: str | None,
    max_rate_bytes: int | None,
) -> Filling:
    manifest = found.manifest
    paths = {disk_id: os.path.realpath(planned.paths[disk_id]) for disk_id in leaves}
    return Filling(
        found.machine.repository.path, found.machine.repository.id, found.machine.id, found.machine.name,
        manifest.night, manifest.id, paths, lease, marks=request.register, max_rate_bytes=max_rate_bytes,
        checks=request.check,
    )  # fmt: skip


def _fill_folder(machine: MachinePaths, planned: Planned, leaves: dict[str, str], filling: Filling) -> None:
    """Put the tree of images and the record into the folder of a machine that is not visible yet."""
    tree = Tree()
    for disk_id, leaf in leaves.items():
        filled = filling.disks[disk_id]
        kind = os.path.splitext(filled)[1][1:]
        assert is_image_format(kind)
        tree.grow(filled, os.path.realpath(leaf), kind, child_id=vhdkit.image_id(leaf))
    if leaves:
        write_whole(tree_path(machine), tree.to_json())
        write_filling(machine, filling)
