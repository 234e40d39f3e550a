# SPDX-License-Identifier: Apache-2.0
"""A machine's snapshot tree on disk: one file, one lock, and the note of the process that merges.

    MACHINE-FOLDER/snapshots.json        the tree and its journal (`tree`), replaced as a whole
                   .snapshots.lock       held (flock) by the process that changes it, for as long as that takes
                   merging.json          the process that merges, and its progress (`background_merge`)
    SNAPSHOTS/MACHINE-ID/SNAPSHOT-ID/    ID.json configuration, ID.bin memory, ID.vsv what the memory fits

Decides who may change a tree: one process at a time, which first stops a background merge; that continues later.
Light: starting a machine uses this.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmm.host.proc import HeldLock, Lock, ProcessRef, machine_lock
from vmm.model.errors import InUse, VmmError, of_os_error
from vmm.model.paths import MachinePaths, sync_folder, write_whole
from vmm.model.waiting import LOOK_SECONDS
from vmm.store.snapshots.tree import MAX_DOCUMENT_BYTES, Snapshot, Tree, read_tree

if TYPE_CHECKING:
    from vmm.store.snapshots.journal import Journal

MERGE_STOP_SECONDS = 60.0  # for a merge to release its lock; it checks for the request after each piece
BUSY_SECONDS = 1.0  # for another command to end
_MAX_NOTE_BYTES = 1 << 16


def tree_path(machine: MachinePaths) -> str:
    """The path of the tree."""
    return os.path.join(machine.folder, "snapshots.json")


def lock_path(machine: MachinePaths) -> str:
    """The path of the lock for changing the tree."""
    return os.path.join(machine.folder, ".snapshots.lock")


def has_tree(machine: MachinePaths) -> bool:
    """True if the machine has, or had, snapshots."""
    return os.path.exists(tree_path(machine))


def load_tree(machine: MachinePaths) -> Tree:
    """The stored tree, or an empty one. Raises VmmError, AccessDenied."""
    path = tree_path(machine)
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_DOCUMENT_BYTES + 1)
    except FileNotFoundError:
        return Tree()
    except OSError as error:
        raise of_os_error(error, "read the snapshots", path=path) from error
    tree = read_tree(content[:MAX_DOCUMENT_BYTES], path)
    tree.rename_users_images(os.path.realpath)  # 0.1.0 recorded links unresolved
    return tree


class Held(HeldLock):
    """A tree with its lock held, read after the lock was taken, and its journal, which has one owner.

    An operation begins, goes on, and is done; none can begin while another one's journal is pending. A caller that
    settles an interrupted operation takes it over first. Each of these methods writes the journal durably before it
    returns.
    """

    def __init__(self, machine: MachinePaths, name: str, tree: Tree) -> None:
        super().__init__(machine.folder, name)
        self.machine = machine
        self.tree = tree
        self._is_owner = False

    def save(self) -> None:
        """Write the tree with its present journal. Raises NoSpace, AccessDenied."""
        write_whole(tree_path(self.machine), self.tree.to_json())

    def begin(self, journal: Journal) -> None:
        """Begin an operation. Raises InUse while another one's journal is pending, NoSpace, AccessDenied."""
        self.need_settled()
        self._is_owner = True
        self._write(journal)

    def go_on(self, journal: Journal) -> None:
        """Move the operation that was begun, or taken over, to its next step. Raises NoSpace, AccessDenied."""
        self._need_owner()
        self._write(journal)

    def done(self) -> None:
        """End the operation that was begun, or taken over. Raises NoSpace, AccessDenied."""
        self._need_owner()
        self._write(None)
        self._is_owner = False

    def remove_empty(self) -> None:
        """Remove the stored tree if it is empty, as before the first operation. Raises AccessDenied."""
        if self.tree.to_json() != Tree().to_json():
            return
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(tree_path(self.machine))
            sync_folder(self.machine.folder)
        except OSError as error:
            raise of_os_error(error, "remove the empty tree of snapshots", path=tree_path(self.machine)) from error

    def take_over(self) -> Journal | None:
        """Take over the pending journal, which the caller must settle; None if there is none."""
        self._is_owner = self.tree.journal is not None
        return self.tree.journal

    def reload(self) -> None:
        """Read the stored tree again, dropping changes in memory. Raises VmmError."""
        self.tree = load_tree(self.machine)

    def find(self, word: str) -> Snapshot:
        """A snapshot, as `Tree.find`. Raises NotFound, which names the machine."""
        try:
            return self.tree.find(word)
        except VmmError as error:
            error.machine = self.name
            raise

    def need_settled(self) -> None:
        """Raise InUse while an interrupted operation's journal is pending: it must be settled first."""
        if self.tree.journal is not None:
            from vmm.store.snapshots.journal import words_of

            raise InUse(
                f"{words_of(self.tree.journal)} was interrupted and has not been settled yet",
                machine=self.name, hint=f"vmm repair {self.name} shows what is left, and settles it",
            )  # fmt: skip

    def _need_owner(self) -> None:
        if not self._is_owner:
            raise AssertionError("the journal belongs to another operation: begin a new one, or take this one over")

    def _write(self, journal: Journal | None) -> None:
        self.tree.journal = journal
        self.save()


