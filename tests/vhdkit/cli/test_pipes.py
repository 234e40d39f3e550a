# SPDX-License-Identifier: Apache-2.0
"""Disks through pipes that take or give a part of what was asked for."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from tests.vhdkit.cli.running import MIB, start
from vhdkit.cli.pipes import PipeWriter


class _Part(io.RawIOBase):
    """Takes at most seven bytes at once, like a device that is nearly full."""

    def __init__(self) -> None:
        self.taken = b""

    def write(self, data: memoryview, /) -> int:  # type: ignore[override]  # what `PipeWriter` gives
        self.taken += bytes(data[:7])
        return min(len(data), 7)


def test_the_rest_of_a_short_write_follows() -> None:
    """An unbuffered stream says how much it took; the rest is written after it."""
    stream = _Part()
    PipeWriter(stream).write(memoryview(b"0123456789" * 3))
    assert stream.taken == b"0123456789" * 3


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_to_a_pipe_that_does_not_block(unbuffered: str, folder: Path) -> None:
    """The whole disk arrives, although the pipe is full again and again and the stream may be unbuffered."""
    content = os.urandom(2 * MIB + 512)
    Path("x.raw").write_bytes(content)
    outlet, inlet = os.pipe()
    os.set_blocking(inlet, False)
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with open(outlet, "rb") as stream:
        process = start("convert", "x.raw", "-", "--to", "raw", stdout=inlet, env=environment)
        os.close(inlet)
        arrived = stream.read()
    assert process.communicate(timeout=30)[1] == b"" and process.returncode == 0
    assert arrived == content


@pytest.mark.parametrize("kind", ["raw", "dynamic"])
def test_from_a_pipe_that_does_not_block(kind: str, folder: Path) -> None:
    """The command waits for the bytes that are not there yet."""
    content = os.urandom(MIB + 512)
    outlet, inlet = os.pipe()
    os.set_blocking(outlet, False)
    process = start("convert", "-", "out.img", "--to", kind, stdin=outlet)
    os.close(outlet)
    with open(inlet, "wb", buffering=0) as stream:
        for first in range(0, len(content), 48 << 10):
            stream.write(content[first : first + (48 << 10)])
    error = process.communicate(timeout=30)[1]
    assert process.returncode == 0, error
    assert start("convert", "out.img", "-", "--to", "raw").communicate(timeout=30)[0] == content
