# SPDX-License-Identifier: Apache-2.0
"""A bare QEMU for tests of modules that need a guest and no worker: started, waited for, and always ended.

The machine has a serial port, QMP, and whatever more words are given. Sockets lie in the folder given, which must have
a short name (a unix socket's path has at most 107 bytes).
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.waiting import wait_until

SECONDS = 60.0


@dataclass
class Guest:
    """A running QEMU."""

    process: subprocess.Popen[bytes]
    folder: Path

    @property
    def serial(self) -> Path:
        """QEMU's end of the serial port, which listens for one client at a time."""
        return self.folder / "serial.sock"

    @property
    def qmp(self) -> Path:
        """The socket on which QMP listens."""
        return self.folder / "qmp.sock"

    def monitor(self, *commands: str | dict[str, Any]) -> list[dict[str, Any]]:
        """Run QMP commands, one after the other, on a separate connection; return their results."""
        with contextlib.closing(connect(self.qmp)) as link, link.makefile("rwb") as file:
            file.readline()
            answers = [self._execute(file, command) for command in ("qmp_capabilities", *commands)]
        return answers[1:]

    @staticmethod
    def _execute(file: Any, command: str | dict[str, Any]) -> dict[str, Any]:
        request = {"execute": command} if isinstance(command, str) else command
        file.write(json.dumps(request).encode() + b"\n")
        file.flush()
        while line := file.readline():
            answer: dict[str, Any] = json.loads(line)
            if "error" in answer:
                raise AssertionError(f"{request}: {answer['error']}")
            if "return" in answer:
                return answer
        raise AssertionError(f"QEMU ended at {request}")

    def wait(self) -> int:
        """Wait for QEMU's end; return its exit code."""
        return self.process.wait(timeout=SECONDS)


def connect(path: Path) -> socket.socket:
    """Connect to a unix socket that may not exist yet."""

    def connected() -> socket.socket | None:
        link = socket.socket(socket.AF_UNIX)
        try:
            link.settimeout(SECONDS)
            link.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            link.close()
            return None
        return link

    link = wait_until(connected, f"{path} takes connections", SECONDS)
    assert link is not None
    return link


def read_until(link: socket.socket, words: bytes, seconds: float = SECONDS) -> bytes:
    """Everything that arrives up to and including these words. Fails with what arrived if they never come."""
    received = b""
    deadline = time.monotonic() + seconds
    while words not in received:
        link.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            piece = link.recv(4096)
        except TimeoutError:
            piece = b""
        if not piece:
            raise AssertionError(f"{words!r} never came; what came: {received!r}")
        received += piece
    return received


@contextlib.contextmanager
def running(qemu: str, folder: Path, *words: str, memory: str = "16", accelerator: str = "tcg") -> Iterator[Guest]:
    """A QEMU with these words on its command line; killed at the end if it still runs."""
    command = [
        qemu, "-accel", accelerator, "-m", memory, "-nodefaults", "-no-user-config", "-display", "none",
        "-chardev", f"socket,id=qmp,path={folder}/qmp.sock,server=on,wait=off", "-mon", "chardev=qmp,mode=control",
        "-chardev", f"socket,id=serial,path={folder}/serial.sock,server=on,wait=on", "-serial", "chardev:serial",
        *words,
    ]  # fmt: skip
    with (folder / "qemu.log").open("ab") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield Guest(process, folder)
    finally:
        process.kill()
        process.wait(timeout=SECONDS)


def drive(path: Path, controller: str, name: str = "disk0") -> list[str]:
    """The words for a raw image on "ide", "scsi" or "virtio"."""
    node = ["-blockdev", f"driver=file,filename={path},node-name={name}-file",
            "-blockdev", f"driver=raw,file={name}-file,node-name={name}"]  # fmt: skip
    return [*node, *attach(name, controller)]


def attach(node: str, controller: str) -> list[str]:
    """The words for the device of a block node on "ide", "scsi" or "virtio"; its serial is the node's name."""
    if controller == "ide":
        return ["-device", f"ide-hd,drive={node},bus=ide.0,serial={node}"]
    if controller == "virtio":
        return ["-device", f"virtio-blk-pci,drive={node},serial={node}"]
    bus = f"scsi-{node}"
    return ["-device", f"virtio-scsi-pci,id={bus}", "-device", f"scsi-hd,drive={node},bus={bus}.0,serial={node}"]
