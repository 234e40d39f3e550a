# SPDX-License-Identifier: Apache-2.0
"""The device starts early: when it is asked, and that no thread outlives the descriptor."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from tests.waiting import wait_until
from vhdkit import write_behind
from vhdkit.units import MIB
from vhdkit.write_behind import BEHIND_BYTES, WriteBehind


class Kernel:
    """Stands in for the C library: a call waits until it is let go."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []
        self.free = threading.Event()
        self.returned = 0

    def sync_file_range(self, *arguments: int) -> int:
        """Note the call."""
        self.calls.append(arguments)
        self.free.wait(10)
        self.returned += 1
        return 0


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    """The stand-in, let go at the end."""
    fake = Kernel()
    monkeypatch.setattr(write_behind, "_libc", fake)
    yield fake
    fake.free.set()


def test_the_device_is_asked_once_enough_is_written(kernel: Kernel) -> None:
    """Nothing is asked for less than the limit; the call covers the whole file and only starts writing."""
    behind = WriteBehind(7)
    behind.wrote(BEHIND_BYTES - 1)
    assert kernel.calls == []
    behind.wrote(1)
    wait_until(lambda: kernel.calls == [(7, 0, 0, 2)], "the call")
    kernel.free.set()
    behind.close()


def test_writing_never_waits_for_the_device(kernel: Kernel) -> None:
    """While the device is busy, more can be written and nothing more is asked; that counts afterwards."""
    behind = WriteBehind(7)
    for _ in range(4):
        behind.wrote(BEHIND_BYTES)
    assert len(kernel.calls) <= 1
    kernel.free.set()
    behind.close()
    behind.wrote(MIB)
    wait_until(lambda: len(kernel.calls) == 2, "the second call")
    behind.close()


def test_closing_waits_for_the_call(kernel: Kernel) -> None:
    """No call with the descriptor is in progress after `close`."""
    behind = WriteBehind(7)
    behind.wrote(BEHIND_BYTES)
    closing = threading.Thread(target=behind.close, daemon=True)
    closing.start()
    assert kernel.returned == 0
    kernel.free.set()
    closing.join(10)
    assert not closing.is_alive() and kernel.returned == 1


def test_without_a_thread_the_sync_does_it(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """If no thread can be started, nothing fails."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    behind = WriteBehind(7)
    behind.wrote(BEHIND_BYTES)
    behind.close()
    assert kernel.calls == []
