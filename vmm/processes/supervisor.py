# SPDX-License-Identifier: Apache-2.0
"""The supervisor of a running machine: a small process that keeps the disk server and the worker alive.

Decides when each of the two is restarted. The command that starts the machine starts the supervisor, which starts the
server (it takes longest) and the worker at once, and from then on only waits for one of them to end (pidfd). The
worker in turn watches the supervisor, so any one or two of the three may be killed. Processes that are found running
are taken over, not started again.

    command line --> supervisor --> vhdkit serve (the disks)    the supervisor holds the disks' listening socket, so
                       ^  `---> worker --> QEMU                 QEMU waits in the same queue for a new server
                       '--------- watches

A signal that asks the supervisor to end (the host stops, a login session ends) makes the machine carry out its
automatic stop action: the supervisor passes the signal on to the worker and keeps both processes alive until that is
done (`leaving`).

The supervisor ends last: when the worker has recorded that the machine is off, it ends the server (which flushes),
removes the runtime folder and releases its lock. Must not know what the worker does. Imports little, to stay small.
Files, logs, locks and events call it `keeper`, as vmm 0.1.0 did.

    python -m vmm.processes.supervisor MACHINE-FOLDER RUNTIME-FOLDER [READY-DESCRIPTOR]
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import sys
import time
from typing import Any

from vmm.host.proc import Lock, ProcessRef, python_command, python_environment, spawn_detached
from vmm.model.errors import NoSpace, StoreFailed, VmmError, hint_of_vhdkit, to_document
from vmm.model.events import add_event
from vmm.model.paths import MachinePaths, RuntimePaths, make_folders, write_whole
from vmm.store.known_images import known_images
from vmm.store.state import ENDING_SIGNALS, SERVER_END_SIGNAL, SupervisorNote, WorkerNote, WorkerPhase, mark_leaving

SHORT_LIFE_SECONDS = 5.0  # a process that lived less than this is restarted after a pause that grows each time
PAUSES_SECONDS = (0.0, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
SERVER_END_SECONDS = 60.0  # the server may have to flush to a slow disk
_TAIL_BYTES = 16 << 10
# The server expects its own pid in LISTEN_PID, which only the process itself knows. It ignores the signals that a host
# sends to all processes when it stops, because the guest is saved or shut down first. SIGINT ends it.
_ACTIVATE = 'trap "" TERM HUP; LISTEN_FDS=1 LISTEN_PID=$$ exec "$@"'


class _Kept:
    """A process that is kept alive: its identity, and when it may be started again."""

    def __init__(self, ref: ProcessRef | None) -> None:
        pidfd = None if ref is None else ref.open_pidfd()
        self.ref, self.pidfd = (None, -1) if pidfd is None else (ref, pidfd)
        self.started = time.monotonic()
        self.short_lives = 0
        self.not_before = 0.0

    def begun(self, pid: int) -> None:
        """Record that the process was started, as our child."""
        self.ref = ProcessRef.of(pid)
        self.pidfd = os.pidfd_open(pid)  # the pid of a child cannot be reused before waitpid
        self.started = time.monotonic()

    def ended(self) -> int | None:
        """Record that the process ended, and plan its restart; its exit status, or None if it was not our child."""
        status = None
        if self.ref is not None:
            with contextlib.suppress(ChildProcessError):
                _, raw = os.waitpid(self.ref.pid, 0)
                status = os.waitstatus_to_exitcode(raw)
        os.close(self.pidfd)
        self.ref, self.pidfd = None, -1
        now = time.monotonic()
        self.short_lives = self.short_lives + 1 if now - self.started < SHORT_LIFE_SECONDS else 0
        self.not_before = now + PAUSES_SECONDS[min(self.short_lives, len(PAUSES_SECONDS) - 1)]
        return status

    def is_due(self) -> bool:
        """True if the process should be started now."""
        return self.ref is None and time.monotonic() >= self.not_before


class Supervisor:
    """The supervisor of one machine."""

    def __init__(self, machine: MachinePaths, runtime: RuntimePaths, ready: int | None, lock: Lock) -> None:
        self._machine = machine
        self._runtime = runtime
        self._ready = ready
        self._lock = lock
        self._listener: socket.socket | None = None
        note = SupervisorNote.read(runtime) or SupervisorNote()
        worker = WorkerNote.read(runtime) if ready is None else None  # at the first start no worker exists yet
        self._is_first_start = note.server is None  # later on, a snapshot may have moved the leaf
        self._server = _Kept(note.server)
        self._worker = _Kept(worker.worker if worker is not None else note.worker)
        self._failure: dict[str, Any] | None = None
        self._is_given_up = False
        self._asked, asks = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)  # readable once a signal has arrived
        signal.set_wakeup_fd(asks)
        for number in ENDING_SIGNALS:
            signal.signal(number, lambda number, frame: None)

    def run(self) -> None:
        """Keep both processes alive until the machine is off, then remove everything."""
        if not self._lock.is_current():
            return  # another start has taken the folder
        self._note()
        while not self._is_over():
            if self._server.is_due() and not self._is_given_up:
                self._start_server()
            if self._worker.is_due():
                self._start_worker()
            self._wait()
        self._end_server()
        if self._worker.ref is not None:
            self._worker.ref.wait(SERVER_END_SECONDS)
        if self._lock.is_current():
            shutil.rmtree(self._runtime.folder, ignore_errors=True)

    def _is_over(self) -> bool:
        if self._worker.ref is not None:
            return False
        if not self._lock.is_current():
            return True
        note = WorkerNote.read(self._runtime)
        is_gone = not os.path.exists(self._runtime.running)  # without the definition nothing can be started again
        return is_gone or (note is not None and note.phase is WorkerPhase.ENDED)

    def _wait(self) -> None:
        """Wait until one of the processes ends, or is due to be started."""
        kept = [self._server, self._worker]
        poll = select.poll()
        for one in kept:
            if one.ref is not None:
                poll.register(one.pidfd, select.POLLIN)
        waiting = [
            one.not_before for one in kept if one.ref is None and not (one is self._server and self._is_given_up)
        ]
        timeout = None if not waiting else max(1, int((min(waiting) - time.monotonic()) * 1000) + 1)
        poll.register(self._asked, select.POLLIN)
        ready = {descriptor for descriptor, _ in poll.poll(timeout)}
        if self._asked in ready:
            self._pass_on_signal()
        if self._server.pidfd in ready:
            self._server_ended()
        if self._worker.pidfd in ready:
            self._worker.ended()
            if not self._is_over():
                add_event(self._machine.events, "worker-died")

    def _pass_on_signal(self) -> None:
        """Have the worker carry out the stop action; if it is dead, the mark makes the next worker do it."""
        os.read(self._asked, 1 << 10)
        mark_leaving(self._runtime)
        if self._worker.ref is not None:
            self._worker.ref.send(signal.SIGTERM)

    # -- the server ----------------------------------------------------------------------------------------------

    def _start_server(self) -> None:
        follow_leaf = not self._is_first_start  # a live snapshot or backup may have moved it since
        exports = {"exports": exports_of(self._runtime, follow_leaf=follow_leaf), "known_images": known_images()}
        path = os.path.join(self._runtime.folder, "exports.json")
        write_whole(path, json.dumps(exports).encode(), durable=False)
        make_folders(self._runtime.notes)
        if self._listener is None:
            self._listener = self._listen()
        serve = python_command(
            "vhdkit", "serve", "--exports", path, "--control", self._runtime.nbd_control, "--json",
            "--remember", self._runtime.notes,
        )  # fmt: skip
        pid = spawn_detached(
            ["/bin/sh", "-c", _ACTIVATE, "vhdkit", *serve],
            log_path=self._machine.log("disks"),
            environment=python_environment(),
            descriptors={3: self._listener.fileno()},
        )
        self._server.begun(pid)
        self._is_first_start = False
        self._note()

    def _listen(self) -> socket.socket:
        """Create the disks' socket. It belongs to the user that QEMU runs as, whose group id is the folder's group."""
        from vmm.host.private_socket import bind_private

        group = os.stat(self._runtime.folder).st_gid
        return bind_private(self._runtime.nbd, owner=(group, group) if os.geteuid() == 0 else None)

    def _server_ended(self) -> None:
        status = self._server.ended()
        note = WorkerNote.read(self._runtime)
        if note is not None and note.phase is WorkerPhase.ENDED:
            self._is_given_up = True  # the worker ended it on purpose
            return
        self._failure = last_error_in(self._machine.log("disks"), status)
        # A server that fails to start, for instance because an image is in use, would fail again.
        self._is_given_up = (note is None or note.phase is WorkerPhase.STARTING) and status is not None and status > 0
        if not self._is_given_up:  # otherwise the start fails with this error
            add_event(self._machine.events, "disk-server-died", problem=self._failure.get("message"))
        self._note()

    def _end_server(self) -> None:
        if self._server.ref is not None:
            self._server.ref.end(SERVER_END_SECONDS, SERVER_END_SIGNAL)

    # -- the worker ----------------------------------------------------------------------------------------------

    def _start_worker(self) -> None:
        arguments = [self._machine.folder, self._runtime.folder]
        descriptors = {}
        if self._ready is not None:
            arguments.append("3")
            descriptors[3] = self._ready
        pid = spawn_detached(
            python_command("vmm.worker.worker", *arguments),
            log_path=self._machine.log("worker"),
            environment=python_environment(),
            descriptors=descriptors,
        )
        if self._ready is not None:  # later workers report to no one
            os.close(self._ready)
            self._ready = None
        self._worker.begun(pid)
        self._note()

    def _note(self) -> None:
        with contextlib.suppress(VmmError):  # a full file system must not end the supervisor
            if not self._lock.is_current():
                return
            SupervisorNote(ProcessRef.of_self(), self._worker.ref, self._server.ref, self._failure).write(
                self._runtime
            )


def exports_of(runtime: RuntimePaths, *, follow_leaf: bool) -> list[dict[str, Any]]:
    """The exports for the disk server, from the definition that the machine runs with. Raises VmmError."""
    try:
        with open(runtime.running, "rb") as file:
            definition = json.load(file)
        disks = [disk for disk in definition["disks"] if disk["kind"] == "vhd"]
        # Not in `export_of`: while a machine runs, its server may be of an earlier version, which refuses the word.
        return [
            {**export_of(disk, follow_leaf=follow_leaf), "sector_bytes": disk.get("sector_bytes", 512)}
            for disk in disks
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VmmError("the machine's definition cannot be read", path=runtime.running) from error


def export_of(disk: dict[str, Any], *, follow_leaf: bool) -> dict[str, Any]:
    """A disk of a definition as an entry of the server's list of exports."""
    entry = {
        "name": disk["id"],
        "path": os.path.realpath(disk["path"]),
        "read_only": disk["read_only"],
        "follow_leaf": follow_leaf,
        "format": disk["format"],
        "parent_dirs": disk["parent_dirs"],
        "allow_raw_parent": disk["allow_raw_parent"],
    }
    if disk.get("cache", "writeback") != "writeback":  # a server of an earlier version would refuse the word
        entry["cache"] = disk["cache"]
    return entry


