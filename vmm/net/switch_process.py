# SPDX-License-Identifier: Apache-2.0
"""Starting and finding the process of a `user` switch, and sending it requests.

Decides that each switch has at most one process (by a lock that it inherits and that the kernel releases when it
dies), that a request starts a switch that does not run, and what its answers mean. Synchronous and bounded: every
request has a time-out. Must not know what the switch does with frames.

    runtime/sw-FIRST-12-OF-ID/   control.sock  ports.json  switch.log  switch.lock  start.lock
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vhdkit import jsonrpc
from vmm.host import proc
from vmm.model import errors, paths
from vmm.model.waiting import becomes, looks
from vmm.net import ports, records
from vmm.net.switch_control import MAX_ANSWER_BYTES

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 10.0
GRACE_SECONDS = 4.0  # to answer and to end; the switch is being deleted, so what a kill loses is not needed
_LOCK, _START_LOCK, _CONTROL, _LOG, _PID = "switch.lock", "start.lock", "control.sock", "switch.log", "pid"
_MODULE = "vmm.net.user_switch"
_PIECE_BYTES = 1 << 16
_PID_BYTES = 64
_KILLED_SECONDS = 30.0  # a busy host is slow to clean up a killed process


@dataclass(frozen=True, slots=True)
class SwitchProcess:
    """The switch process of one switch."""

    folder: str
    name: str

    @classmethod
    def of(cls, switch_id: str, name: str) -> SwitchProcess:
        """The process of the switch with that id. Raises InvalidSpec if the paths of its sockets would be too long."""
        folder = os.path.join(paths.runtime_home(), "sw-" + switch_id.replace("-", "")[: paths.RUNTIME_ID_CHARACTERS])
        if len(os.fsencode(os.path.join(folder, "gateway", "port.sock"))) > paths.MAX_SOCKET_PATH_BYTES:
            raise errors.InvalidSpec(
                f"is too long for sockets, whose names have at most {paths.MAX_SOCKET_PATH_BYTES} bytes",
                path=paths.runtime_home(),
                hint="set VMM_RUNTIME to a shorter folder",
            )
        return cls(folder, name)

    # -- the process --------------------------------------------------------------------------------------------

    def is_running(self) -> bool:
        """True while its process lives."""
        return proc.is_locked(os.path.join(self.folder, _LOCK))

    def end_descriptor(self) -> int | None:
        """A descriptor that becomes readable when the process that runs now ends; None if none runs.

        Also None while it is starting, and if the kernel or its limits provide no such descriptor.
        """
        try:
            descriptor = os.pidfd_open(int(records.read_bytes(os.path.join(self.folder, _PID), _PID_BYTES)))
        except (OSError, ValueError, OverflowError):
            return None
        if self.is_running():
            return descriptor
        os.close(descriptor)
        return None

    def ensure_running(self) -> bool:
        """Start the process unless it runs; True if it had to be started. Raises VmmError."""
        if self.is_running():
            return False
        paths.make_private(self.folder)
        with self._starting():
            if self.is_running():
                return False
            self._spawn()
        return True

    @contextlib.contextmanager
    def _starting(self) -> Iterator[None]:
        with proc.locked(os.path.join(self.folder, _START_LOCK)):
            yield

    def _spawn(self) -> None:
        """Start the process. The control socket listens before the process runs, so the first client only waits."""
        lock = self._lock()
        try:
            listener = self._listener()
            command = proc.python_command(_MODULE, self.folder, self.name, "3")
            with listener:
                proc.spawn_detached(
                    command,
                    log_path=os.path.join(self.folder, _LOG),
                    environment=proc.python_environment(),
                    descriptors={3: listener.fileno(), 4: lock},
                )
        except OSError as error:
            raise errors.of_os_error(error, "start the switch", path=self.folder) from error
        finally:
            os.close(lock)  # the process has it too, and keeps it

    def _lock(self) -> int:
        """The lock that shows that it runs. A process that only checks holds it for a moment, so this tries
        repeatedly.
        """
        path = os.path.join(self.folder, _LOCK)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise errors.of_os_error(error, "lock the switch", path=path) from error
        for _ in looks(CONNECT_SECONDS):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return descriptor
        os.close(descriptor)
        raise errors.InUse(f"switch {self.name} is being started by another process")

    def _listener(self) -> socket.socket:
        address = os.path.join(self.folder, _CONTROL)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(address)
            listener.bind(address)  # no other user can enter its folder
            os.chmod(address, 0o600)
            listener.listen(16)
        except OSError as error:
            listener.close()
            raise errors.of_os_error(error, "listen", path=address) from error
        return listener

    def stop(self) -> None:
        """End the process, if it runs, and forget its ports. A process that does not end on request is killed."""
        deadline = time.monotonic() + GRACE_SECONDS
        with contextlib.suppress(errors.VmmError):
            if self.is_running():
                self._ask("stop", {}, GRACE_SECONDS)
        if not self._has_ended(deadline - time.monotonic()):
            for ref in self._processes():
                with contextlib.suppress(PermissionError):
                    ref.kill()
        if not self._has_ended(_KILLED_SECONDS):
            raise errors.TimedOut(f"switch {self.name} did not end", hint=f"see {self.folder}/{_LOG}")
        shutil.rmtree(self.folder, ignore_errors=True)

    def _processes(self) -> list[proc.ProcessRef]:
        """The switch's process and its starter, found by their command lines, even before they have reported their
        pids.
        """
        sign = [_MODULE, self.folder]
        pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
        words = ((pid, proc.command_words(pid)) for pid in pids)
        found = [pid for pid, said in words if sign in ([*pair] for pair in itertools.pairwise(said))]
        return [ref for pid in found if (ref := proc.ProcessRef.of(pid)) is not None]

    def _has_ended(self, timeout_seconds: float) -> bool:
        return becomes(lambda: not self.is_running(), timeout_seconds)

    # -- asking -------------------------------------------------------------------------------------------------

    def ask(self, method: str, **params: object) -> Any:
        """One request to the running switch. Raises WrongState if it does not run, TimedOut, and the error that it
        answers.
        """
        return self._ask(method, params)

    def _ask(self, method: str, params: dict[str, object], answer_seconds: float | None = None) -> Any:
        with self._connected(answer_seconds) as sock:
            return _exchange(sock, self.name, method, params, piece_bytes=_PIECE_BYTES)

    @contextlib.contextmanager
    def _connected(self, answer_seconds: float | None = None) -> Iterator[socket.socket]:
        address = os.path.join(self.folder, _CONTROL)
        answer_seconds = ANSWER_SECONDS if answer_seconds is None else answer_seconds
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(min(CONNECT_SECONDS, answer_seconds))
            try:
                sock.connect(address)
            except (FileNotFoundError, ConnectionError) as error:
                raise errors.WrongState(f"switch {self.name} does not run") from error
            except OSError as error:
                raise errors.of_os_error(error, f"reach switch {self.name}", path=address) from error
            sock.settimeout(answer_seconds)
            yield sock

    def ensure(self, method: str, **params: object) -> Any:
        """As `ask`, but starts the switch first if it does not run, even if it is just ending."""
        for _ in range(3):
            self.ensure_running()
            try:
                return self.ask(method, **params)
            except errors.WrongState:
                self._wait_for_end()
        raise errors.VmmError(f"switch {self.name} keeps ending", hint=f"see {self.folder}/{_LOG}")

    def _wait_for_end(self) -> None:
        """After it disconnected: wait a moment until its lock is released."""
        self._has_ended(1.0)

    def plug(self, setup: ports.PortSetup) -> bool:
        """Add or change a port; True if its other side is already connected. Raises VmmError."""
        answer = self.ensure("add_port", **ports.to_document(setup))
        return bool(answer["connected"])

    def unplug(self, port: str) -> None:
        """Remove a port; succeeds if it does not exist or the switch does not run."""
        with contextlib.suppress(errors.NotFound, errors.WrongState):
            self.ask("remove_port", name=port)

    def status(self) -> dict[str, Any] | None:
        """Ports with their counters; None if it does not run."""
        try:
            answer: dict[str, Any] = self.ask("status")
        except errors.WrongState:
            return None
        return answer

    def addresses(self) -> list[dict[str, Any]]:
        """The addresses that the switch has learned: vlan, mac, port, age_seconds; empty if it does not run."""
        try:
            answer: list[dict[str, Any]] = self.ask("addresses")
        except errors.WrongState:
            return []
        return answer

    @contextlib.contextmanager
    def capture(self, port: str | None, snap_bytes: int | None = None) -> Iterator[socket.socket]:
        """A socket from which a pcapng stream is read, until it is closed."""
        params: dict[str, object] = {"port": port} if port is not None else {}
        if snap_bytes is not None:
            params["snap_bytes"] = snap_bytes
        with self._connected() as sock:
            _exchange(sock, self.name, "capture", params, piece_bytes=1)  # the stream follows the answer
            sock.settimeout(None)
            yield sock


def _exchange(sock: socket.socket, name: str, method: str, params: dict[str, object], *, piece_bytes: int) -> Any:
    """Send a request and receive its answer in pieces; nothing after the answer is read if a piece is one byte."""
    caller = jsonrpc.Caller(MAX_ANSWER_BYTES)
    try:
        sock.sendall(caller.request(method, params))
        while (answer := caller.next_answer()) is None:
            piece = sock.recv(piece_bytes)
            if not piece:
                raise errors.WrongState(f"switch {name} hung up")
            caller.feed(piece)
    except TimeoutError as error:
        raise errors.TimedOut(f"switch {name} did not answer") from error
    except OSError as error:
        raise errors.WrongState(f"switch {name} hung up") from error
    except jsonrpc.ProtocolError as error:
        raise errors.VmmError(f"the program that answers for switch {name} is not a switch") from error
    if answer.failure is not None:
        if isinstance(answer.failure.data, dict):
            raise errors.from_document(answer.failure.data)
        raise errors.VmmError(f"switch {name}: {answer.failure.message}")
    return answer.result
