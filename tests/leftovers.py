# SPDX-License-Identifier: Apache-2.0
"""What a run of the tests leaves behind: nothing, or the run fails and lists it.

A run has its own temporary folder, `$TMPDIR` for everything that it starts, which is removed at the end with
everything that killed programs have left in it. Its processes are identified by a mark in their environment. Mounts
and loop devices belong to the run if they lie below that folder. Names of network namespaces cannot be attributed to
one of several runs at the same time, so they are checked only in CI, where there is one run.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

from tests.support import in_ci
from tests.waiting import becomes

MARK = "VHDKIT_TEST_RUN"
_SECONDS = 10.0  # for processes that are ending when the last test is over
_START_SECONDS = 10.0  # for a program that is being started to become visible


class Run:
    """One run of pytest, with or without workers."""

    def __init__(self, temporary: str | None = None) -> None:
        above = tempfile.gettempdir() if temporary is None else temporary
        # A short name: sockets lie below it. Programs under test also run as other users.
        self.folder = Path(tempfile.mkdtemp(prefix="vt-", dir=above))
        self.folder.chmod(0o711)
        self.mark = f"run:{self.folder.name}:"
        self._former = {name: os.environ.get(name) for name in ("TMPDIR", "PYTEST_DEBUG_TEMPROOT", MARK)}
        # pytest's own folders, which it keeps for debugging a failure, stay where they were.
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", above)
        os.environ["TMPDIR"] = tempfile.tempdir = str(self.folder)
        os.environ[MARK] = (self._former[MARK] or "") + self.mark  # a run within a test belongs to both
        self._namespaces = _namespaces()

    def end(self) -> list[str]:
        """Remove the folder; returns what else was left, one line each."""
        for name, value in self._former.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
        tempfile.tempdir = None
        if (tracking := sys.modules.get("multiprocessing.resource_tracker")) is not None:
            tracking._resource_tracker._stop()  # Python keeps it beside a process that has used processes of its own
        becomes(lambda: not self.left(), _SECONDS, pause=0.1)
        left = self.left()
        if not any(line.startswith("mount ") for line in left):  # never through a mount into the user's files
            shutil.rmtree(self.folder, ignore_errors=True)
        return left

    def left(self) -> list[str]:
        """What exists at this moment and should not."""
        lines = [f"process {pid}: {words}" for pid, words in self._processes()]
        lines += [f"mount {path}" for path in _mounts() if self._ours(path)]
        lines += [f"loop device {device} on {path}" for device, path in _loops() if self._ours(path)]
        # Which run made a namespace cannot be seen. Beside a run within a test, other tests make theirs.
        if in_ci() and not self._former[MARK]:
            lines += [f"network namespace {name}" for name in sorted(_namespaces() - self._namespaces)]
        return lines

    def _ours(self, path: str) -> bool:
        return path.startswith(f"{self.folder}/")

    def _processes(self) -> list[tuple[int, str]]:
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            with contextlib.suppress(OSError):  # it has just ended, or belongs to another user
                words = _command(entry)
                if self.mark.encode() in (entry / "environ").read_bytes():
                    found.append((int(entry.name), words[:200]))
        return found


def _command(entry: Path) -> str:
    """The command line of a process. While a program is being started it has neither that nor an environment yet."""

    def has_one() -> bool:
        if (entry / "cmdline").read_bytes():
            return True
        os.readlink(entry / "exe")  # fails for kernel processes and for zombies, which never get one
        return False

    becomes(has_one, _START_SECONDS)
    return (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()


def _mounts() -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    return [line.split(" ")[4].replace("\\040", " ") for line in lines]


def _loops() -> list[tuple[str, str]]:
    found = []
    for entry in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            found.append((entry.parts[3], entry.read_text(errors="replace").strip()))
    return found


def _namespaces() -> set[str]:
    try:
        return set(os.listdir("/run/netns"))
    except OSError:
        return set()
