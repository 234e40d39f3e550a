# SPDX-License-Identifier: Apache-2.0
"""A home for machines in a folder of the test's own, and machines in it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vmm.snapshots.machines import Machines


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machines]:
    """Machines of this test; whatever of them runs at its end is killed."""
    folder = Path(tempfile.mkdtemp(prefix="snap-", dir="/tmp"))  # sockets have short names
    folder.chmod(0o755)
    monkeypatch.setenv("VMM_HOME", str(folder / "home"))
    monkeypatch.setenv("VMM_RUNTIME", str(folder / "run"))
    made = Machines(folder)
    try:
        yield made
    finally:
        made.end()
        shutil.rmtree(folder, ignore_errors=True)
