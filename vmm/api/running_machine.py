# SPDX-License-Identifier: Apache-2.0
"""A machine that runs, as its worker: each method is one request on the control socket.

Decides which request a method makes, how long the worker may be silent, and how its answers become values; a malformed
answer is an error, not a crash of the caller. What the worker does is decided in `vmm.worker`.
"""

from __future__ import annotations

import base64
import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vmm.api.local_machine import LocalMachine
from vmm.api.machine import FrozenMachine, MergeResult
from vmm.model.errors import InUse, VmmError, WrongState
from vmm.model.guest import ExchangedItem, GuestInfo, Heartbeat
from vmm.model.interrupted import goes_on_without_us
from vmm.model.waiting import looks
from vmm.processes import worker_connection
from vmm.processes.answers import understood
from vmm.processes.rpc import ANSWER_SECONDS, ControlClient, Progress
from vmm.processes.worker_connection import MachineRef
from vmm.store.snapshots.journal import Delete, MergeOff
from vmm.store.snapshots.store import Held, holding, load_tree

if TYPE_CHECKING:
    from vmm.api.disk_request import DiskRequest
    from vmm.kvm.picture import Picture
    from vmm.model.spec import AdapterSpec, DiskSpec, MachineSpec
    from vmm.snapshots.create import SnapshotRequest
    from vmm.snapshots.freeze import NightToCome
    from vmm.store.registry import Changing, Machine
    from vmm.store.snapshots.deletion_plan import LayerMerge
    from vmm.store.snapshots.tree import Snapshot

EXIT_CANCELLED = 130  # of vhdkit, when a merge is cancelled
_PATIENCE_SECONDS = 120.0  # between two signs of life during a long verb
_ADAPTER_SECONDS = 60.0
_MEMORY_SECONDS = 600.0  # writing a guest's memory to a slow disk
_FREEZING_SECONDS = 120.0  # the guest writes out all that is dirty first
_SETTLE_SECONDS = 60.0  # for another operation on the running machine to end


