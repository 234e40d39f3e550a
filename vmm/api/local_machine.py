# SPDX-License-Identifier: Apache-2.0
"""What holds for a machine of this host whether it runs or not: the base of `StoppedMachine` and
`RunningMachine`.

Decides which disk, adapter or snapshot a word means, what is refused while the machine is saved, which settings are
fixed, and that a tree of snapshots is changed only after an interrupted operation is settled. How a change is made, in
files or by the worker, is left to the subclasses (`_apply_*`).
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from vmm.model.errors import InvalidSpec, WrongState
from vmm.processes.answers import MachineStatus
from vmm.processes.worker_connection import MachineRef, status_of
from vmm.store.snapshots.store import Held, has_tree, read_merging
from vmm.store.snapshots.tree import MAX_LIMIT, Snapshot

if TYPE_CHECKING:
    from vmm.api.disk_request import DiskRequest
    from vmm.model.spec import AdapterSpec, DiskSpec, MachineSpec
    from vmm.snapshots.delete import Deleted
    from vmm.store.registry import Changing

_FIXED = {"id", "schema_version", "disks", "adapters", "generation"}


class LocalMachine(ABC):
    """A machine of this host. `opened`: its definition, read after its lock was taken; None if it was only reached."""

    def __init__(self, place: MachineRef, opened: Changing | None) -> None:
        self.place = place
        self._opened = opened

    @property
    def name(self) -> str:
        """Its name."""
        return self.place.name

    @property
    @abstractmethod
    def is_running(self) -> bool:
        """True if it has a worker."""

    @property
    def opened(self) -> Changing:
        """The machine and its lock, for access to its files."""
        assert self._opened is not None, "a machine must be opened to be changed; this one was only reached"
        return self._opened

    @property
    def spec(self) -> MachineSpec:
        """The definition as it was read after the lock was taken."""
        return self.opened.spec

    def status(self) -> MachineStatus:
        """Its present status."""
        return status_of(self.place)

    def _refuse_saved(self, doing: str) -> None:
        from vmm.store import saved

        saved.refuse_when_saved(self.place.machine, self.name, doing)

    # -- settings ----------------------------------------------------------------------------------------------------

    def change_settings(self, settings: Mapping[str, Any]) -> bool:
        """Change settings; True if some take effect only at the next start. Raises InvalidSpec, WrongState."""
        from vmm.api.possible import refuse_impossible
        from vmm.model.settings import HARDWARE
        from vmm.store import registry, saved
        from vmm.store.images import settings_with_real_paths

        machine = self.opened
        fixed = sorted(set(settings) & _FIXED)
        if fixed:
            raise InvalidSpec(f"{', '.join(fixed)} cannot be set", machine=self.name)
        hardware = set(settings) & HARDWARE
        refused = hardware
        boots = hardware & {"kernel", "initrd", "append"}  # of no use to a guest that continues
        if boots and saved.is_saved(machine.paths) and saved.read_description(machine.paths).had_kernel:
            refused = hardware - boots
        if refused:
            self._refuse_saved(f"changing {', '.join(sorted(refused))}")
        changes = settings_with_real_paths(settings)
        if changes.get("kernel", "") is None:  # they need a kernel
            changes = {"initrd": None, "append": None, **changes}
        refuse_impossible(machine.spec.changed(**changes), settings)
        if changes.get("name", machine.name) != machine.name:
            self._apply_rename(machine.spec.changed(**changes))
        else:  # the worker decides the disks: a snapshot may be moving them
            registry.update(machine.lock, lambda spec: spec.changed(**changes))
        return self.is_running and bool(hardware)

    @abstractmethod
    def _apply_rename(self, spec: MachineSpec) -> None: ...

    # -- disks -------------------------------------------------------------------------------------------------------

    def add_disk(self, request: DiskRequest) -> DiskSpec:
        """Add a disk or drive; a running machine gets it on SCSI. Raises InvalidSpec, NotFound, StoreFailed, InUse."""
        from vmm.api.disk_request import disk_of
        from vmm.model.serials import keep_serials
        from vmm.store.images import note_marks

        self._refuse_saved("adding a disk")
        disk = disk_of(self._fitting(request), self.spec)
        self._apply_disk_added(disk)
        note_marks(self.opened, [disk])
        keep_serials([disk])
        return disk

    def _fitting(self, request: DiskRequest) -> DiskRequest:
        """The request, completed with what this machine decides."""
        return request

    @abstractmethod
    def _apply_disk_added(self, disk: DiskSpec) -> None: ...

    def remove_disk(self, disk: str) -> DiskSpec:
        """Remove a disk; the image stays. Raises NotFound, WrongState, TimedOut."""
        from vmm.model.serials import keep_serials
        from vmm.store.filling import refuse_while_filled
        from vmm.store.images import find_disk

        found = find_disk(self.opened, disk)
        self._refuse_saved("removing a disk")
        refuse_while_filled(self.opened.paths, self.name, "removing the disk", found.id)
        with self._letting_go(found):
            self._apply_disk_removed(found)
        keep_serials([found])  # it may be a newer leaf than the one that was given
        return found

    @contextlib.contextmanager
    def _letting_go(self, disk: DiskSpec) -> Iterator[None]:
        """The disk's image leaves the tree before the block takes it out of the definition: images of the tree that
        nothing needs are removed, and this one stays. If the block fails, it is put back.
        """
        record = None
        if disk.is_image and disk.path is not None and has_tree(self.opened.paths):
            with self.held_tree() as held:
                record = held.tree.let_go(disk.path)
                if record is not None:
                    held.save()
        try:
            yield
        except BaseException:
            if record is not None and disk.path is not None:
                with self.held_tree() as held:
                    held.tree.images[disk.path] = record
                    held.save()
            raise

    @abstractmethod
    def _apply_disk_removed(self, disk: DiskSpec) -> None: ...

    def change_medium(self, drive: str, path: str | None, *, force: bool = False) -> DiskSpec:
        """Put another medium, or none, into a drive. Raises NotFound, InvalidSpec, WrongState, Refused."""
        from vmm.model.paths import default_folders
        from vmm.store.images import find_disk, find_image, readable

        found = find_disk(self.opened, drive)
        if found.kind != "iso":
            raise WrongState(
                f"{found.id} is a hard disk, not a drive with a medium", machine=self.name, path=found.path,
                hint=f"vmm disk list {self.name} shows which drives there are",
            )  # fmt: skip
        if path is not None:
            path = readable(find_image(path, self.spec.paths.disks or default_folders()["disks"]))
        changed = found.model_copy(update={"path": path})
        self._apply_medium(changed, force=force)
        return changed

    @abstractmethod
    def _apply_medium(self, drive: DiskSpec, *, force: bool) -> None: ...

    def resize_disk(self, disk: str, size_bytes: int, *, shrink: bool = False) -> int:
        """Resize a disk; returns its new size in bytes. Raises StoreFailed, WrongState, InvalidSpec."""
        from vmm.store.images import find_disk

        found = find_disk(self.opened, disk)
        if not found.is_image or found.read_only or found.path is None:
            raise WrongState("only a writable image can be resized", machine=self.name, path=found.path)
        self._refuse_saved("resizing a disk")
        return self._apply_size(found, size_bytes, shrink=shrink)

    @abstractmethod
    def _apply_size(self, disk: DiskSpec, size_bytes: int, *, shrink: bool) -> int: ...

    # -- adapters ----------------------------------------------------------------------------------------------------

    def add_adapter(self, settings: dict[str, Any]) -> AdapterSpec:
        """Add an adapter. Raises InvalidSpec, NotFound, AlreadyExists, NoSpace."""
        from vmm.api import adapters

        with adapters.choosing_macs():
            self._refuse_saved("adding an adapter")
            adapter = adapters.fit(settings, self.spec)
            after = self.spec.changed(adapters=[*self.spec.adapters, adapter])  # raises if it is not valid
            self._apply_adapter_added(adapter, after)
        return adapter

    @abstractmethod
    def _apply_adapter_added(self, adapter: AdapterSpec, after: MachineSpec) -> None: ...

    def remove_adapter(self, adapter: str) -> AdapterSpec:
        """Remove an adapter. Raises NotFound, TimedOut, WrongState."""
        from vmm.api import adapters

        found = adapters.find(self.opened, adapter)
        self._refuse_saved("removing an adapter")
        self._apply_adapter_removed(found)
        return found

    @abstractmethod
    def _apply_adapter_removed(self, adapter: AdapterSpec) -> None: ...

    def change_adapter(self, adapter: str, settings: dict[str, Any]) -> AdapterSpec:
        """Change an adapter; of a running machine only the settings that can change. Raises VmmError."""
        from vmm.api import adapters

        with adapters.choosing_macs():
            before = adapters.find(self.opened, adapter)
            changed = adapters.changed(before, settings)
            if set(settings) & {"kind", "mac"}:
                self._refuse_saved("changing an adapter")
            adapters.refuse_unknown_switch(changed, before)
            self._apply_adapter_changed(changed)
        return changed

    @abstractmethod
    def _apply_adapter_changed(self, adapter: AdapterSpec) -> None: ...

    # -- the tree of snapshots ---------------------------------------------------------------------------------------

    def delete_snapshot(self, word: str, *, subtree: bool = False) -> Deleted:
        """Delete a snapshot; with `subtree` its descendants, too. Raises NotFound, InUse, VmmError."""
        from vmm.snapshots.delete import delete

        with self.held_tree() as held:
            return delete(held, word, subtree=subtree)

    def forget_memory(self, word: str) -> Snapshot:
        """Keep a snapshot without its memory. Raises NotFound, WrongState."""
        from vmm.snapshots.delete import forget_memory

        with self._tree_for_a_moment() as held:
            return forget_memory(held, word)

    def rename_snapshot(self, word: str, name: str) -> None:
        """Rename a snapshot. Raises NotFound, AlreadyExists, InvalidSpec."""
        with self._tree_for_a_moment() as held:
            held.tree.rename(held.find(word), name)
            held.save()

    def annotate_snapshot(self, word: str, notes: str) -> None:
        """Replace a snapshot's notes. Raises NotFound, InvalidSpec."""
        with self._tree_for_a_moment() as held:
            held.tree.annotate(held.find(word), notes)
            held.save()

    def limit_snapshots(self, limit: int) -> None:
        """Limit the number of snapshots. Raises InvalidSpec."""
        if not 1 <= limit <= MAX_LIMIT:
            raise InvalidSpec(f"a machine may have 1 to {MAX_LIMIT} snapshots")
        with self._tree_for_a_moment() as held:
            held.tree.limit = limit
            held.save()

    @abstractmethod
    def held_tree(self) -> contextlib.AbstractContextManager[Held]:
        """The tree, for changes, after an interrupted operation is settled. Raises InUse, VmmError."""

    @contextlib.contextmanager
    def _tree_for_a_moment(self) -> Iterator[Held]:
        """The tree, for a short change. A merge in the background stops for it and continues afterwards."""
        merging = read_merging(self.place.machine)
        try:
            with self.held_tree() as held:
                yield held
        finally:
            if merging is not None and read_merging(self.place.machine) is None:
                self.merge_in_background()

    @abstractmethod
    def merge_in_background(self) -> None:
        """Start a process that makes the merges that are due, if the machine's state allows it."""
