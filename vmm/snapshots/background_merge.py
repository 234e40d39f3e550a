# SPDX-License-Identifier: Apache-2.0
"""Pending merges, done in a process of its own while the machine is off.

    python -m vmm.snapshots.background_merge MACHINE-FOLDER RUNTIME-FOLDER

It is started when the machine has been switched off, and after a snapshot of a machine that is off was deleted. A
command that needs the machine stops it (SIGTERM): it records what it has copied, and the next run continues from
there. If it is killed, it leaves the state of an interrupted `vhdkit.merge`, which the next run also completes. The
delete rule decides which merges are made.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator

import vhdkit
from vmm.host.proc import ProcessRef, is_locked, machine_lock, python_command, python_environment, spawn_detached
from vmm.model.errors import InUse, VmmError
from vmm.model.events import add_event
from vmm.model.paths import MachinePaths, RuntimePaths
from vmm.model.waiting import looks
from vmm.snapshots.dependents import judge
from vmm.snapshots.recovery import is_pending, settle
from vmm.snapshots.steps import begin_merge, finish_merge, options_to_change, store_problem, tidy
from vmm.store import registry, saved
from vmm.store.copies import refuse_copy
from vmm.store.images import guarded
from vmm.store.snapshots.deletion_plan import LayerMerge
from vmm.store.snapshots.journal import MergeOff
from vmm.store.snapshots.store import Held, Merging, holding, load_tree, merging_path, read_merging, write_merging
from vmm.store.state import processes_of

PUT_AWAY_SECONDS = 90.0  # for the remaining processes of a machine to end
LOCK_SECONDS = 30.0  # for another command to finish with the machine
_TELL_SECONDS = 0.25
_SHOW_SECONDS = 0.05  # a person watches, perhaps for hours

Progress = Callable[[Merging], None]


class _Stopped(Exception):
    """A command needs the machine."""


class Fold:
    """All pending merges of one machine."""

    def __init__(self, machine: MachinePaths, runtime: RuntimePaths, tell: Progress = lambda merging: None) -> None:
        self._tell = tell
        self._machine = machine
        self._runtime = runtime
        self._name = os.path.basename(machine.folder)
        self._told = 0.0
        self._target: str | None = None
        self.stop = False

    def run(self) -> int:
        """Merge until nothing is left to merge; returns the number of merges. Raises VmmError."""
        done = 0
        refuse_copy(self._name)
        with contextlib.suppress(_Stopped), contextlib.ExitStack() as stack:
            self._wait_off()
            # A process that starts the machine holds this lock until the machine runs.
            held = stack.enter_context(holding(self._machine, self._name, stop_merge=False))
            if self._is_there() or saved.is_saved(self._machine):
                return 0
            write_merging(self._machine, Merging(ProcessRef.of_self(), None, 0, 0))
            stack.callback(self._forget_note)
            if is_pending(held):
                with self._locked():
                    settle(held)
            while (merge := self._next(held)) is not None:
                self._merge(held, merge)
                done += 1
        return done

    def _forget_note(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(merging_path(self._machine))

    def _wait_off(self) -> None:
        for _ in looks(PUT_AWAY_SECONDS):
            if not self._is_there():
                return
            if self.stop:
                break
        raise _Stopped

    def _is_there(self) -> bool:
        """True while any process of the running machine is left."""
        return is_locked(self._runtime.lock("keeper")) or bool(processes_of(self._runtime))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """The machine's lock, once its holder releases it, unless that process asks us to stop."""
        with contextlib.ExitStack() as held:
            for _ in looks(LOCK_SECONDS):
                if self.stop:
                    raise _Stopped
                with contextlib.suppress(InUse):
                    held.enter_context(machine_lock(self._machine.folder, self._name, patience_seconds=0))
                    break
            else:
                raise _Stopped
            yield

    def _next(self, held: Held) -> LayerMerge | None:
        tidy(held)
        merges = judge(registry.load_for_change(held), held.tree).merges
        return merges[0] if merges else None

    def _merge(self, held: Held, merge: LayerMerge) -> None:
        self._target = merge.target
        try:
            self._progress(0, 0)
            merge_files(held, merge, self._progress, locked=self._locked)
        except vhdkit.Cancelled as error:
            raise _Stopped from error
        except VmmError as error:
            add_event(self._machine.events, "merge-failed", problem=str(error))
            raise
        add_event(self._machine.events, "snapshots-merged", into=merge.target, layers=list(merge.layers))

    def _progress(self, done_bytes: int, total_bytes: int) -> None:
        if self.stop:
            raise vhdkit.Cancelled("the merge was stopped")
        now = time.monotonic()
        if now - self._told >= _TELL_SECONDS:
            self._told = now
            merging = Merging(ProcessRef.of_self(), self._target, done_bytes, total_bytes)
            self._tell(merging)
            with contextlib.suppress(VmmError):
                write_merging(self._machine, merging)


def merge_files(
    held: Held,
    merge: LayerMerge,
    progress: Callable[[int, int], None],
    *,
    locked: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> None:
    """Merge images that no process uses. Raises StoreFailed, InUse, and vhdkit.Cancelled if `progress` raises it.

    `locked` is held while the machine's definition is changed.
    """
    begin_merge(held, MergeOff(merge.target, merge.layers))
    options = guarded(options_to_change(registry.load_for_change(held)))
    try:
        vhdkit.merge(merge.layers[0], into=merge.target, relink_children=True, options=options, progress=progress)
    except vhdkit.Cancelled:
        raise
    except vhdkit.VhdkitError as error:
        raise store_problem(error, "merge") from error
    with locked():
        finish_merge(held, merge.target, merge.layers)


def spawn(machine: MachinePaths, runtime: RuntimePaths) -> int | None:
    """Start the pending merges in the background, if the tree has images; returns the pid. Raises OSError."""
    tree = load_tree(machine)
    if not tree.images and tree.journal is None:
        return None
    return spawn_detached(
        python_command("vmm.snapshots.background_merge", machine.folder, runtime.folder),
        log_path=machine.log("merge"),
        environment=python_environment(),
    )


def follow(machine: MachinePaths, progress: Progress) -> None:
    """Report progress until no process merges any more."""
    for _ in looks(every_seconds=_SHOW_SECONDS):
        if (merging := read_merging(machine)) is None:
            return
        progress(merging)


def main() -> None:
    """Entry point of the process."""
    fold = Fold(MachinePaths(sys.argv[1]), RuntimePaths(sys.argv[2]))

    def ask_to_stop(number: int, frame: object) -> None:
        fold.stop = True

    signal.signal(signal.SIGTERM, ask_to_stop)
    os.chdir("/")
    os.umask(0o077)
    try:
        fold.run()
    except VmmError as error:
        os.write(2, f"{error}\n".encode())


if __name__ == "__main__":
    main()