@contextlib.contextmanager
def holding(machine: MachinePaths, name: str, *, stop_merge: bool = True) -> Iterator[Held]:
    """Lock the tree for changing; a background merge is stopped first. Raises InUse, VmmError."""
    lock = Lock(lock_path(machine))
    try:
        _take(lock, machine, name, stop_merge=stop_merge)
    except OSError as error:
        raise of_os_error(error, "lock the snapshots", machine=name, path=lock.path) from error
    held: Held | None = None
    try:
        yield (held := Held(machine, name, load_tree(machine)))
    finally:
        if held is not None:
            held.is_held = False
        lock.release()


@contextlib.contextmanager
def machine_turn(folder: str, name: str) -> Iterator[HeldLock]:
    """The machine's lock, for a command. As `machine_lock`, but if a background merge is in progress, waits for its
    short steps that hold the lock, such as recording the result. Raises InUse.
    """
    deadline = time.monotonic() + MERGE_STOP_SECONDS
    with contextlib.ExitStack() as stack:
        while True:
            merging = read_merging(MachinePaths(folder))
            try:
                held = stack.enter_context(machine_lock(folder, name, patience_seconds=BUSY_SECONDS))
                break
            except InUse:
                if merging is None or time.monotonic() > deadline:
                    raise
        yield held


def _take(lock: Lock, machine: MachinePaths, name: str, *, stop_merge: bool) -> None:
    asked: ProcessRef | None = None
    deadline = time.monotonic() + BUSY_SECONDS
    while not lock.try_take():
        merging = read_merging(machine)
        if merging is not None and stop_merge and merging.ref != asked:
            asked = merging.ref
            asked.send(signal.SIGTERM)
            deadline = time.monotonic() + MERGE_STOP_SECONDS
        if time.monotonic() > deadline:
            raise InUse(
                "another command is changing its snapshots" if merging is None else
                "its snapshots are being merged",
                machine=name, hint="wait for it to end; vmm snapshot tree shows what is in progress",
            )  # fmt: skip
        time.sleep(LOOK_SECONDS)  # the deadline moves when a merge is asked to stop


# -- the process that merges -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Merging:
    """A background merge: its process and its progress."""

    ref: ProcessRef
    target: str | None
    done_bytes: int
    total_bytes: int


def merging_path(machine: MachinePaths) -> str:
    """The path of the merging process's note."""
    return os.path.join(machine.folder, "merging.json")


def write_merging(machine: MachinePaths, merging: Merging) -> None:
    """Record the progress. Raises VmmError."""
    document = {
        "process": merging.ref.to_document(),
        "target": merging.target,
        "done_bytes": merging.done_bytes,
        "total_bytes": merging.total_bytes,
    }
    write_whole(merging_path(machine), json.dumps(document).encode() + b"\n", durable=False)


def read_merging(machine: MachinePaths) -> Merging | None:
    """The merge in progress; None if there is none.

    The note alone is not trusted, because its process is sent a signal: the process must have the tree's lock open.
    """
    try:
        with open(merging_path(machine), "rb") as file:
            document = json.loads(file.read(_MAX_NOTE_BYTES))
        ref, target = ProcessRef.from_document(document["process"]), document["target"]
        if ref is None or not (target is None or isinstance(target, str)) or not _has_open(ref, lock_path(machine)):
            return None
        return Merging(ref, target, int(document["done_bytes"]), int(document["total_bytes"]))
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError, VmmError):
        return None


def _has_open(ref: ProcessRef, path: str) -> bool:
    """True for a live process that has this very file open."""
    wanted = os.stat(path)
    folder = f"/proc/{ref.pid}/fd"
    for number in os.listdir(folder):
        with contextlib.suppress(OSError):  # closed meanwhile
            if os.path.samestat(os.stat(os.path.join(folder, number)), wanted):
                return ref.is_alive()
    return False
