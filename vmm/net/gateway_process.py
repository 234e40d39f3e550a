# SPDX-License-Identifier: Apache-2.0
"""A gateway's helper as a process: which process starts it, and how it is kept running.

Decides that it ends with the switch (PR_SET_PDEATHSIG) and is started again when it ends by itself. A switch of root
has no privileges to start it as another user, in a root of its own: it drops them before it receives any frame, and a
process that was forked before does nothing but start the helper. That process derives what it starts from a setup that
it checks itself, so a compromised switch cannot make it start anything else.

    switch ── {"do": "start", "setup": {...}} / "pid" / "stop" ──> starter ──> confined, enclosed ──> QEMU
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from typing import Any, Protocol

from vmm.host.users import user_of
from vmm.model import errors
from vmm.net import enclosed, gateway_note, records
from vmm.net.enclosing import Enclosure
from vmm.net.gateway import QEMU, GatewaySetup, command, problem_of

FOLDER_NAME, PEER_NAME, ADDRESS_NAME, LOG_NAME = "gateway", "gate.sock", "port.sock", "gateway.log"
_ROOT_NAME = "gateway-root"
_AGAIN_SECONDS, _MAX_AGAIN_SECONDS = 2.0, 60.0  # between two starts: doubled each time
_STEADY_SECONDS = 30.0  # a helper that ran for this long counts as healthy
_STOP_SECONDS = 2.0
_REFRESH_SECONDS = 1.0
_ANSWER_SECONDS = 10.0  # of the starter: no frames are moved meanwhile
_MAX_BYTES = 64 << 10
_SAID_BYTES = 2000
_CAP_NET_BIND_SERVICE, _FIRST_FREE_PORT = 10, 1024
# The capabilities that a root switch keeps: guests' folders and sockets belong to the guests' users.
KEPT_CAPABILITIES = (0, 1, 3)  # CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER


def capabilities_for(setup: GatewaySetup) -> tuple[int, ...]:
    """The capabilities that root's helper needs: none, unless a low port of the host is forwarded."""
    ports = [int(one.partition("-")[0].rpartition(":")[2]) for one in setup.forwards]
    return (_CAP_NET_BIND_SERVICE,) if any(port < _FIRST_FREE_PORT for port in ports) else ()


class Starter(Protocol):
    """Starts the helper of one switch. `is_lost`: it cannot start anything any more."""

    is_lost: bool

    def start(self, setup: GatewaySetup) -> None:
        """Start the helper, which does not run. Raises VmmError."""

    def pid(self) -> int | None:
        """Its pid while it runs."""

    def stop(self) -> None:
        """End it; succeeds if it does not run."""


def owner_of(folder: str) -> int | None:
    """The user of the gateway of the switch with this runtime folder; None: our own."""
    return user_of(os.path.basename(folder).removeprefix("sw-"))


class Gateway:
    """The helper of one switch; its sockets are in a folder of its own inside the switch's."""

    def __init__(self, setup: GatewaySetup, folder: str, starter: Starter) -> None:
        self.setup = setup
        self.peer = os.path.join(folder, FOLDER_NAME, PEER_NAME)
        self.address = os.path.join(folder, FOLDER_NAME, ADDRESS_NAME)
        self.owner = owner_of(folder)
        self._folder = folder
        self._log = os.path.join(folder, LOG_NAME)
        self._refusal = ""  # why it could not even be started
        self._starter = starter
        self._started_at = 0.0
        self._again_seconds = _AGAIN_SECONDS

    def start(self) -> None:
        """Start the helper. Raises Unsupported if QEMU is not installed."""
        self._started_at = time.monotonic()
        self._refusal = ""
        try:
            self._starter.start(self.setup)
        except errors.VmmError as error:
            self._refusal = error.problem
            raise

    def keep_alive(self, connected: bool) -> None:
        """Start it again if it ended: after a few seconds, with a longer pause each time that it ends soon.

        While it does not run there is a note for the machines on the switch. `connected`: it accepts frames.
        """
        age = time.monotonic() - self._started_at
        if age > self._again_seconds:
            if self._starter.pid() is None:
                gateway_note.leave(self._folder, self._refusal or problem_of(self._said()))
                self._again_seconds = min(2 * self._again_seconds, _MAX_AGAIN_SECONDS)
                with contextlib.suppress(errors.VmmError):
                    self.start()
            elif age > _STEADY_SECONDS:
                self._again_seconds = _AGAIN_SECONDS
        if connected and gateway_note.is_there(self._folder) and self._starter.pid() is not None:
            gateway_note.remove(self._folder)

    def _said(self) -> str:
        return records.read_tail(self._log, _SAID_BYTES)

    def status(self, connected: bool) -> dict[str, Any]:
        """Whether it runs and accepts frames, and its last message if it does not run."""
        pid = self._starter.pid()
        said = (self._refusal or self._said()) if pid is None else ""
        state = {"pid": pid, "running": pid is not None, "ready": pid is not None and connected, "said": said}
        return {**state, **self.setup.to_document()}

    def stop(self) -> None:
        """End the helper and remove its socket."""
        self._starter.stop()
        gateway_note.remove(self._folder)
        with contextlib.suppress(OSError):
            os.unlink(self.peer)


