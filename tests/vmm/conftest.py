# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the machine manager's tests."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import require_tool
from tests.vmm.snapshots.machines import Machines
from tests.vmm.stage import machine_stage
from vmm.api.manager import Manager
from vmm.api.stopped_machine import StoppedMachine


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    """A manager without machines; no process of its machines is left afterwards."""
    require_tool("qemu-system-x86_64")
    with machine_stage(tmp_path, monkeypatch) as one:
        yield one


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Machines]:
    """Machines of this test; any that still run at its end are killed. Its parameter is the kind of their disks."""
    # In memory, because everything is synced again and again. The name is short because of the sockets in it.
    folder = Path(tempfile.mkdtemp(prefix="snap-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else "/tmp"))
    folder.chmod(0o755)
    monkeypatch.setenv("VMM_HOME", str(folder / "home"))
    monkeypatch.setenv("VMM_RUNTIME", str(folder / "run"))
    monkeypatch.setattr(StoppedMachine, "merge_in_background", lambda self: None)  # unless a test requests it
    made = Machines(folder, getattr(request, "param", "vhd"))
    try:
        yield made
    finally:
        made.end()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder with a short name, for sockets: their paths have at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="vt-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)
