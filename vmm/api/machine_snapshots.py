# SPDX-License-Identifier: Apache-2.0
"""A machine's snapshots, as the library and the command line see them: every verb, in every state.

    snapshots = vmm.Manager().snapshots("web")
    before = snapshots.create("before the update")
    snapshots.apply(before.id, discard_current=True)

Decides which steps a verb has and what is refused beforehand. What a verb means for a machine that is off or runs
is decided in `stopped_machine` and `running_machine`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmm.api import machines
from vmm.api.machine import MergeResult
from vmm.model.errors import InvalidSpec, Refused, VmmError, WrongState
from vmm.model.folders import in_use, uses_own_folders
from vmm.processes import worker_connection
from vmm.processes.rpc import Progress
from vmm.processes.worker_connection import MachineRef
from vmm.snapshots import background_merge as fold
from vmm.snapshots.apply import Applied, apply
from vmm.snapshots.create import SnapshotRequest
from vmm.snapshots.delete import Deleted, hidden_images
from vmm.snapshots.dependents import images_of, judge
from vmm.snapshots.preflight import look_before_apply
from vmm.store import registry
from vmm.store.copies import refuse_copy
from vmm.store.snapshots.store import Merging, load_tree, read_merging
from vmm.store.snapshots.tree import Snapshot, Tree
from vmm.store.state import MachineState

if TYPE_CHECKING:
    from vmm.api.running_machine import RunningMachine
    from vmm.api.stopped_machine import StoppedMachine

MODES = ("background", "switchover", "stop")


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a snapshot takes up, in bytes on the file system."""

    disk_bytes: int
    memory_bytes: int


