# SPDX-License-Identifier: Apache-2.0
"""Machines with real workers for tests: separate homes, and no process is left when the test is over.

The runtime folder has a short name, because of sockets, and QEMU's user may pass through it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.waiting import wait_until
from vmm.api.manager import Manager
from vmm.host.proc import ProcessRef, command_words
from vmm.model.paths import RuntimePaths
from vmm.store.state import processes_of

SECONDS = 60.0


@contextlib.contextmanager
def machine_stage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    """A manager without machines, whose home is below `folder`; every process of its machines is dead afterwards."""
    runtime = Path(tempfile.mkdtemp(prefix="vmmt-", dir="/tmp"))
    runtime.chmod(0o711)
    monkeypatch.setenv("VMM_HOME", str(folder / "home"))
    monkeypatch.setenv("VMM_RUNTIME", str(runtime))
    try:
        yield Manager()
    finally:
        kill_all(runtime)
        shutil.rmtree(runtime, ignore_errors=True)


def kill_all(runtime: Path) -> None:
    """End every process of a runtime folder, beginning with those that would start others.

    A process killed while it started another has not recorded it yet; the latter has the folder on its command line.
    """

    def is_all_dead() -> bool:
        living = [processes_of(RuntimePaths(str(one))) for one in runtime.glob("*")]
        named = [ProcessRef.of(pid) for pid in pids_naming(runtime)]
        if not any(living) and not named:
            return True
        for part in ("keeper", "worker", "qemu", "server"):
            for processes in living:
                if part in processes:
                    processes[part].kill()
        for ref in named:
            if ref is not None:
                ref.kill()
        return False

    wait_until(is_all_dead, lambda: f"all of {runtime} is dead: {os.listdir(runtime)}", SECONDS, pause=0.02)


def pids_naming(runtime: Path) -> list[int]:
    """The processes that have a path in this folder, whose name is unique, on their command line."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdecimal() and name != str(os.getpid())]
    return [pid for pid in pids if any(f"{runtime}/" in word for word in command_words(pid))]