def last_error_in(log_path: str, status: int | None) -> dict[str, Any]:
    """The error that ended the server, as a document: what it wrote, otherwise one made from its exit status."""
    with contextlib.suppress(OSError, ValueError), open(log_path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL_BYTES))
        last = json.loads(file.read().strip().split(b"\n")[-1])
        if status is not None and status > 0 and isinstance(last.get("error"), dict):
            found = last["error"]
            error = StoreFailed(str(found.get("problem") or found.get("message")), path=found.get("path"),
                                hint=hint_of_vhdkit(found.get("hint")))  # fmt: skip
            return to_document(error) | {"exit_code": found.get("exit_code", error.exit_code)}
    if status == NoSpace.exit_code:  # there was no room even for the message
        return to_document(NoSpace("the disk server found no space left", path=log_path))
    if status is None:
        words = "ended"
    elif status < 0:
        words = f"was ended by {signal.Signals(-status).name}"
    else:
        words = f"ended with code {status}"
    return to_document(StoreFailed(f"the disk server {words}", path=log_path))


def main() -> None:
    """Entry point of the process."""
    machine, runtime = MachinePaths(sys.argv[1]), RuntimePaths(sys.argv[2])
    ready = int(sys.argv[3]) if len(sys.argv) > 3 else None
    if ready is not None:
        os.set_inheritable(ready, False)
    os.chdir("/")
    os.umask(0o077)
    if ready is None and WorkerNote.read(runtime) is None:
        return  # the machine's folder is gone, or another start has it
    lock = Lock(runtime.lock("keeper"))
    try:
        if lock.try_take():  # otherwise a supervisor is already running
            Supervisor(machine, runtime, ready, lock).run()
    except FileNotFoundError:
        return  # the folder is gone, and with it the machine


if __name__ == "__main__":
    main()
