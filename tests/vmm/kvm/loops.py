# SPDX-License-Identifier: Apache-2.0
"""Loop devices for tests: real block devices backed by files, removed however the test ends."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.support import not_available, require_root, require_tool

MIB = 1 << 20


@contextlib.contextmanager
def loop_device(file: Path, *, size_bytes: int = 16 * MIB, read_only: bool = False) -> Iterator[str]:
    """A loop device on a new (or existing) file; its path is valid for as long as the block lasts."""
    require_root()
    losetup = require_tool("losetup")
    if not file.exists():
        with file.open("wb") as new:
            new.truncate(size_bytes)
    command = [losetup, "--find", "--show", *(["--read-only"] if read_only else []), str(file)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode != 0:
        not_available(f"needs a free loop device: {made.stderr.strip()}")
    path = made.stdout.strip()
    try:
        yield path
    finally:
        # If the device is still in use, it is removed when that use ends.
        subprocess.run([losetup, "--detach", path], capture_output=True, check=False)
