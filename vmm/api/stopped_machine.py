# SPDX-License-Identifier: Apache-2.0
"""A machine that is off or saved, as its files: changes are made in the definition and in images, under its lock.

Decides what each method of `machine.OpenMachine` means for files, and how those that need a running machine fail. What
the changes are is decided in `local_machine`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from vmm.api.local_machine import LocalMachine
from vmm.api.machine import FrozenMachine, MergeResult
from vmm.model.errors import WrongState, of_os_error
from vmm.model.events import add_event
from vmm.model.spec import AdapterSpec, DiskSpec, MachineSpec
from vmm.store import registry, saved
from vmm.store.snapshots.store import Held, holding, read_merging
from vmm.store.state import is_clean

if TYPE_CHECKING:
    from vmm.kvm.key_value import KeyValueStore, Pool
    from vmm.kvm.picture import Picture
    from vmm.model.guest import ExchangedItem, GuestInfo, Heartbeat
    from vmm.processes.rpc import Progress
    from vmm.snapshots.create import SnapshotRequest
    from vmm.snapshots.freeze import NightToCome
    from vmm.store.snapshots.deletion_plan import LayerMerge
    from vmm.store.snapshots.tree import Snapshot


class StoppedMachine(LocalMachine):
    """A machine without a worker."""

    @property
    def is_running(self) -> bool:
        """False."""
        return False

    def _cannot(self, doing: str) -> NoReturn:
        raise WrongState(f"is {self.status().state}: cannot {doing} now", machine=self.name)

    # -- life --------------------------------------------------------------------------------------------------------

    def shutdown(self, timeout_seconds: float, progress: Progress | None = None) -> None:
        """Raises WrongState."""
        self._cannot("shut it down")

    def stop(self, progress: Progress | None = None) -> None:
        """Raises WrongState."""
        self._cannot("stop it")

    def save(self, progress: Progress | None = None) -> None:
        """Raises WrongState."""
        self._cannot("save it")

    def stop_with_host(self, progress: Progress | None = None) -> str:
        """Raises WrongState."""
        self._cannot("leave it")

    def reset(self) -> None:
        """Raises WrongState."""
        self._cannot("reset it")

    def pause(self) -> None:
        """Raises WrongState."""
        self._cannot("pause it")

    def resume(self) -> None:
        """Raises WrongState."""
        self._cannot("resume it")

    def discard_saved(self) -> None:
        """Discard its memory. Raises WrongState if it is not saved."""
        if not saved.is_saved(self.opened.paths):
            raise WrongState("is not saved", machine=self.name)
        saved.discard(self.opened.paths)
        self._tell("saved-state-discarded")

    def _tell(self, event: str, **details: object) -> None:
        add_event(self.place.machine.events, event, **details)

    # -- settings, disks, adapters -----------------------------------------------------------------------------------

    def _apply_rename(self, spec: MachineSpec) -> None:
        registry.rename(self.opened, spec)

    def _save(self, **changes: Any) -> None:
        registry.save(self.opened, self.spec.changed(**changes))

    def _apply_disk_added(self, disk: DiskSpec) -> None:
        self._save(disks=[*self.spec.disks, disk])
        self._tell("disk-added", disk=disk.id, path=disk.path)

    def _apply_disk_removed(self, disk: DiskSpec) -> None:
        self._save(disks=[one for one in self.spec.disks if one.id != disk.id])
        self._tell("disk-removed", disk=disk.id, path=disk.path)

    def _apply_medium(self, drive: DiskSpec, *, force: bool) -> None:
        from vmm.store.media import look_at_medium

        if saved.is_saved(self.opened.paths):
            identity = None if drive.path is None else look_at_medium(drive.path)
            saved.accept_media(self.opened.paths, {drive.id: identity})
        self._save(disks=[drive if one.id == drive.id else one for one in self.spec.disks])
        self._tell("medium-changed", drive=drive.id, path=drive.path)

    def _apply_size(self, disk: DiskSpec, size_bytes: int, *, shrink: bool) -> int:
        from vmm.store.images import resize_image

        return resize_image(disk, size_bytes, shrink=shrink, notes_folder=self.opened.runtime.notes_left)

    def _apply_adapter_added(self, adapter: AdapterSpec, after: MachineSpec) -> None:
        registry.save(self.opened, after)
        self._tell("adapter-added", adapter=adapter.id, switch=adapter.switch)

    def _apply_adapter_removed(self, adapter: AdapterSpec) -> None:
        self._save(adapters=[one for one in self.spec.adapters if one.id != adapter.id])
        self._tell("adapter-removed", adapter=adapter.id)

    def _apply_adapter_changed(self, adapter: AdapterSpec) -> None:
        self._save(adapters=[adapter if one.id == adapter.id else one for one in self.spec.adapters])
        self._tell("adapter-changed", adapter=adapter.id)

    # -- snapshots and backups ---------------------------------------------------------------------------------------

    def take_snapshot(self, request: SnapshotRequest, progress: Progress | None = None) -> Snapshot:
        """Take a snapshot of the files. Raises WrongState for a consistent one, and as `snapshots.create.create`."""
        from vmm.snapshots.create import create

        if request.consistent:
            raise WrongState("does not run: its file systems cannot be frozen, and need not be")
        return create(self.opened, request)

    @contextlib.contextmanager
    def held_tree(self) -> Iterator[Held]:
        """The tree, for changes, after an interrupted operation is settled. Raises InUse, VmmError."""
        from vmm.snapshots.recovery import settle

        with holding(self.opened.paths, self.name) as held:
            settle(held)
            yield held

    def merge_live(
        self,
        *,
        max_rate_bytes: int | None = None,
        wanted: Callable[[LayerMerge], bool] | None = None,
        progress: Progress | None = None,
    ) -> tuple[MergeResult, ...]:
        """Raises WrongState."""
        raise WrongState("does not run", hint=f"without --live: vmm snapshot merge {self.name}")

    def cancel_merge(self) -> bool:
        """Stop the merge in the background; False if none is in progress."""
        if read_merging(self.place.machine) is None:
            return False
        with holding(self.place.machine, self.name):
            return True

    def merge_in_background(self) -> None:
        """Start the merges that are due, unless the machine is saved. Raises VmmError."""
        from vmm.snapshots import background_merge

        if saved.is_saved(self.place.machine):
            return
        try:
            pid = background_merge.spawn(self.place.machine, self.place.runtime)
        except OSError as error:
            raise of_os_error(error, "start merging", machine=self.name) from error
        if pid is not None:
            _reap_later(pid)

    def freeze_disks(self, night: NightToCome, *, consistent: bool = False) -> FrozenMachine:
        """Give the disks new leaves. Raises WrongState if they must be consistent and are not, and as the files do."""
        from vmm.snapshots.freeze import freeze_files

        is_saved, has_shut_down = saved.is_saved(self.opened.paths), is_clean(self.opened.paths)
        if consistent and (is_saved or not has_shut_down):
            raise WrongState(
                "is saved: its file systems are in use" if is_saved else "died, or was powered off: its file systems"
                " were in use",
                machine=self.name, hint="without --consistent, or when it has shut down",
            )  # fmt: skip
        freeze_files(self.opened, night)
        if is_saved:
            return FrozenMachine("crash")
        return FrozenMachine("off-clean" if has_shut_down else "off-unclean")

    # -- the guest ---------------------------------------------------------------------------------------------------

    def need_guest(self) -> None:
        """Raises WrongState."""
        self._no_guest()

    def _no_guest(self) -> NoReturn:
        raise WrongState(
            f"is {self.status().state}: no guest is running",
            machine=self.name,
            hint=f"start it: vmm start {self.name}",
        )

    def screen(self) -> bytes:
        """Raises WrongState."""
        self._no_guest()

    def picture(self) -> Picture:
        """Raises WrongState."""
        self._no_guest()

    def ping(self) -> Heartbeat:
        """Raises WrongState."""
        self._no_guest()

    def guest_info(self) -> GuestInfo:
        """Raises WrongState."""
        self._no_guest()

    def guest_summary(self) -> GuestInfo | None:
        """None."""
        return None

    def freeze(self, max_seconds: float) -> int:
        """Raises WrongState."""
        self._no_guest()

    def thaw(self) -> int:
        """Raises WrongState."""
        self._no_guest()

    def set_time(self) -> None:
        """Raises WrongState."""
        self._no_guest()

    def items(self) -> dict[str, dict[str, str]]:
        """All items of both pools, from the file."""
        store = self._store()
        return {"host": store.items("host"), "guest": store.items("guest")}

    def get_item(self, key: str, pool: str | None = None) -> ExchangedItem:
        """An item, from the file. Raises NotFound."""
        from vmm.kvm.key_value import find_item, pool_named

        return find_item(self._store().get, key, pool_named(pool))

    def set_item(self, key: str, value: str) -> bool:
        """Set an item of the host's in the file; False: no guest has it yet. Raises InvalidSpec."""
        return self._change_items(lambda store, pool: store.set(pool, key, value))

    def delete_item(self, key: str) -> bool:
        """Remove an item of the host's from the file; False: no guest has received that yet. Raises NotFound."""
        return self._change_items(lambda store, pool: store.delete(pool, key))

    def _store(self) -> KeyValueStore:
        from vmm.kvm.key_value import KeyValueStore, store_path

        return KeyValueStore(store_path(self.place.machine.folder))

    def _change_items(self, change: Callable[[KeyValueStore, Pool], None]) -> bool:
        assert self.opened.lock.is_held  # the machine cannot be started meanwhile
        store = self._store()
        change(store, "host")
        store.save()
        return False


def _reap_later(pid: int) -> None:
    """Wait for the child, so that it leaves no zombie in a long-lived program; init adopts one that outlives us."""
    import threading

    def wait() -> None:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)

    threading.Thread(target=wait, name="vmm-merge", daemon=True).start()
