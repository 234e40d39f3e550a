# SPDX-License-Identifier: Apache-2.0
"""Snapshots of a machine, as the library and the command line see them: every verb, in every state.

    snapshots = vmm.Manager().snapshots("web")
    before = snapshots.create("before the update")
    snapshots.apply(before.id, discard_current=True)

Decides which verbs concern files and which the machine's worker, and what is refused before anything is done.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vmm.model.errors import InUse, InvalidSpec, Refused, VmmError, WrongState, of_os_error
from vmm.model.interrupted import goes_on_without_us
from vmm.processes import worker_connection as contact
from vmm.processes.rpc import ControlClient, Progress
from vmm.processes.worker_connection import Place
from vmm.snapshots import background_merge as fold
from vmm.snapshots.apply import Applied, apply
from vmm.snapshots.create import Wish, create
from vmm.snapshots.delete import Deleted, delete, forget_memory, hidden_images
from vmm.snapshots.dependents import images_of, judge
from vmm.snapshots.preflight import look_before_apply
from vmm.snapshots.recovery import settle, settle_journal
from vmm.snapshots.steps import chain_of, tidy
from vmm.store import registry, saved
from vmm.store.copies import refuse_copy
from vmm.store.registry import Changing, Machine
from vmm.store.snapshots.deletion_plan import Merge
from vmm.store.snapshots.journal import Delete, MergeOff
from vmm.store.snapshots.store import Held, Merging, holding, load_tree, read_merging
from vmm.store.snapshots.tree import MAX_LIMIT, Snapshot, Tree
from vmm.store.state import MachineState

EXIT_CANCELLED = 130  # of vhdkit, when somebody cancels
_LOOK_SECONDS = 0.05
_SETTLE_SECONDS = 60.0  # for another operation on the running machine to end
_PATIENCE_SECONDS = 600.0  # between two signs of life of the worker: a guest's memory goes to a slow disk
MODES = ("background", "switchover", "stop")


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a snapshot takes up, in bytes on the file system."""

    disk_bytes: int
    memory_bytes: int


