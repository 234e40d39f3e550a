# SPDX-License-Identifier: Apache-2.0
"""The library's entry point: the verbs of machines, disks, adapters and backups as methods, synchronous and typed.

Decides which verbs need the lock of their machine, how a machine is made, and what is refused beforehand.
Whether a machine runs is decided in `machines`, which opens it. Keeps no state: the truth is in the machines' folders
and workers, so any number of managers may be used at once, in any process.

    manager = vmm.Manager()
    manager.create("web", memory_bytes=1 << 30, disks=[vmm.DiskRequest("/srv/web.vhd")])
    manager.start("web")
    manager.shutdown("web")
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Unpack

from vmm.api import machines
from vmm.api.disk_request import DiskRequest as DiskRequest
from vmm.api.disk_request import DiskWish as DiskWish
from vmm.api.disk_request import disk_of
from vmm.api.guest_access import GuestAccess
from vmm.model.errors import InvalidSpec, VmmError
from vmm.model.events import Event, add_event, follow_events, read_events
from vmm.model.folders import Folders, uses_own_folders
from vmm.model.serials import keep_serials
from vmm.model.settings import HARDWARE, ChangedSettings, MachineSettings
from vmm.model.spec import AdapterSpec, DiskSpec, MachineSpec, make_spec
from vmm.processes import worker_connection
from vmm.processes.answers import FillProgress as FillProgress
from vmm.processes.rpc import Progress
from vmm.processes.worker_connection import MachineRef
from vmm.store import registry
from vmm.store.copies import AllIds, original_of
from vmm.store.images import look_at, note_marks, settings_with_real_paths
from vmm.store.media import open_medium
from vmm.store.registry import Machine
from vmm.store.snapshots.store import read_merging
from vmm.store.state import MachineState, processes_of

if TYPE_CHECKING:
    from vmm.api.backups import BackupWishes, ForgottenNights, MachineNight
    from vmm.api.deletion import Deletion
    from vmm.api.machine_snapshots import MachineSnapshots
    from vmm.api.new_id import NewId
    from vmm.api.repair import RepairStep
    from vmm.api.restoring.found_night import RestoreRequest
    from vmm.api.restoring.restoring import RestoredMachine
    from vmm.model.guest import GuestInfo
    from vmm.model.paths import MachinePaths

SHUTDOWN_SECONDS = 120.0
LogName = Literal["worker", "keeper", "qemu", "disks", "console"]


@dataclass(frozen=True, slots=True)
class MachineInfo:
    """A machine as `list` and `show` report it. `problem` is the reason if nothing more is known about it.

    `copy_of` is the machine with the same id, of which this one is a copied folder: it must get an id of its own
    (`new_id`) before anything else. `filling` is None if all disks are whole. `spec` is the definition, `running` the
    one with which it runs; the differences take effect at the next start (`at_next_start`).
    """

    name: str
    state: MachineState | None
    spec: MachineSpec | None
    folder: str | None = None
    accelerator: str | None = None
    uptime_seconds: float | None = None
    reason: str | None = None
    heartbeat: str | None = None
    operation: str | None = None
    guest: GuestInfo | None = None
    pids: dict[str, int] | None = None
    problem: VmmError | None = None
    copy_of: str | None = None
    running: MachineSpec | None = None
    filling: FillProgress | None = None

    @property
    def at_next_start(self) -> dict[str, object]:
        """The settings that change at the next start, with their new values; empty if the machine does not run."""
        if self.spec is None or self.running is None:
            return {}
        before, after = self.running.model_dump(mode="json"), self.spec.model_dump(mode="json")
        return {name: after[name] for name in sorted(HARDWARE) if before[name] != after[name]}


@dataclass(frozen=True, slots=True)
class DiskInfo:
    """A disk of a machine, with its size in bytes: None for an empty drive and where `problem` says why."""

    disk: DiskSpec
    size_bytes: int | None
    problem: str | None = None


@uses_own_folders
class Manager:
    """All machines of this user on this host.

    `home` is the folder of everything that outlives a reboot, `runtime` that of sockets; by default they come
    from the environment (`VMM_HOME`, `VMM_RUNTIME`). This object and the processes that it starts use these folders.
    """

    def __init__(
        self, home: str | os.PathLike[str] | None = None, runtime: str | os.PathLike[str] | None = None
    ) -> None:
        self.folders = Folders.given(home, runtime)

    # -- looking ----------------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """The names of all machines, sorted."""
        return registry.names()

    def machines(self, *, guest: bool = False) -> list[MachineInfo]:
        """All machines; `guest` asks their agents, too. One that cannot be examined is listed with its problem."""
        ids = AllIds()
        return [self._info_or_problem(name, ids, guest=guest) for name in registry.names()]

    def _info_or_problem(self, name: str, ids: AllIds, *, guest: bool) -> MachineInfo:
        try:
            return self._show(name, ids, guest=guest)
        except VmmError as error:
            return MachineInfo(name, None, None, problem=error)

    def show(self, name: str, *, guest: bool = False) -> MachineInfo:
        """One machine; `guest` asks its agent, too. Raises NotFound, InvalidSpec, TimedOut."""
        return self._show(name, None, guest=guest)

    def _show(self, name: str, ids: AllIds | None, *, guest: bool = False) -> MachineInfo:
        machine = worker_connection.look(name)
        place = _place(machine)
        found = machines.status(place, ids)
        if (original := original_of(name, ids)) is not None:
            return MachineInfo(name, found.state, machine.spec, folder=machine.paths.folder, copy_of=original)
        summary: GuestInfo | None = None
        if guest and found.heartbeat is not None:
            with machines.reach(place) as reached:
                summary = reached.guest_summary()
        processes = processes_of(place.runtime)
        return MachineInfo(
            name=machine.name,
            state=found.state,
            spec=machine.spec,
            folder=machine.paths.folder,
            accelerator=found.accelerator,
            uptime_seconds=found.uptime_seconds,
            reason=found.reason,
            heartbeat=found.heartbeat,
            filling=found.filling or _left_to_fill(machine),
            operation=found.operation or ("merge" if read_merging(machine.paths) is not None else None),
            guest=summary,
            pids={part: ref.pid for part, ref in processes.items()},
            running=_running_spec(place) if processes else None,
        )

    def state(self, name: str) -> MachineState:
        """The state of a machine. Raises NotFound, TimedOut."""
        return machines.status(name).state

    def events(self, name: str) -> list[Event]:
        """What happened to a machine, the oldest first."""
        return read_events(MachineRef.of(name).machine.events)

    def follow_events(self, name: str, *, past: bool = False) -> Iterator[Event | None]:
        """Each new event of a machine, with `past` after the earlier ones, until it is deleted; sometimes None."""
        return follow_events(MachineRef.of(name).machine.events, past=past)

    def log_path(self, name: str, log: LogName) -> str:
        """The path of a program's log, which may not exist yet."""
        machine = MachineRef.of(name).machine
        return machine.console_log if log == "console" else machine.log(log)

    def snapshots(self, name: str) -> MachineSnapshots:
        """A machine's snapshots: taking them, going back, merging. Raises NotFound."""
        from vmm.api.machine_snapshots import MachineSnapshots

        registry.load(name)
        return MachineSnapshots(name)

    # -- making and changing ----------------------------------------------------------------------------------------

    def create(
        self,
        name: str,
        *,
        disks: Sequence[DiskRequest] = (),
        adapters: Sequence[dict[str, Any]] = (),
        folder: str | None = None,
        **settings: Unpack[MachineSettings],
    ) -> MachineInfo:
        """Define a machine; `settings` are those of `MachineSpec`; its own folder is made in `folder`.

        `adapters` have settings of `AdapterSpec`; one without a MAC address gets one from the host's pool.

        Machine type and CPU model are pinned now. Raises InvalidSpec, AlreadyExists, NotFound, StoreFailed, InUse,
        Unsupported (QEMU is missing).
        """
        from vmm.api.possible import refuse_impossible
        from vmm.kvm import machine_types

        asked = set(settings)
        if "machine_type" not in settings:
            settings["machine_type"] = machine_types.newest("pc")
        spec = make_spec(name=name, **settings_with_real_paths(settings))
        for request in disks:  # checked together at the end: the first need not be the one that it boots from
            spec = spec.model_copy(update={"disks": (*spec.disks, disk_of(request, spec))})
        refuse_impossible(spec, asked)
        if folder is not None and not os.path.isdir(folder):
            raise InvalidSpec("is not a folder", path=folder, hint="create it first")
        with contextlib.ExitStack() as held:
            if adapters:
                from vmm.api.adapters import choosing_macs, fit

                held.enter_context(choosing_macs())
                for one in adapters:
                    spec = spec.model_copy(update={"adapters": (*spec.adapters, fit(one, spec))})
            spec = spec.changed()
            machine = registry.add(spec, folder=folder)
        add_event(machine.paths.events, "created")
        note_marks(machine, spec.disks)
        keep_serials(spec.disks)
        return self.show(name)

    def set(self, name: str, /, **settings: Unpack[ChangedSettings]) -> bool:
        """Change settings of `MachineSpec`; True if the change takes effect only at the next start.

        Raises InvalidSpec, WrongState for a name or hardware that must not change now.
        """
        with machines.open(name, stop_merge=False) as machine:
            return machine.change_settings(settings)

    def new_id(self, name: str) -> NewId:
        """Turn a copied folder, which is off, into a separate machine. See `NewId` for what happens to its disks.

        Raises WrongState for a machine that is not a copy.
        """
        from vmm.api.new_id import give_new_id

        return give_new_id(name)

    def plan_delete(self, name: str, *, with_disks: bool = False, with_snapshots: bool = False) -> Deletion:
        """What `delete` would remove. Raises WrongState while the machine runs or has snapshots, InUse."""
        from vmm.api.deletion import plan_delete

        return plan_delete(worker_connection.look(name), with_disks=with_disks, with_snapshots=with_snapshots)

    def delete(self, name: str, *, with_disks: bool = False, with_snapshots: bool = False) -> Deletion:
        """Remove a machine, its saved state and logs; on request also its images and snapshots.

        Parents that are not the machine's own always stay. Raises WrongState, before anything is removed, while it
        runs or, unless `with_snapshots`, has snapshots.
        """
        from vmm.api.deletion import delete

        return delete(name, with_disks=with_disks, with_snapshots=with_snapshots)

    # -- life ---------------------------------------------------------------------------------------------------------

    def start(self, name: str, *, discard_saved: bool = False, progress: Progress | None = None) -> MachineState:
        """Start a machine, with its saved memory if any. Raises WrongState, InUse, and for what is missing."""
        return worker_connection.start(name, discard_saved=discard_saved, progress=progress).state

    def shutdown(
        self, name: str, *, timeout_seconds: float = SHUTDOWN_SECONDS, progress: Progress | None = None
    ) -> None:
        """Have the guest shut itself down, and wait. Raises TimedOut if it does not, WrongState."""
        with machines.reach(name) as machine:
            machine.shutdown(timeout_seconds, progress)

    def stop(self, name: str, *, progress: Progress | None = None) -> None:
        """Power off. Raises WrongState if it is off."""
        with machines.reach(name) as machine:
            machine.stop(progress)

    def save(self, name: str, *, progress: Progress | None = None) -> None:
        """Save memory and devices to disk, and power off. After WrongState or NoSpace the machine runs on."""
        with machines.reach(name) as machine:
            machine.save(progress)

    def stop_with_host(self, name: str, *, progress: Progress | None = None) -> str:
        """Carry out its automatic stop action, or the next one if that fails; returns what was done, in words.

        If a signal to its processes has begun this already, waits for that. Raises WrongState if it is off.
        """
        with machines.reach(name) as machine:
            return machine.stop_with_host(progress)

    def reset(self, name: str) -> None:
        """Press the reset button."""
        with machines.reach(name) as machine:
            machine.reset()

    def pause(self, name: str) -> None:
        """Stop the processors until `resume`."""
        with machines.reach(name) as machine:
            machine.pause()

    def resume(self, name: str) -> None:
        """Continue after `pause`."""
        with machines.reach(name) as machine:
            machine.resume()

    def discard_saved(self, name: str) -> None:
        """Discard a saved machine's memory. Raises WrongState if it is not saved."""
        with machines.open(name, stop_merge=False) as machine:
            machine.discard_saved()

    # -- adapters -----------------------------------------------------------------------------------------------------

    def add_adapter(self, name: str, **settings: Any) -> AdapterSpec:
        """Give a machine an adapter, at once if it runs. Raises InvalidSpec, NotFound, AlreadyExists, NoSpace."""
        with machines.open(name, stop_merge=False) as machine:
            return machine.add_adapter(settings)

    def remove_adapter(self, name: str, adapter_id: str) -> AdapterSpec:
        """Remove an adapter, at once if the machine runs. Raises NotFound, TimedOut if the guest keeps it."""
        with machines.open(name, stop_merge=False) as machine:
            return machine.remove_adapter(adapter_id)

    def change_adapter(self, name: str, adapter_id: str, **settings: Any) -> AdapterSpec:
        """Change an adapter; while the machine runs only its rules, limits and link. Raises WrongState."""
        with machines.open(name, stop_merge=False) as machine:
            return machine.change_adapter(adapter_id, settings)

    # -- disks --------------------------------------------------------------------------------------------------------

    def add_disk(self, name: str, request: DiskRequest) -> DiskSpec:
        """Give a machine a disk; if it runs, on SCSI only. Raises InvalidSpec, NotFound, StoreFailed, InUse."""
        with machines.open(name) as machine:
            return machine.add_disk(request)

    def remove_disk(self, name: str, disk_id: str) -> DiskSpec:
        """Remove a disk from a machine; the image stays. Raises NotFound, WrongState, TimedOut."""
        with machines.open(name) as machine:
            return machine.remove_disk(disk_id)

    def change_medium(self, name: str, drive_id: str, path: str | None, *, force: bool = False) -> DiskSpec:
        """Put another medium, or none, into a drive, in any state of the machine; returns the changed drive.

        `force`: take the medium out even if a running guest has locked the drive. A saved guest notices the change
        when it continues. Raises NotFound, InvalidSpec, WrongState, Refused for a locked drive.
        """
        with machines.open(name, stop_merge=False) as machine:
            return machine.change_medium(drive_id, path, force=force)

    def resize_disk(self, name: str, disk_id: str, size_bytes: int, *, shrink: bool = False) -> int:
        """Resize a disk; returns its new size. It gets smaller only with `shrink`, and while the machine is off.

        Raises StoreFailed, WrongState, InvalidSpec.
        """
        with machines.open(name) as machine:
            return machine.resize_disk(disk_id, size_bytes, shrink=shrink)

    def disks(self, name: str) -> tuple[DiskInfo, ...]:
        """The disks of a machine, with their sizes; what is wrong with one is in its `problem`."""
        machine = worker_connection.look(name)
        return tuple(_disk_info(disk, machine.paths) for disk in machine.spec.disks)

    def save_night(
        self, name: str, repository: str, wishes: BackupWishes | None = None, *, progress: Progress | None = None
    ) -> MachineNight:
        """Save the machine as the next night of a repository, whatever it is doing. Raises as `backups.save_night`."""
        from vmm.api import backups

        return backups.save_night(name, repository, wishes or backups.BackupWishes(), progress=progress)

    def forget_nights(
        self, name: str, repository: str | None = None, *, progress: Progress | None = None
    ) -> ForgottenNights:
        """Keep no layers for the next nights any more. Raises as `backups.forget_nights`."""
        from vmm.api import backups

        return backups.forget_nights(name, repository, progress=progress)

    def restore(
        self, request: RestoreRequest, *, now: bool = False, progress: Progress | None = None
    ) -> RestoredMachine:
        """Make a machine of a night; with `now` it is started, and filled later. Raises as `restore_machine`."""
        from vmm.api.restoring.instant import restore_now
        from vmm.api.restoring.restoring import restore_machine

        return (restore_now if now else restore_machine)(request, progress=progress)

    def repair(
        self, name: str, *, dry_run: bool = False, leaf: str | None = None, give_up_missing: bool = False
    ) -> list[RepairStep]:
        """Find the newest images of a machine that does not run; unless `dry_run`, make them its disks.

        `leaf` names the newest one if there are several candidates; `give_up_missing` continues without one that is
        lost. Raises WrongState while it runs, NotFound, InUse, StoreFailed.
        """
        from vmm.api.repair import repair

        return repair(name, dry_run=dry_run, leaf=leaf, give_up_missing=give_up_missing)

    def guest(self, name: str) -> GuestAccess:
        """The inside of a machine: console, screen, agent, exchanged items. Raises NotFound."""
        return GuestAccess(MachineRef.of(name))