class LocalStarter:
    """Starts the helper from this process."""

    is_lost = False

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def _place(self) -> Enclosure:
        folder = os.path.join(self._folder, FOLDER_NAME)
        return Enclosure(folder, owner_of(self._folder), os.path.join(self._folder, _ROOT_NAME))

    def start(self, setup: GatewaySetup) -> None:
        """As `Starter.start`. Raises Unsupported if QEMU is not installed."""
        place = self._place()
        try:
            place.make()  # first: even if the helper cannot start now, the switch needs the folder for its port
            program = shutil.which(QEMU)
            if program is None:
                raise errors.Unsupported(f"{QEMU} is not installed", hint="apt-get install qemu-system-x86")
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(place.folder, PEER_NAME))
            words = [program, *command(setup, place.seen(PEER_NAME), place.seen(ADDRESS_NAME))[1:]]
            with open(os.path.join(self._folder, LOG_NAME), "wb") as log:
                self._process = subprocess.Popen(
                    place.command(words, parent=os.getpid(), keep=capabilities_for(setup)),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        except OSError as error:
            raise errors.of_os_error(error, "start the gateway", path=place.folder) from error

    def pid(self) -> int | None:
        """As `Starter.pid`."""
        return None if self._process is None or self._process.poll() is not None else self._process.pid

    def refresh(self) -> None:
        """Copy the host's current name servers to the helper."""
        if self.pid() is not None:
            self._place().refresh()

    def stop(self) -> None:
        """As `Starter.stop`."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


class ForkedStarter:
    """Starts the helper through another process. For root only; nothing else may run in this process yet."""

    def __init__(self, folder: str, closed: tuple[int, ...]) -> None:
        """`closed`: our descriptors that the other process must close."""
        self.is_lost = False
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent = os.getpid()
        if os.fork() == 0:
            try:
                self._channel.close()
                for one in closed:
                    with contextlib.suppress(OSError):
                        os.close(one)
                enclosed.end_with(parent, signal.SIGKILL)
                _serve(theirs, LocalStarter(folder))
            finally:
                os.kill(os.getpid(), signal.SIGKILL)  # whatever happened, the switch's own code must not run here
        theirs.close()
        self._channel.settimeout(_ANSWER_SECONDS)

    def _ask(self, what: str, **more: object) -> object:
        try:
            if self.is_lost:
                raise BrokenPipeError
            self._channel.send(json.dumps({"do": what, **more}).encode())
            answer = json.loads(self._channel.recv(_MAX_BYTES))
        except (OSError, ValueError) as error:
            self.is_lost = True  # a late answer would be taken for the answer to the next request
            raise errors.VmmError("the process that starts the gateway has ended or does not answer") from error
        if "error" in answer:
            raise errors.from_document(answer["error"])
        return answer["result"]

    def start(self, setup: GatewaySetup) -> None:
        """As `Starter.start`."""
        self._ask("start", setup=setup.to_document())

    def pid(self) -> int | None:
        """As `Starter.pid`."""
        try:
            pid = self._ask("pid")
        except errors.VmmError:
            return None
        return pid if isinstance(pid, int) else None

    def stop(self) -> None:
        """As `Starter.stop`."""
        with contextlib.suppress(errors.VmmError):
            self._ask("stop")


def _serve(channel: socket.socket, starter: LocalStarter) -> None:
    """Carry out the switch's requests until it is gone."""
    channel.settimeout(_REFRESH_SECONDS)
    while True:
        try:
            request = channel.recv(_MAX_BYTES)
        except TimeoutError:
            starter.refresh()
            continue
        if not request:
            starter.stop()
            return
        answer: dict[str, object]
        try:
            answer = {"result": _done(json.loads(request), starter)}
        except errors.VmmError as error:
            answer = {"error": errors.to_document(error)}
        channel.send(json.dumps(answer).encode())


def _done(request: dict[str, object], starter: LocalStarter) -> object:
    match request:
        case {"do": "start", "setup": dict(setup)}:
            starter.stop()
            starter.start(GatewaySetup.from_document(setup))
        case {"do": "pid"}:
            return starter.pid()
        case {"do": "stop"}:
            starter.stop()
    return None
