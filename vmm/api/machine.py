# SPDX-License-Identifier: Apache-2.0
"""One machine as every part of the library uses it: the same methods whether it is off, runs, or runs elsewhere.

    with machines.open("web") as machine:       its lock is held, and it is read after the lock was taken
        machine.add_disk(DiskRequest("/srv/data.vhd"))

`stopped_machine.StoppedMachine` changes the files; `running_machine.RunningMachine` asks the worker. Decides what can
be asked of a machine and in which types: requests and results are values without paths of sockets, processes or locks,
so they can go over a wire and a machine on another host can be a third implementation. A method that the machine's
state does not allow raises WrongState. Must not know how anything is done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from vmm.api.disk_request import DiskRequest
    from vmm.kvm.picture import Picture
    from vmm.model.guest import ExchangedItem, GuestInfo, Heartbeat
    from vmm.model.spec import AdapterSpec, DiskSpec, MachineSpec
    from vmm.processes.answers import MachineStatus
    from vmm.processes.rpc import Progress
    from vmm.snapshots.create import SnapshotRequest
    from vmm.snapshots.delete import Deleted
    from vmm.snapshots.freeze import NightToCome
    from vmm.store.snapshots.deletion_plan import LayerMerge
    from vmm.store.snapshots.tree import Snapshot


@dataclass(frozen=True, slots=True)
class FrozenMachine:
    """A machine whose disks were frozen for a night. `consistency`: what they are worth to a guest that starts from
    them, a word of `vhdkit.backups.Consistency`; `pause_seconds`: how long requests of a running guest waited.
    """

    consistency: str
    pause_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class MergeResult:
    """A merge while the machine ran: into which image, or why it could not be made now (`problem`).

    `held_seconds`: for how long the guest's writes were held at the end; `passes` over the image, `copied_bytes`.
    """

    target: str
    passes: int | None = None
    held_seconds: float | None = None
    copied_bytes: int | None = None
    problem: str | None = None


class Life(Protocol):
    """Switching off, pausing, saving. Each raises WrongState where the state does not allow it."""

    def shutdown(self, timeout_seconds: float, progress: Progress | None = None) -> None:
        """Have the guest shut itself down; returns when its processes have ended. Raises TimedOut."""

    def stop(self, progress: Progress | None = None) -> None:
        """Power off; returns when its processes have ended."""

    def save(self, progress: Progress | None = None) -> None:
        """Save memory and devices to disk, then switch off; returns when its processes have ended. Raises NoSpace."""

    def stop_with_host(self, progress: Progress | None = None) -> str:
        """Carry out the automatic stop action; returns what was done, in words."""

    def reset(self) -> None:
        """Press the reset button."""

    def pause(self) -> None:
        """Stop the processors."""

    def resume(self) -> None:
        """Continue after `pause`."""

    def discard_saved(self) -> None:
        """Discard the memory of a saved machine."""


class Hardware(Protocol):
    """Settings, disks, adapters. The machine was opened, not only reached."""

    def change_settings(self, settings: Mapping[str, Any]) -> bool:
        """Change settings of `model.settings.ChangedSettings`; True if some take effect only at the next start."""

    def add_disk(self, request: DiskRequest) -> DiskSpec:
        """Add a disk or drive. Raises InvalidSpec, NotFound, StoreFailed, InUse."""

    def remove_disk(self, disk: str) -> DiskSpec:
        """Remove a disk by its id, serial or path; the image stays. Raises NotFound, TimedOut."""

    def change_medium(self, drive: str, path: str | None, *, force: bool = False) -> DiskSpec:
        """Put another medium, or none, into a drive. Raises NotFound, InvalidSpec, Refused for a locked drive."""

    def resize_disk(self, disk: str, size_bytes: int, *, shrink: bool = False) -> int:
        """Resize a disk; returns its new size in bytes. Raises StoreFailed, InvalidSpec."""

    def add_adapter(self, settings: dict[str, Any]) -> AdapterSpec:
        """Add an adapter with these settings of `AdapterSpec`. Raises InvalidSpec, NotFound, AlreadyExists."""

    def remove_adapter(self, adapter: str) -> AdapterSpec:
        """Remove an adapter by its id or MAC address. Raises NotFound, TimedOut."""

    def change_adapter(self, adapter: str, settings: dict[str, Any]) -> AdapterSpec:
        """Change an adapter's settings. Raises NotFound, InvalidSpec."""


