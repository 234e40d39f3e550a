# SPDX-License-Identifier: Apache-2.0
"""How other processes reach a machine's worker: one that is listening, one to be started, or one to be replaced.

Decides whether a machine is running, and repairs what was killed: if QEMU is alive but unattended, it starts a
supervisor, which starts the rest; if no process is alive, it removes the remains. Imports little, because the command
line starts machines with it: it reads only the id from a definition and leaves the rest to the worker.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmm.host.proc import HeldLock, Lock, is_locked, machine_lock, python_command, python_environment, spawn_detached
from vmm.model.errors import (
    InUse,
    NotFound,
    QemuFailed,
    StoreFailed,
    TimedOut,
    VmmError,
    WrongState,
    from_document,
    of_os_error,
)
from vmm.model.events import add_event
from vmm.model.paths import (
    MachinePaths,
    RuntimePaths,
    is_id,
    machine_folder,
    make_folders,
    make_private,
    runtime_of,
    write_whole,
)
from vmm.model.waiting import LOOK_SECONDS, becomes, looks
from vmm.processes.answers import MachineStatus, Started, understood
from vmm.processes.rpc import ControlClient, Progress
from vmm.store import saved
from vmm.store.backup_note import has_note
from vmm.store.copies import AllIds, original_of, refuse_copy
from vmm.store.filling import source_of_disks
from vmm.store.snapshots.store import has_tree, holding, load_tree, machine_turn, read_merging
from vmm.store.state import MachineState, end_left, processes_of

if TYPE_CHECKING:
    from vmm.kvm.process import Identity
    from vmm.store.registry import Changing, Machine

COME_BACK_SECONDS = 20.0  # for a worker to be restarted
START_SECONDS = 120.0  # without any message from the worker
END_SECONDS = 60.0  # for all processes of the machine to end
STATUS_SECONDS = 10.0
_TRIES = 100
_MAX_DEFINITION_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class MachineRef:
    """What must be known of a machine to find its worker."""

    name: str
    machine: MachinePaths
    runtime: RuntimePaths

    @classmethod
    def of(cls, name: str) -> MachineRef:
        """Look the machine up by its name. Raises NotFound, InvalidSpec."""
        machine = MachinePaths(machine_folder(name))
        machine_id = _id_in(machine)
        if machine_id is None:
            from vmm.store.registry import load  # raises an error that names what is wrong with the definition

            machine_id = load(name).spec.id
        return cls(name, machine, runtime_of(machine_id))


def _id_in(machine: MachinePaths) -> str | None:
    """The id in a machine's definition; None if it has no valid one."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        with open(machine.definition, "rb") as file:
            machine_id = json.loads(file.read(_MAX_DEFINITION_BYTES))["id"]
        return machine_id if is_id(machine_id) else None
    return None


def contact(place: MachineRef, ids: AllIds | None = None, *, holds_lock: bool = False) -> ControlClient | None:
    """Connect to the machine's worker; None if the machine is not running. `ids`: all machines' ids, if already read.

    `holds_lock`: the caller holds the machine's lock, under which the remains of a dead machine are removed. Raises
    TimedOut if a lost worker does not come back, AccessDenied, Refused for a copy of another machine.
    """
    refuse_copy(place.name, ids)
    called = False
    for _ in looks(COME_BACK_SECONDS):
        with contextlib.suppress(NotFound):
            return ControlClient(place.runtime.control, machine=place.name)
        if not os.path.isdir(place.runtime.folder):
            return None
        if not is_looked_after(place.runtime):
            if "qemu" not in processes_of(place.runtime):
                if holds_lock:
                    _take_away_dead(place)
                elif _clean_up(place):
                    return None
            elif not called:
                called = True
                add_event(place.machine.events, "orphan-found")
                _spawn_supervisor(place)
    raise TimedOut(
        "its worker has not come back", machine=place.name, path=place.machine.log("worker"),
        hint=f"vmm logs {place.name}",
    )  # fmt: skip


def is_looked_after(runtime: RuntimePaths) -> bool:
    """True while a supervisor or a worker is alive."""
    return is_locked(runtime.lock("keeper")) or is_locked(runtime.lock("worker"))


def status_of(place: MachineRef, ids: AllIds | None = None, *, holds_lock: bool = False) -> MachineStatus:
    """The state of a machine, even one that is about to end. `ids`, `holds_lock` and errors as for `contact`."""
    for _ in range(_TRIES):
        # the running processes with this id belong to the original machine
        if original_of(place.name, ids) is not None:
            break
        client = contact(place, ids, holds_lock=holds_lock)
        if client is None:
            break
        try:
            with client:
                answer = client.call("status", timeout_seconds=STATUS_SECONDS)
        except TimedOut:
            raise
        except VmmError:
            time.sleep(LOOK_SECONDS)  # the worker just ended or was killed; attempts count here, as each may take long
            continue
        with understood(place.name):
            return MachineStatus.of_document(answer)
    else:
        raise TimedOut(
            "its worker ended at each attempt to query it", machine=place.name, hint=f"vmm logs {place.name}"
        )
    return MachineStatus(MachineState.SAVED if saved.is_saved(place.machine) else MachineState.OFF)