@uses_own_folders
class MachineSnapshots:
    """The snapshots of one machine."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.folders = in_use()

    # -- looking -------------------------------------------------------------------------------------------------

    def tree(self) -> Tree:
        """The tree of all snapshots. Raises NotFound for a machine that does not exist, VmmError."""
        return load_tree(worker_connection.look(self.name).paths)

    def find(self, word: str) -> Snapshot:
        """A snapshot by its name, its id, or the beginning of its id. Raises NotFound."""
        with self._named():
            return self.tree().find(word)

    def merging(self) -> Merging | None:
        """The merge in progress in the background, if any."""
        return read_merging(registry.load(self.name).paths)

    def merges_due(self) -> int:
        """How many merges wait for the machine to be off. Raises VmmError."""
        machine = worker_connection.look(self.name)
        return len(judge(machine, load_tree(machine.paths)).merges)

    def hidden(self) -> dict[str, str]:
        """Images that belong to no snapshot any more but stay, each with the reason. Raises VmmError."""
        return hidden_images(worker_connection.look(self.name))

    def kept_for_backups(self) -> dict[str, tuple[str, ...]]:
        """Images that are kept for the next backups, each with the folders of their repositories."""
        found: dict[str, tuple[str, ...]] = {}
        for one in self.tree().kept:
            found[one.image] = (*found.get(one.image, ()), one.folder)
        return found

    def sizes(self, snapshot: Snapshot) -> Sizes:
        """The sizes of the images that the snapshot froze, and of its memory."""
        disk = sum(_allocated(path) for path in snapshot.disks.values())
        memory = 0
        with contextlib.suppress(OSError), os.scandir(snapshot.folder) as entries:
            memory = sum(_allocated(entry.path) for entry in entries if entry.name.endswith(".bin"))
        return Sizes(disk, memory)

    def size_of_now(self) -> int:
        """What the present state has written since its snapshot, in bytes on the file system."""
        machine = worker_connection.look(self.name)
        return sum(_allocated(path) for path in images_of(machine.spec).values())

    # -- taking --------------------------------------------------------------------------------------------------

    def create(
        self,
        snapshot_name: str | None = None,
        *,
        notes: str = "",
        consistent: bool = False,
        mode: str | None = None,
        progress: Progress | None = None,
    ) -> Snapshot:
        """Take a snapshot of the machine, in any state.

        `consistent`: its agent freezes the guest's file systems meanwhile. `mode`: how memory is captured, one
        of `MODES`; None is the best that the host allows. Raises Refused, AlreadyExists, InvalidSpec, NoSpace,
        AgentUnavailable, WrongState, InUse, StoreFailed, QemuFailed; then no snapshot exists.
        """
        if mode is not None and mode not in MODES:
            raise InvalidSpec(f"unknown mode {mode!r}; the modes are {', '.join(MODES)}")
        with self._open() as machine:
            return machine.take_snapshot(SnapshotRequest(snapshot_name, notes, consistent, mode), progress)

    # -- going back ------------------------------------------------------------------------------------------------

    def apply(
        self,
        word: str,
        *,
        discard_current: bool = False,
        snapshot_current: str | bool = False,
        progress: Progress | None = None,
    ) -> Applied:
        """Return the machine to a snapshot. If it runs, it is switched off first.

        The present state is dropped (confirm this with `discard_current`), or kept as a snapshot first
        (`snapshot_current`: True, or its name). Raises NotFound, Refused, WrongState, InUse, NoSpace, StoreFailed.
        """
        refuse_copy(self.name)
        snapshot = self.find(word)
        if discard_current == bool(snapshot_current):
            raise Refused(
                "the present state would be lost",
                machine=self.name,
                hint="--discard-current drops it, --snapshot-current keeps it as a snapshot; choose one",
            )
        machine = worker_connection.look(self.name)
        look_before_apply(machine, load_tree(machine.paths), snapshot)  # before the guest is powered off
        if snapshot_current:
            self.create(snapshot_current if isinstance(snapshot_current, str) else None, progress=progress)
        with machines.reach(self.name) as reached:
            if reached.is_running:
                reached.stop(progress)
        with self._open() as opened:
            if opened.is_running:
                raise WrongState("was started again meanwhile", machine=self.name)
            applied = apply(opened.opened, snapshot.id)
        opened.merge_in_background()
        return applied

    # -- taking away -----------------------------------------------------------------------------------------------

    def delete(self, word: str, *, subtree: bool = False) -> Deleted:
        """Delete a snapshot, with `subtree` also its descendants, in any state of the machine. Raises NotFound.

        The merges that this needs are made while the machine is off: at once, in the background, if it is off now.
        """
        with self._open() as machine:
            deleted = machine.delete_snapshot(word, subtree=subtree)
        if deleted.tidied.merges:
            machine.merge_in_background()
        return deleted

    def forget_memory(self, word: str) -> Snapshot:
        """Keep a snapshot without its memory. Raises NotFound, WrongState."""
        with self._open(stop_merge=False) as machine:
            return machine.forget_memory(word)

    # -- merging ---------------------------------------------------------------------------------------------------

    def merge(self, *, progress: Progress | None = None) -> int:
        """Make the merges that are due for a machine that is off, and wait for them; returns how many were made.

        Raises WrongState while it runs or is saved, and the error that stopped a merge.
        """
        machine = registry.load(self.name)
        state = machines.status(MachineRef(machine.name, machine.paths, machine.runtime)).state
        if state != MachineState.OFF:
            raise WrongState(
                f"is {state}: its images are in use", machine=self.name,
                hint="merge when it is off, or while it runs with --live" if state == MachineState.RUNNING else None,
            )  # fmt: skip
        show = progress or (lambda document: None)

        def tell(merging: Merging) -> None:
            show({"step": "merging", "done": merging.done_bytes, "total": merging.total_bytes})

        fold.follow(machine.paths, tell)
        return fold.Fold(machine.paths, machine.runtime, tell=tell).run()

    def merge_live(
        self, *, max_rate_bytes: int | None = None, progress: Progress | None = None
    ) -> tuple[MergeResult, ...]:
        """Make the merges that are due while the machine runs; returns the result of each.

        `max_rate_bytes`: the limit per second. Raises WrongState if it does not run, InUse for a disk that grows
        faster than it is merged; what was merged by then stays merged.
        """
        with self._open() as machine:
            return machine.merge_live(max_rate_bytes=max_rate_bytes, progress=progress)

    def cancel_merge(self) -> bool:
        """Stop a merge, live or in the background; nothing is lost, and it can continue from there.

        Returns False if none is in progress.
        """
        with machines.reach(self.name) as machine:
            return machine.cancel_merge()

    # -- names -----------------------------------------------------------------------------------------------------

    def rename(self, word: str, name: str) -> None:
        """Rename a snapshot. Raises NotFound, AlreadyExists, InvalidSpec."""
        with self._open(stop_merge=False) as machine:
            machine.rename_snapshot(word, name)

    def annotate(self, word: str, notes: str) -> None:
        """Replace a snapshot's notes. Raises NotFound, InvalidSpec."""
        with self._open(stop_merge=False) as machine:
            machine.annotate_snapshot(word, notes)

    def set_limit(self, limit: int) -> None:
        """Limit the number of snapshots. Raises InvalidSpec."""
        with self._open(stop_merge=False) as machine:
            machine.limit_snapshots(limit)

    # -- small things ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _open(self, *, stop_merge: bool = True) -> Iterator[StoppedMachine | RunningMachine]:
        """The machine, locked against changes by other commands."""
        with self._named(), machines.open(self.name, stop_merge=stop_merge) as machine:
            yield machine

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Errors name the machine."""
        try:
            yield
        except VmmError as error:
            error.machine = error.machine or self.name
            raise


def _allocated(path: str) -> int:
    try:
        return os.stat(path).st_blocks * 512
    except OSError:
        return 0
