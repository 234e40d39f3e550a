# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the machine manager's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import require_tool
from tests.vmm.stage import machine_stage
from vmm.manager import Manager


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    """A manager of no machines yet; nothing of its machines lives afterwards."""
    require_tool("qemu-system-x86_64")
    with machine_stage(tmp_path, monkeypatch) as one:
        yield one