class Copies(Protocol):
    """Snapshots and backups."""

    def take_snapshot(self, request: SnapshotRequest, progress: Progress | None = None) -> Snapshot:
        """Take a snapshot. Raises as `MachineSnapshots.create`. The machine was opened."""

    def delete_snapshot(self, word: str, *, subtree: bool = False) -> Deleted:
        """Delete a snapshot; with `subtree` its descendants, too. Raises NotFound. The machine was opened."""

    def forget_memory(self, word: str) -> Snapshot:
        """Keep a snapshot without its memory. Raises NotFound. The machine was opened."""

    def rename_snapshot(self, word: str, name: str) -> None:
        """Rename a snapshot. Raises NotFound, AlreadyExists, InvalidSpec. The machine was opened."""

    def annotate_snapshot(self, word: str, notes: str) -> None:
        """Replace a snapshot's notes. Raises NotFound, InvalidSpec. The machine was opened."""

    def limit_snapshots(self, limit: int) -> None:
        """Limit the number of snapshots. Raises InvalidSpec. The machine was opened."""

    def merge_live(
        self,
        *,
        max_rate_bytes: int | None = None,
        wanted: Callable[[LayerMerge], bool] | None = None,
        progress: Progress | None = None,
    ) -> tuple[MergeResult, ...]:
        """Make the merges that are due, or those `wanted` among them, while the machine runs. It was opened."""

    def cancel_merge(self) -> bool:
        """Stop a merge; False if none is in progress."""

    def freeze_disks(self, night: NightToCome, *, consistent: bool = False) -> FrozenMachine:
        """Freeze all disks at one moment for a night, and keep the frozen layers. The machine was opened.

        `consistent`: refuse if file systems cannot be whole. Raises Refused, WrongState, AgentUnavailable,
        StoreFailed.
        """


class Guest(Protocol):
    """The inside of a machine. Methods that need a guest raise WrongState if none is running."""

    def need_guest(self) -> None:
        """Raise WrongState if no guest is running."""

    def screen(self) -> bytes:
        """A picture of the screen, as PNG."""

    def picture(self) -> Picture:
        """A picture of the screen that can be compared with others."""

    def ping(self) -> Heartbeat:
        """The heartbeat, requested now. Raises AgentUnavailable, TimedOut."""

    def guest_info(self) -> GuestInfo:
        """What the agent says now. Raises AgentUnavailable."""

    def guest_summary(self) -> GuestInfo | None:
        """The same, as last known if the guest does not answer quickly; None if it has no agent."""

    def freeze(self, max_seconds: float) -> int:
        """Flush and freeze the guest's file systems; returns how many."""

    def thaw(self) -> int:
        """Thaw them; returns how many. Raises TimedOut if they had to be thawed earlier."""

    def set_time(self) -> None:
        """Set the guest's clock to the host's."""

    def items(self) -> dict[str, dict[str, str]]:
        """All exchanged items, {pool: {key: value}}."""

    def get_item(self, key: str, pool: str | None = None) -> ExchangedItem:
        """An item. Raises NotFound."""

    def set_item(self, key: str, value: str) -> bool:
        """Set an item of the host's; True if the guest has accepted it. A machine that is off was opened."""

    def delete_item(self, key: str) -> bool:
        """Remove an item of the host's; True if the guest has received that. A machine that is off was opened."""


class OpenMachine(Life, Hardware, Copies, Guest, Protocol):
    """A machine for the length of a `with` block."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def is_running(self) -> bool:
        """True if it has a worker."""

    @property
    def spec(self) -> MachineSpec:
        """The definition, read after the lock was taken. The machine was opened."""

    def status(self) -> MachineStatus:
        """Its present status."""
