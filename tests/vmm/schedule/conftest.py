# SPDX-License-Identifier: Apache-2.0
"""Every test has a home of its own, and no run waits for another one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from vmm.model import paths
from vmm.schedule import running


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty home with a folder for schedules."""
    monkeypatch.setenv("VMM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("VMM_RUNTIME", str(tmp_path / "run"))
    monkeypatch.setattr(running, "PATIENCE_SECONDS", 0.0)
    paths.make_folders(paths.schedules_folder())
    yield tmp_path
