# SPDX-License-Identifier: Apache-2.0
"""Folders for tests of networks."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder with a short name instead of pytest's: paths of the sockets in it have at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="vn-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)
