# SPDX-License-Identifier: Apache-2.0
"""An iSCSI target for tests: tgt on the loopback interface, one LUN on a file, removed however the test ends."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support import not_available, require_root, require_tool, run
from tests.waiting import becomes

TARGET = "iqn.2001-04.com.example:store"


@dataclass(frozen=True, slots=True)
class Target:
    """A running target; `url` is the URL of its LUN."""

    port: int
    control: int
    file: Path
    url: str
    account: tuple[str, str]
    process: list[subprocess.Popen[bytes]]  # the process, or None while the target is down

    def admin(self, *words: str) -> None:
        """Send a command to the target."""
        run([require_tool("tgtadm"), "-C", str(self.control), "--lld", "iscsi", *words])

    def start(self) -> None:
        """Start the daemon, with its target and LUN."""
        command = [require_tool("setpriv"), "--pdeathsig", "KILL", require_tool("tgtd"), "-f", "-C", str(self.control)]
        command += ["--iscsi", f"portal=127.0.0.1:{self.port}"]
        with self.file.with_suffix(".log").open("ab") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.process.append(process)
        _wait_for(process, self.port, self.control)
        self.admin("--op", "new", "--mode", "target", "--tid", "1", "-T", TARGET)
        self.admin("--op", "new", "--mode", "logicalunit", "--tid", "1", "--lun", "1", "-b", str(self.file))
        user, password = self.account
        if user:
            self.admin("--op", "new", "--mode", "account", "--user", user, "--password", password)
            self.admin("--op", "bind", "--mode", "account", "--tid", "1", "--user", user)
        self.admin("--op", "bind", "--mode", "target", "--tid", "1", "-I", "ALL")

    def kill(self) -> None:
        """Kill it at once; `start` starts it again."""
        while self.process:
            process = self.process.pop()
            process.kill()
            process.wait()
        for name in (f"/var/run/tgtd/socket.{self.control}", f"/var/run/tgtd/socket.{self.control}.lock"):
            with contextlib.suppress(OSError):
                os.unlink(name)


@contextlib.contextmanager
def iscsi_target(file: Path, *, size_bytes: int = 16 << 20, user: str = "", password: str = "") -> Iterator[Target]:
    """A target with LUN 1 on a new file; with `user` it requires CHAP."""
    require_root()  # its control socket is in /var/run
    require_tool("tgtadm")
    with file.open("wb") as new:
        new.truncate(size_bytes)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    control = os.getpid() % 30000 + 1  # one test process at a time has one
    target = Target(port, control, file, f"iscsi://127.0.0.1:{port}/{TARGET}/1", (user, password), [])
    try:
        target.start()
        yield target
    finally:
        target.kill()


def _wait_for(process: subprocess.Popen[bytes], port: int, control: int) -> None:
    show = [require_tool("tgtadm"), "-C", str(control), "--lld", "iscsi", "--op", "show", "--mode", "sys"]

    def listens() -> bool:
        if process.poll() is not None:
            not_available(f"tgtd ended with code {process.returncode}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return subprocess.run(show, capture_output=True, check=False).returncode == 0
        return False

    if not becomes(listens, 30):
        not_available("tgtd does not listen")
