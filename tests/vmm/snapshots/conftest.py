# SPDX-License-Identifier: Apache-2.0
"""A home for machines in a folder of the test's own, and machines in it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vmm.snapshots.machines import Machines
from vmm.snapshots.door import MachineSnapshots


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machines]:
    """Machines of this test; whatever of them runs at its end is killed."""
    # In memory: all of it is synced again and again. A short name: sockets lie in there.
    folder = Path(tempfile.mkdtemp(prefix="snap-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else "/tmp"))
    folder.chmod(0o755)
    monkeypatch.setenv("VMM_HOME", str(folder / "home"))
    monkeypatch.setenv("VMM_RUNTIME", str(folder / "run"))
    monkeypatch.setattr(MachineSnapshots, "_merge_in_background", lambda self: None)  # unless a test asks for it
    made = Machines(folder)
    try:
        yield made
    finally:
        made.end()
        shutil.rmtree(folder, ignore_errors=True)
