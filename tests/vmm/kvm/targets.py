# SPDX-License-Identifier: Apache-2.0
"""An iSCSI target for tests: tgt on the loopback interface, one LUN on a file, gone again however the test ends."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support import not_available, require_root, require_tool, run

TARGET = "iqn.2001-04.com.example:store"


@dataclass(frozen=True, slots=True)
class Target:
    """A running target; `url` is its LUN's."""

    port: int
    control: int
    file: Path
    url: str
    process: subprocess.Popen[bytes]

    def admin(self, *words: str) -> None:
        """Give the target a command."""
        run([require_tool("tgtadm"), "-C", str(self.control), "--lld", "iscsi", *words])


@contextlib.contextmanager
def iscsi_target(file: Path, *, size_bytes: int = 16 << 20, user: str = "", password: str = "") -> Iterator[Target]:
    """A target with LUN 1 on a new file; with `user` it wants CHAP."""
    require_root()  # its control socket is in /var/run
    require_tool("tgtadm")
    with file.open("wb") as new:
        new.truncate(size_bytes)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    control = os.getpid() % 30000 + 1  # one test process has one at a time
    command = [
        require_tool("setpriv"),
        "--pdeathsig",
        "KILL",
        require_tool("tgtd"),
        "-f",
        "-C",
        str(control),
        "--iscsi",
        f"portal=127.0.0.1:{port}",
    ]
    with (
        file.with_suffix(".log").open("wb") as log,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log) as process,
    ):
        try:
            _wait_for(process, port, control)
            target = Target(port, control, file, f"iscsi://127.0.0.1:{port}/{TARGET}/1", process)
            target.admin("--op", "new", "--mode", "target", "--tid", "1", "-T", TARGET)
            target.admin("--op", "new", "--mode", "logicalunit", "--tid", "1", "--lun", "1", "-b", str(file))
            if user:
                target.admin("--op", "new", "--mode", "account", "--user", user, "--password", password)
                target.admin("--op", "bind", "--mode", "account", "--tid", "1", "--user", user)
            target.admin("--op", "bind", "--mode", "target", "--tid", "1", "-I", "ALL")
            yield target
        finally:
            process.kill()
            process.wait()
            for name in (f"/var/run/tgtd/socket.{control}", f"/var/run/tgtd/socket.{control}.lock"):
                with contextlib.suppress(OSError):
                    os.unlink(name)


def _wait_for(process: subprocess.Popen[bytes], port: int, control: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if process.poll() is not None:
            not_available(f"tgtd ended with code {process.returncode}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            shown = subprocess.run(
                [require_tool("tgtadm"), "-C", str(control), "--lld", "iscsi", "--op", "show", "--mode", "sys"],
                capture_output=True,
                check=False,
            )
            if shown.returncode == 0:
                return
        time.sleep(0.05)
    not_available("tgtd does not listen")