class MachineSnapshots:
    """The snapshots of one machine."""

    def __init__(self, name: str) -> None:
        self.name = name

    # -- looking -------------------------------------------------------------------------------------------------

    def tree(self) -> Tree:
        """The tree of all snapshots. Raises NotFound for a machine that does not exist, VmmError."""
        return load_tree(contact.look(self.name).paths)

    def find(self, word: str) -> Snapshot:
        """One by its name, its id, or the beginning of its id. Raises NotFound."""
        with self._named():
            return self.tree().find(word)

    def merging(self) -> Merging | None:
        """The merge in progress in the background, if any."""
        return read_merging(registry.load(self.name).paths)

    def merges_due(self) -> int:
        """How many merges wait for the machine to be off. Raises VmmError."""
        machine = contact.look(self.name)
        return len(judge(machine, load_tree(machine.paths)).merges)

    def hidden(self) -> dict[str, str]:
        """Images that belong to no snapshot any more but stay, each with the reason. Raises VmmError."""
        return hidden_images(contact.look(self.name))

    def sizes(self, snapshot: Snapshot) -> Sizes:
        """The sizes of the images that it froze, and of its memory."""
        disk = sum(_allocated(path) for path in snapshot.disks.values())
        memory = 0
        with contextlib.suppress(OSError), os.scandir(snapshot.folder) as entries:
            memory = sum(_allocated(entry.path) for entry in entries if entry.name.endswith(".bin"))
        return Sizes(disk, memory)

    def size_of_now(self) -> int:
        """What the present state has written since its snapshot, in bytes on the file system."""
        machine = contact.look(self.name)
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
        """Take a snapshot of the machine in whatever state it is.

        `consistent`: its agent freezes the guest's file systems meanwhile. `mode`: how memory is captured, one
        of `MODES`; None is the best that the host allows. Raises Refused, AlreadyExists, InvalidSpec, NoSpace,
        AgentUnavailable, WrongState, InUse, StoreFailed, QemuFailed; then there is no snapshot.
        """
        if mode is not None and mode not in MODES:
            raise InvalidSpec(f"there is no mode {mode!r}; there are {', '.join(MODES)}")
        with self._changing() as (machine, client):
            if client is None:
                if consistent:
                    raise WrongState("does not run: nothing can be frozen in it, and nothing needs to be")
                return create(machine, Wish(snapshot_name, notes))
            with goes_on_without_us("the snapshot", self.name):
                done = client.call(
                    "snapshot-create", timeout_seconds=_PATIENCE_SECONDS, progress=progress,
                    name=snapshot_name, notes=notes, consistent=consistent, mode=mode,
                )  # fmt: skip
            return load_tree(machine.paths).find(str(done["id"]))

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
                hint="--discard-current drops it, --snapshot-current keeps it as a snapshot; say one of them",
            )
        machine = contact.look(self.name)
        look_before_apply(machine, load_tree(machine.paths), snapshot)  # before the guest is powered off
        if snapshot_current:
            self.create(snapshot_current if isinstance(snapshot_current, str) else None, progress=progress)
        self._stop(progress)
        with self._changing() as (machine, client):
            if client is not None:
                raise WrongState("was started again meanwhile", machine=self.name)
            applied = apply(machine, snapshot.id)
        self._merge_in_background()
        return applied

    def _stop(self, progress: Progress | None) -> None:
        place = Place.of(self.name)
        client = contact.contact(place)
        if client is not None:
            with client:
                client.call("stop", timeout_seconds=_PATIENCE_SECONDS, progress=progress)
            contact.wait_put_away(place)

    # -- taking away -----------------------------------------------------------------------------------------------

    def delete(self, word: str, *, subtree: bool = False) -> Deleted:
        """Delete one, with `subtree` also all that descend from it, in any state of the machine. Raises NotFound.

        The merges that this needs are made when the machine is off: at once, in the background, if it is.
        """
        with self._changing() as (machine, client), self._holding(machine, client) as held:
            deleted = delete(held, word, subtree=subtree)
        if deleted.tidied.merges and client is None:
            self._merge_in_background()
        return deleted

    def forget_memory(self, word: str) -> Snapshot:
        """Keep a snapshot without its memory. Raises NotFound, WrongState."""
        with self._changing_tree() as held:
            return forget_memory(held, word)

    def _merge_in_background(self) -> None:
        machine = registry.load(self.name)
        if saved.is_saved(machine.paths):
            return
        try:
            pid = fold.spawn(machine.paths, machine.runtime)
        except OSError as error:
            raise of_os_error(error, "start merging", machine=self.name) from error
        if pid is not None:
            _reap_later(pid)

    # -- merging ---------------------------------------------------------------------------------------------------

    def merge(self, *, progress: Progress | None = None) -> int:
        """Make the merges that are due for a machine that is off, and wait for them; returns how many were made.

        Raises WrongState while it runs or is saved, and what stopped them.
        """
        machine = registry.load(self.name)
        place = Place(machine.name, machine.paths, machine.runtime)
        state = contact.state_of(place)["state"]
        if state != MachineState.OFF:
            raise WrongState(
                f"is {state}: its images are in use", machine=self.name,
                hint="merge when it is off, or while it runs with --live" if state == MachineState.RUNNING else None,
            )  # fmt: skip
        told = progress or (lambda document: None)

        def tell(merging: Merging) -> None:
            told({"step": "merging", "done": merging.done_bytes, "total": merging.total_bytes})

        fold.follow(machine.paths, tell)
        return fold.Fold(machine.paths, machine.runtime, tell=tell).run()

    def merge_live(
        self, *, max_rate_bytes: int | None = None, progress: Progress | None = None
    ) -> list[dict[str, Any]]:
        """Make the merges that are due while the machine runs; returns the result of each.

        `max_rate_bytes`: the limit per second. Raises WrongState if it does not run, InUse for a disk that grows
        faster than it is merged; what was merged by then stays merged.
        """
        done = []
        with self._changing() as (machine, client):
            if client is None:
                raise WrongState("does not run", hint=f"without --live: vmm snapshot merge {self.name}")
            passed_over: set[str] = set()
            while (merge := self._next_live(machine, passed_over)) is not None:
                try:
                    done.append(self._merge_one(machine, client, merge, max_rate_bytes, progress))
                except VmmError as error:
                    if error.exit_code == EXIT_CANCELLED:
                        raise
                    done.append({"target": merge.target, "problem": str(error)})
                passed_over.add(merge.target)
                machine = registry.load_for_change(machine.lock)
            if not any("problem" in one for one in done):  # else it may wait for what failed to be settled
                with self._holding(machine, client) as held:
                    tidy(held)
        return done

    def _next_live(self, machine: Machine, passed_over: set[str]) -> Merge | None:
        merges = judge(machine, load_tree(machine.paths)).merges
        return next((one for one in merges if one.target not in passed_over), None)

    def _merge_one(
        self, machine: Changing, client: ControlClient, merge: Merge, rate: int | None, progress: Progress | None
    ) -> dict[str, Any]:
        """One merge: by the worker where it is part of a disk that is served, else by ourselves."""
        served = {path for disk in machine.spec.disks if disk.is_writable_image for path in chain_of(disk)}
        if os.path.realpath(merge.layers[0]) in served:
            result: dict[str, Any] = client.call(
                "snapshot-merge", timeout_seconds=_PATIENCE_SECONDS, progress=progress,
                target=merge.target, layers=list(merge.layers), max_rate_bytes=rate,
            )  # fmt: skip
            return result
        with self._holding(machine, client) as held:
            if merge not in judge(registry.load_for_change(held), held.tree).merges:
                raise InUse("the snapshots have changed meanwhile", path=merge.target, hint="try again")
            fold.merge_files(held, merge, lambda done, total: None)
        return {"target": merge.target, "passes": 1, "held_seconds": 0.0}

    def cancel_merge(self) -> bool:
        """Stop a merge, live or in the background; nothing is lost, and it can continue from there.

        False: there is none.
        """
        place = Place.of(self.name)
        client = contact.contact(place)
        if client is not None:
            with client:
                return bool(client.call("snapshot-merge-cancel")["cancelled"])
        if read_merging(place.machine) is None:
            return False
        with holding(place.machine, self.name):
            return True

    # -- names -----------------------------------------------------------------------------------------------------

    def rename(self, word: str, name: str) -> None:
        """Give one another name. Raises NotFound, AlreadyExists, InvalidSpec."""
        with self._changing_tree() as held:
            held.tree.rename(held.find(word), name)
            held.save()

    def annotate(self, word: str, notes: str) -> None:
        """Give one other notes. Raises NotFound, InvalidSpec."""
        with self._changing_tree() as held:
            held.tree.annotate(held.find(word), notes)
            held.save()

    def set_limit(self, limit: int) -> None:
        """Set how many the machine may have. Raises InvalidSpec."""
        if not 1 <= limit <= MAX_LIMIT:
            raise InvalidSpec(f"a machine may have 1 to {MAX_LIMIT} snapshots")
        with self._changing_tree() as held:
            held.tree.limit = limit
            held.save()

    # -- small things ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _changing(self, *, stop_merge: bool = True) -> Iterator[tuple[Changing, ControlClient | None]]:
        """The machine, which nobody else changes meanwhile, and its worker where it runs."""
        with self._named(), contact.changing(self.name, stop_merge=stop_merge) as (machine, client):
            yield machine, client

    @contextlib.contextmanager
    def _changing_tree(self) -> Iterator[Held]:
        """The tree, for a change of a moment, whatever the machine does. A merge in the background gives way for it,
        and goes on afterwards.
        """
        with self._changing(stop_merge=False) as (machine, client):
            merging = read_merging(machine.paths)
            try:
                with self._holding(machine, client) as held:
                    yield held
            finally:
                if merging is not None and client is None and read_merging(machine.paths) is None:
                    self._merge_in_background()

    @contextlib.contextmanager
    def _holding(self, machine: Changing, client: ControlClient | None) -> Iterator[Held]:
        """The tree, for changing, with nothing left to settle: that is done first, by the machine's worker where it
        runs. Raises InUse, what stands in the way of settling, VmmError.
        """
        runs = client is not None
        deadline = time.monotonic() + _SETTLE_SECONDS
        while True:
            with holding(machine.paths, self.name) as held:
                if not runs:
                    settle(held)
                elif isinstance(held.tree.journal, Delete | MergeOff):  # of what no guest uses
                    journal = held.take_over()
                    assert journal is not None
                    settle_journal(held, journal)
                if held.tree.journal is None:
                    yield held
                    return
            try:
                runs = contact.has_settled(machine)
            except VmmError:  # it may be about to end: what is left then is ours to settle
                if time.monotonic() > deadline:
                    raise
                time.sleep(_LOOK_SECONDS)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Errors say which machine they are about."""
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


def _reap_later(pid: int) -> None:
    """A child that outlives us is init's; one that does not must not stay a zombie of a long-lived program."""
    import threading

    def wait() -> None:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)

    threading.Thread(target=wait, name="vmm-merge", daemon=True).start()
