# SPDX-License-Identifier: Apache-2.0
"""Commands inside the Linux guest, over its serial port (or anything that leads there, such as a console's socket).

The other end is linux_root/shell-agent. Other lines (the kernel's, a prompt, another reader's echo, old output that a
console shows again) are passed over: each call has a name of its own.
"""

from __future__ import annotations

import base64
import secrets
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from tests.vmm.guests.launch import connect

SECONDS = 60.0
_MAX_LINE_BYTES = 4000  # the longest line that a terminal accepts


@dataclass(frozen=True)
class Result:
    """The result of a command inside the guest."""

    exit_code: int
    output: str


class GuestShell:
    """A connection to the guest's shell agent."""

    def __init__(self, link: socket.socket | Path) -> None:
        """`link`: a connected stream socket, or the path of a unix socket, which may be made later."""
        self._link = connect(link) if isinstance(link, Path) else link
        self.transcript = bytearray()  # everything received, for the message of a failing test
        self._unread = b""

    def wait_ready(self, seconds: float = SECONDS) -> None:
        """Wait until the guest answers. Needs no READY line, so it works with a guest that was started earlier."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                self.run("true", seconds=min(2.0, seconds))
                return
            except TimeoutError:
                if time.monotonic() > deadline:
                    raise

    def run(self, command: str, *, seconds: float = SECONDS) -> Result:
        """Run a shell command; return its exit code and output. Raises TimeoutError with what arrived instead."""
        name = secrets.token_hex(4)
        line = f"@run {name} {base64.b64encode(command.encode()).decode()}\n".encode()
        assert len(line) <= _MAX_LINE_BYTES, "the command is too long for one line"
        self._link.settimeout(seconds)
        self._link.sendall(line)
        deadline = time.monotonic() + seconds
        output = b""
        while True:
            # (The terminal echoes while the agent still works, so a prompt may precede an answer.)
            _, mark, answer = self._line(deadline, command).partition(f"@{name} ".encode())
            words = answer.split()
            if not mark:
                continue
            if words[0] == b"exit":
                return Result(int(words[1]), output.decode(errors="replace"))
            output += base64.b64decode(words[0])

    def check(self, command: str, *, seconds: float = SECONDS) -> str:
        """Run a command that must succeed; return its output, without surrounding space."""
        result = self.run(command, seconds=seconds)
        assert result.exit_code == 0, f"{command!r} in the guest: exit code {result.exit_code}: {result.output}"
        return result.output.strip()

    def send(self, command: str) -> None:
        """Send a command as typed, without waiting (for one that does not return, such as `poweroff -f`)."""
        self._link.sendall(command.encode() + b"\n")

    def _line(self, deadline: float, command: str) -> bytes:
        while b"\n" not in self._unread:
            self._link.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                piece = self._link.recv(65536)
            except TimeoutError:
                said = bytes(self.transcript[-2000:]).decode(errors="replace")
                raise TimeoutError(f"the guest did not answer {command!r}; it said last: {said!r}") from None
            assert piece, f"the guest's serial port closed at {command!r}: {bytes(self.transcript[-2000:])!r}"
            self.transcript += piece
            self._unread += piece
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def close(self) -> None:
        """Disconnect; the guest keeps running."""
        self._link.close()

    def __enter__(self) -> GuestShell:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