def _clean_up(place: MachineRef) -> bool:
    """Remove the remains of a machine without living processes. False if another command is working on the machine."""
    with contextlib.suppress(InUse), machine_lock(place.machine.folder, place.name, patience_seconds=0):
        _take_away_dead(place)
        return True
    return False


@contextlib.contextmanager
def changing(
    name: str, *, stop_merge: bool = True, settles: bool = True
) -> Iterator[tuple[Changing, ControlClient | None]]:
    """Hold the machine, so that no other command changes it during the block; with its worker if it is running.

    An interrupted operation on a machine that is not running is settled first (`settle_left`), unless `settles` is
    False.

    The definition is read last: after the lock was taken and after it is known whether the machine is running, because
    a worker changes the definition too. The remains of a dead machine are removed first. Raises as `registry.changing`
    and `contact`.
    """
    from vmm.store import registry

    with registry.changing(name) as machine:
        refuse_copy(name)
        place = MachineRef(machine.name, machine.paths, machine.runtime)
        client = contact(place, holds_lock=True)
        with client if client is not None else contextlib.nullcontext():
            if client is None and settles:
                settle_left(machine.lock, place.machine, stop_merge=stop_merge)
            yield registry.load_for_change(machine.lock), client


def has_settled(machine: Changing) -> bool:
    """Have the worker of a machine whose lock is held settle an interrupted operation; False if no worker is running.

    Raises as `contact`, and the error that prevents settling.
    """
    place = MachineRef(machine.name, machine.paths, machine.runtime)
    client = contact(place, holds_lock=True)
    if client is None:
        return False
    with client:
        client.call("snapshot-settle", timeout_seconds=None)
    return True


def settle_left(lock: HeldLock, machine: MachinePaths, *, stop_merge: bool = True) -> None:
    """Settle an interrupted operation on a machine that is not running and whose lock is held.

    A merge in the background is stopped for this, unless `stop_merge` is False: then it is left alone. Raises
    VmmError.
    """
    if not is_left(machine):
        return
    from vmm.snapshots.recovery import settle

    try:
        with holding(machine, lock.name, stop_merge=stop_merge) as held:
            settle(held)
    except InUse:
        if stop_merge or read_merging(machine) is None:
            raise


def is_left(machine: MachinePaths) -> bool:
    """True if an interrupted operation has to be settled. Raises VmmError."""
    return has_note(machine) or (has_tree(machine) and load_tree(machine).journal is not None)


def look(name: str) -> Machine:
    """Load a machine in order to inspect it and its disks; an operation that was interrupted is settled first.

    Nothing is settled while another command is working on the machine. Raises as `registry.load`, and the error that
    prevents settling.
    """
    from vmm.store import registry

    place = MachineRef.of(name)
    if is_left(place.machine) and original_of(name) is None and not _runs(place):
        with contextlib.suppress(InUse), machine_lock(place.machine.folder, name, patience_seconds=0) as lock:
            if not _runs(place):
                settle_left(lock, place.machine, stop_merge=False)
    return registry.load(name)


def _runs(place: MachineRef) -> bool:
    client = contact(place)
    with client if client is not None else contextlib.nullcontext():
        return client is not None


def _take_away_dead(place: MachineRef) -> None:
    """As `_clean_up`, with the machine's lock already held. Does nothing while a supervisor or worker is alive.

    Takes the locks of supervisor and worker meanwhile: a supervisor that a dying worker has just started finds them
    taken, or later a folder without notes, and ends.
    """
    locks = [Lock(place.runtime.lock(part)) for part in ("keeper", "worker")]
    try:
        taken = all(lock.try_take() for lock in locks)
    except OSError:
        taken = False  # the folder is gone
    try:
        if taken and "qemu" not in processes_of(place.runtime):
            end_left(place.runtime, END_SECONDS)
            saved.discard_part(place.machine)
            shutil.rmtree(place.runtime.folder, ignore_errors=True)
            add_event(place.machine.events, "found-dead")
    finally:
        for lock in locks:
            lock.release()


def _spawn_supervisor(place: MachineRef, ready: int | None = None) -> None:
    words = [place.machine.folder, place.runtime.folder]
    try:
        make_folders(place.machine.logs)
        spawn_detached(
            python_command("vmm.processes.supervisor", *words, *(() if ready is None else ("3",))),
            log_path=place.machine.log("keeper"),
            environment=python_environment(),
            descriptors={} if ready is None else {3: ready},
        )
    except OSError as error:
        raise of_os_error(error, "start the machine's supervisor", machine=place.name) from error


# -- starting -------------------------------------------------------------------------------------------------------


