# SPDX-License-Identifier: Apache-2.0
"""Which files count as a machine's memory, and that a capture without one is not reported as taken."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any, cast

import pytest

from vmm.kvm import memory_file
from vmm.kvm.background import Capturing, Mode
from vmm.kvm.qmp import Qmp
from vmm.model.errors import QemuFailed

WHOLE = memory_file.HEADER + bytes(1000)


@pytest.mark.parametrize(
    ("content", "size", "memory", "words"),
    [
        (WHOLE, len(WHOLE), 900, None),
        (b"", 0, 0, "only 0 bytes"),
        (memory_file.HEADER, 8, 0, "only 8 bytes"),
        (bytes(1008), 1008, 0, "does not begin"),
        (b"QEVM" + bytes(1004), 1008, 0, "does not begin"),
        (WHOLE, len(WHOLE) + 1, 0, "1008 bytes instead of 1009"),
        (WHOLE, len(WHOLE), 2000, "wrote 2000"),
    ],
)
def test_only_complete_memory_files_are_accepted(
    tmp_path: Path, content: bytes, size: int, memory: int, words: str | None
) -> None:
    """INV-MEMORY-WHOLE: an empty, a foreign and a short file are refused, each with its reason."""
    (tmp_path / "memory").write_bytes(content)
    descriptor = os.open(tmp_path / "memory", os.O_RDONLY)
    try:
        problem = memory_file.problem_of(descriptor, size, memory_bytes=memory)
    finally:
        os.close(descriptor)
    if words is None:
        assert problem is None
    else:
        assert problem is not None and words in problem


class WrittenElsewhere:
    """A monitor that has written all of the memory, but not into our file."""

    async def execute(self, command: str, **arguments: object) -> Any:
        if command == "query-migrate":
            return {"status": "completed", "ram": {"transferred": 500_000, "remaining": 0, "total": 1 << 26}}
        return {"status": "running"}


def test_memory_written_to_another_file_is_an_error(tmp_path: Path) -> None:
    """INV-MEMORY-WHOLE: a capture that QEMU completed into another file is an error, not a snapshot."""
    qmp = cast(Qmp, WrittenElsewhere())

    async def scene() -> None:
        descriptor = os.open(tmp_path / "memory", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            capturing = Capturing(lambda: qmp, descriptor, Mode.STOP, was_running=True)
            with pytest.raises(QemuFailed, match="not written where it should be: the file has only 0 bytes"):
                await capturing.finish(lambda document: None)
        finally:
            os.close(descriptor)

    asyncio.run(scene())