class RunningMachine(LocalMachine):
    """A machine with a worker."""

    def __init__(self, place: MachineRef, worker: ControlClient, opened: Changing | None) -> None:
        super().__init__(place, opened)
        self._worker = worker

    @property
    def is_running(self) -> bool:
        """True."""
        return True

    def _ask(
        self, method: str, progress: Progress | None = None, *, timeout_seconds: float = _PATIENCE_SECONDS,
        **params: Any,
    ) -> Any:  # fmt: skip
        return self._worker.call(method, timeout_seconds=timeout_seconds, progress=progress, **params)

    # -- life --------------------------------------------------------------------------------------------------------

    def _ask_until_off(self, method: str, progress: Progress | None, **params: Any) -> None:
        with goes_on_without_us(f"the {method}", self.name):
            self._ask(method, progress, **params)
        worker_connection.wait_put_away(self.place)

    def shutdown(self, timeout_seconds: float, progress: Progress | None = None) -> None:
        """Have the guest shut itself down; returns when its processes have ended. Raises TimedOut, WrongState."""
        self._ask_until_off("shutdown", progress, seconds=timeout_seconds)

    def stop(self, progress: Progress | None = None) -> None:
        """Power off; returns when its processes have ended."""
        self._ask_until_off("stop", progress)

    def save(self, progress: Progress | None = None) -> None:
        """Save, then off; returns when its processes have ended. Raises WrongState, NoSpace."""
        self._ask_until_off("save", progress)

    def stop_with_host(self, progress: Progress | None = None) -> str:
        """Carry out the automatic stop action; returns what was done, in words."""
        with understood(self.name):
            done = str(self._ask("leave", progress)["done"])
        worker_connection.wait_put_away(self.place)
        return done

    def reset(self) -> None:
        """Press the reset button."""
        self._ask("reset")

    def pause(self) -> None:
        """Stop the processors."""
        self._ask("pause")

    def resume(self) -> None:
        """Continue after `pause`."""
        self._ask("resume")

    def discard_saved(self) -> None:
        """Raises WrongState."""
        raise WrongState("is not saved", machine=self.name)

    # -- settings, disks, adapters -----------------------------------------------------------------------------------

    def _apply_rename(self, spec: MachineSpec) -> None:
        raise WrongState("is running, and cannot be renamed now", machine=self.name)

    def _fitting(self, request: DiskRequest) -> DiskRequest:
        if request.controller is None and request.kind != "iso":
            return replace(request, controller="scsi")
        return request

    def _apply_disk_added(self, disk: DiskSpec) -> None:
        from vmm.store import registry

        registry.check_disks(self.spec.changed(disks=[*self.spec.disks, disk]))
        self._ask("disk-add", disk=disk.model_dump(mode="json"))

    def _apply_disk_removed(self, disk: DiskSpec) -> None:
        self._ask("disk-remove", disk=disk.id)

    def _apply_medium(self, drive: DiskSpec, *, force: bool) -> None:
        self._ask("disk-change", disk=drive.id, path=drive.path, force=force)

    def _apply_size(self, disk: DiskSpec, size_bytes: int, *, shrink: bool) -> int:
        done = self._ask("disk-resize", disk=disk.id, size_bytes=size_bytes)
        with understood(self.name):
            return int(done["size_bytes"])

    def _apply_adapter_added(self, adapter: AdapterSpec, after: MachineSpec) -> None:
        self._ask("nic-add", adapter=adapter.model_dump(mode="json"), timeout_seconds=_ADAPTER_SECONDS)

    def _apply_adapter_removed(self, adapter: AdapterSpec) -> None:
        self._ask("nic-remove", adapter=adapter.id, timeout_seconds=_ADAPTER_SECONDS)

    def _apply_adapter_changed(self, adapter: AdapterSpec) -> None:
        self._ask("nic-set", adapter=adapter.model_dump(mode="json"), timeout_seconds=_ADAPTER_SECONDS)

    # -- snapshots and backups ---------------------------------------------------------------------------------------

    def take_snapshot(self, request: SnapshotRequest, progress: Progress | None = None) -> Snapshot:
        """Take a snapshot with memory, devices and disks of one moment. Raises as `MachineSnapshots.create`."""
        with goes_on_without_us("the snapshot", self.name):
            done = self._ask(
                "snapshot-create", progress, timeout_seconds=_MEMORY_SECONDS,
                name=request.name, notes=request.notes, consistent=request.consistent, mode=request.mode,
            )  # fmt: skip
        with understood(self.name):
            snapshot_id = str(done["id"])
        return load_tree(self.opened.paths).find(snapshot_id)

    @contextlib.contextmanager
    def held_tree(self) -> Iterator[Held]:
        """The tree, for changes, after an interrupted operation is settled: by the worker, as long as it exists.

        Raises InUse, what prevents settling, VmmError.
        """
        from vmm.snapshots.recovery import settle, settle_journal

        has_worker = True
        patience = looks(_SETTLE_SECONDS)
        while True:
            with holding(self.opened.paths, self.name) as held:
                if not has_worker:
                    settle(held)
                elif isinstance(held.tree.journal, Delete | MergeOff):  # of images that no guest uses
                    journal = held.take_over()
                    assert journal is not None
                    settle_journal(held, journal)
                if held.tree.journal is None:
                    yield held
                    return
            try:
                has_worker = worker_connection.has_settled(self.opened)
            except VmmError:  # it may be ending: then the rest is settled here
                if next(patience, True):
                    raise

    def merge_live(
        self,
        *,
        max_rate_bytes: int | None = None,
        wanted: Callable[[LayerMerge], bool] | None = None,
        progress: Progress | None = None,
    ) -> tuple[MergeResult, ...]:
        """Make the merges that are due; a failed one is in the result. Raises if one is cancelled."""
        from vmm.snapshots.dependents import drop_unneeded, possible_now
        from vmm.snapshots.steps import tidy
        from vmm.store import registry

        done: list[MergeResult] = []
        passed_over: set[str] = set()
        machine = self.opened
        if load_tree(machine.paths).kept:
            with self.held_tree() as held:
                drop_unneeded(held, machine)
        while (merge := _next_live(machine, passed_over, wanted)) is not None:
            part = possible_now(machine, merge)
            if part is None and wanted is not None:  # merged when it is off
                passed_over.add(merge.target)
                continue
            try:
                done.append(self._merge_one(machine, part or merge, max_rate_bytes, progress))
            except VmmError as error:
                if error.exit_code == EXIT_CANCELLED:
                    raise
                done.append(MergeResult(merge.target, problem=str(error)))
            passed_over.add(merge.target)
            machine = registry.load_for_change(machine.lock)
        if all(one.problem is None for one in done):  # otherwise this may wait until the failed merge is settled
            with self.held_tree() as held:
                tidy(held)
        return tuple(done)

    def _merge_one(
        self, machine: Changing, merge: LayerMerge, rate: int | None, progress: Progress | None
    ) -> MergeResult:  # fmt: skip
        """One merge: by the worker if it is part of a disk that is served, else by this process."""
        from vmm.snapshots import background_merge
        from vmm.snapshots.dependents import judge
        from vmm.snapshots.steps import chain_of
        from vmm.store import registry

        served = {path for disk in machine.spec.disks if disk.is_writable_image for path in chain_of(disk)}
        if os.path.realpath(merge.layers[0]) in served:
            done = self._ask(
                "snapshot-merge", progress, timeout_seconds=_MEMORY_SECONDS,
                target=merge.target, layers=list(merge.layers), max_rate_bytes=rate,
            )  # fmt: skip
            with understood(self.name):
                return MergeResult(
                    done["target"], done.get("passes"), done.get("held_seconds"), done.get("copied_bytes")
                )
        with self.held_tree() as held:
            if merge not in judge(registry.load_for_change(held), held.tree).merges:
                raise InUse("the snapshots have changed meanwhile", path=merge.target, hint="try again")
            background_merge.merge_files(held, merge, lambda done, total: None)
        return MergeResult(merge.target, passes=1, held_seconds=0.0)

    def merge_in_background(self) -> None:
        """Nothing: the images are in use, and its worker starts the merges when it ends."""

    def cancel_merge(self) -> bool:
        """Stop a live merge; False if none is in progress."""
        done = self._ask("snapshot-merge-cancel", timeout_seconds=ANSWER_SECONDS)
        with understood(self.name):
            return bool(done["cancelled"])

    def freeze_disks(self, night: NightToCome, *, consistent: bool = False) -> FrozenMachine:
        """Have the worker put new leaves on all disks at one moment. Raises Refused, AgentUnavailable, StoreFailed."""
        done = self._ask(
            "backup-freeze", timeout_seconds=_FREEZING_SECONDS, night=night.document(), consistent=consistent
        )
        with understood(self.name):
            return FrozenMachine("agent" if done["agent"] is True else "crash", float(done["pause_seconds"]))

    # -- the guest ---------------------------------------------------------------------------------------------------

    def need_guest(self) -> None:
        """Nothing: one is running."""

    def _ask_guest(self, method: str, *, timeout_seconds: float = ANSWER_SECONDS, **params: Any) -> Any:
        return self._ask(method, timeout_seconds=timeout_seconds, **params)

    def screen(self) -> bytes:
        """A picture of the screen, as PNG. Raises WrongState for a machine without a screen."""
        answer = self._ask_guest("screen")
        with understood(self.name):
            return base64.b64decode(answer["png"])

    def picture(self) -> Picture:
        """A picture that can be compared with others. Raises WrongState for a machine without a screen."""
        answer = self._ask_guest("screen", points=True)
        from vmm.kvm.picture import Picture

        with understood(self.name):
            return Picture.unpacked(answer["ppm"])

    def ping(self) -> Heartbeat:
        """The heartbeat, requested now. Raises AgentUnavailable, TimedOut."""
        answer = self._ask_guest("agent-ping")
        with understood(self.name):
            return Heartbeat(answer["state"], answer["seen_seconds_ago"])

    def guest_info(self) -> GuestInfo:
        """What the agent says now. Raises AgentUnavailable."""
        answer = self._ask_guest("agent-info")
        with understood(self.name):
            return GuestInfo.of_document(answer)

    def guest_summary(self) -> GuestInfo | None:
        """What the agent says, as last known if it does not answer quickly; None if the guest has none."""
        answer = self._ask("status", guest=True)
        with understood(self.name):
            return GuestInfo.of_document(answer["guest"]) if answer.get("guest") is not None else None

    def freeze(self, max_seconds: float) -> int:
        """Flush and freeze the guest's file systems; returns how many. They thaw by themselves after `max_seconds`."""
        answer = self._ask_guest("agent-freeze", max_seconds=max_seconds, timeout_seconds=_FREEZING_SECONDS)
        with understood(self.name):
            return int(answer["count"])

    def thaw(self) -> int:
        """Thaw them; returns how many. Raises TimedOut if they had to be thawed earlier."""
        answer = self._ask_guest("agent-thaw", timeout_seconds=_FREEZING_SECONDS)
        with understood(self.name):
            return int(answer["count"])

    def set_time(self) -> None:
        """Set the guest's clock to the host's."""
        self._ask_guest("agent-set-time")

    def items(self) -> dict[str, dict[str, str]]:
        """All items of both pools. Raises AgentUnavailable when the exchange is off."""
        answer = self._ask_guest("kvp-list")
        with understood(self.name):
            return {pool: dict(items) for pool, items in answer["items"].items()}

    def get_item(self, key: str, pool: str | None = None) -> ExchangedItem:
        """An item, from the guest's pool and then the host's unless one is named. Raises NotFound."""
        answer = self._ask_guest("kvp-get", key=key, pool=pool)
        with understood(self.name):
            return ExchangedItem(str(answer["value"]), str(answer["pool"]))

    def set_item(self, key: str, value: str) -> bool:
        """Set an item of the host's; True if the guest has accepted it already. Raises InvalidSpec."""
        answer = self._ask_guest("kvp-set", key=key, value=value)
        with understood(self.name):
            return bool(answer["taken"])

    def delete_item(self, key: str) -> bool:
        """Remove an item of the host's; True if the guest has received the deletion. Raises NotFound."""
        answer = self._ask_guest("kvp-delete", key=key)
        with understood(self.name):
            return bool(answer["taken"])


def _next_live(
    machine: Machine, passed_over: set[str], wanted: Callable[[LayerMerge], bool] | None
) -> LayerMerge | None:
    from vmm.snapshots.dependents import judge

    merges = [one for one in judge(machine, load_tree(machine.paths)).merges if one.target not in passed_over]
    return next((one for one in merges if wanted is None or wanted(one)), None)