def _place(machine: Machine) -> MachineRef:
    return MachineRef(machine.name, machine.paths, machine.runtime)


def _running_spec(place: MachineRef) -> MachineSpec | None:
    with contextlib.suppress(VmmError):
        return registry.read_definition(place.runtime.running)
    return None


def _left_to_fill(machine: Machine) -> FillProgress | None:
    """From which night the disks of a machine are filled once it runs."""
    from vmm.store.filling import source_of_disks

    source = source_of_disks(machine.paths)
    return None if source is None else FillProgress(source)


def _disk_info(disk: DiskSpec, machine: MachinePaths) -> DiskInfo:
    from vmm.store.filling import size_while_filled

    try:
        return DiskInfo(disk, size_while_filled(machine, disk.id, disk.path) or _size_of(disk))
    except VmmError as error:
        return DiskInfo(disk, None, error.problem)


def _size_of(disk: DiskSpec) -> int | None:
    if disk.path is None:
        return None
    if disk.is_image:
        return look_at(disk).size_bytes
    if disk.kind == "pass-through":
        from vmm.store import devices  # slow to import, and few machines need it

        return devices.size_bytes_of(disk)
    descriptor = open_medium(disk.path)
    try:
        return os.lseek(descriptor, 0, os.SEEK_END)
    finally:
        os.close(descriptor)