def start(name: str, *, discard_saved: bool = False, progress: Progress | None = None) -> Started:
    """Start a machine, with its saved memory if there is any; returns once it is running.

    Raises WrongState if it is already running, InUse while another command is working on it, and what prevents the
    start.
    """
    with machine_turn(machine_folder(name), name), contextlib.ExitStack() as stack:
        place = MachineRef.of(name)
        refuse_copy(name)
        _refuse_running(place)
        if has_tree(place.machine) or has_note(place.machine):
            held = stack.enter_context(holding(place.machine, name))  # until it runs, so its images are not merged
            if is_left(place.machine):
                from vmm.snapshots.recovery import settle

                settle(held)
        if discard_saved and saved.is_saved(place.machine):
            _look_before_discarding(place)
            saved.discard(place.machine)
            add_event(place.machine.events, "saved-state-discarded")
        saved.discard_part(place.machine)
        from vmm.kvm.process import identity_of  # not needed by those that only look

        make_runtime(place.runtime, identity_of(_id_of(place)))
        try:
            with open(place.machine.definition, "rb") as file:
                write_whole(place.runtime.running, file.read(_MAX_DEFINITION_BYTES), durable=False)
            reading, writing = os.pipe2(os.O_CLOEXEC)
        except OSError as error:
            raise of_os_error(error, "start the machine", machine=name) from error
        try:
            try:
                _spawn_supervisor(place, writing)
            finally:
                os.close(writing)
            return _wait_started(place, reading, progress)
        except StoreFailed as error:
            if (source := source_of_disks(place.machine)) is not None:
                error.hint = f"its disks are still filled from {source}: make that readable, and start it again"
            raise
        finally:
            os.close(reading)


def _look_before_discarding(place: MachineRef) -> None:
    """Check what would prevent the start, while the saved memory still exists. Raises VmmError."""
    from vmm.snapshots.preflight import look_before_discarding
    from vmm.store.registry import load_folder

    look_before_discarding(load_folder(place.machine.folder))


def _id_of(place: MachineRef) -> str:
    machine_id = _id_in(place.machine)
    if machine_id is not None:
        return machine_id
    raise NotFound("the machine's definition cannot be read", machine=place.name, path=place.machine.definition)


def _refuse_running(place: MachineRef) -> None:
    if not os.path.isdir(place.runtime.folder):
        return
    client = None
    if is_looked_after(place.runtime) or "qemu" in processes_of(place.runtime):
        client = contact(place, holds_lock=True)
    if client is not None:
        with client:
            state = client.call("status", timeout_seconds=5)["state"]
        raise WrongState(f"is already {state}", machine=place.name)
    end_left(place.runtime, END_SECONDS)


def _wait_started(place: MachineRef, reading: int, progress: Progress | None) -> Started:
    """Follow the worker's messages. If it reports an error, wait until everything is removed, then raise the error."""
    received = b""
    while True:
        if not select.select([reading], [], [], START_SECONDS)[0]:
            raise TimedOut(
                f"did not start within {START_SECONDS:g} s", machine=place.name, hint=f"vmm logs {place.name}"
            )
        piece = os.read(reading, 1 << 16)
        received += piece
        while b"\n" in received:
            line, _, received = received.partition(b"\n")
            document = json.loads(line)
            if "result" in document:
                with understood(place.name):
                    return Started.of_document(document["result"])
            if "error" in document:
                wait_put_away(place)
                error = from_document(document["error"])
                error.machine = error.machine or place.name
                raise error
            if progress is not None:
                progress(document["progress"])
        if not piece:
            return _after_all(place)


def _after_all(place: MachineRef) -> Started:
    """The worker was killed before it reported a result: the supervisor has started another, or everything is dead.

    The killed process may still be ending: its end of the pipe closes before its lock is released.
    """
    for _ in looks(START_SECONDS):
        found = status_of(place, holds_lock=True)
        if found.state is not MachineState.STARTING:
            break
    if found.state in (MachineState.OFF, MachineState.SAVED, MachineState.STARTING):
        raise QemuFailed(
            "its worker ended before the machine was running", machine=place.name, hint=f"vmm logs {place.name}"
        )  # fmt: skip
    return Started(found.state)


def wait_put_away(place: MachineRef) -> None:
    """Wait until nothing of the machine is left: no process, no lock, no socket. Raises TimedOut."""
    runtime = place.runtime
    if not becomes(lambda: not (os.path.isdir(runtime.folder) and is_locked(runtime.lock("keeper"))), END_SECONDS):
        raise TimedOut("processes of the machine are still running", machine=place.name, path=runtime.folder)


def make_runtime(runtime: RuntimePaths, identity: Identity | None) -> None:
    """Create the machine's runtime folder, empty. QEMU's user may pass through it, but not list it or write in it.

    Raises AccessDenied, NoSpace.
    """
    make_private(os.path.dirname(runtime.folder), mode=0o711 if identity is not None else 0o700)
    if os.path.lexists(runtime.folder):
        make_private(runtime.folder)  # a symbolic link or another user's folder is not emptied
        shutil.rmtree(runtime.folder, ignore_errors=True)
    make_private(runtime.folder)
    if identity is not None:
        try:
            os.chown(runtime.folder, 0, identity.user_id)
            os.chmod(runtime.folder, 0o710)
        except OSError as error:
            raise of_os_error(error, "give the folder to QEMU's group", path=runtime.folder) from error
