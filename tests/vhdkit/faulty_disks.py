# SPDX-License-Identifier: Apache-2.0
"""Disks of every format, on stores that fail, for the tests of failing storage."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable

from tests.harness.power import (
    Scene,
    child_scene,
    dynamic_scene,
    format_of,
    open_mem,
    vhdx_child_scene,
    vhdx_scene,
)
from tests.harness.stores import CrashStore, Fault, FaultyStore, MemStore, io_failed, no_space
from vhdkit.chain.engine.chain import Chain
from vhdkit.disk import Disk
from vhdkit.formats.probe import open_layer
from vhdkit.formats.raw import create_raw
from vhdkit.formats.vhd.create import create_fixed
from vhdkit.units import MIB, SECTOR_SIZE, sectors_to_bytes

VHDX_DISK = 2 * MIB + sectors_to_bytes(40)
BLOCKS = ["dynamic", "child", "vhdx", "vhdx-child"]  # the kinds of images that have blocks
KINDS = [*BLOCKS, "raw", "fixed"]
_MAKERS: dict[str, Callable[[], Scene]] = {
    "dynamic": lambda: dynamic_scene(1, writes=0),
    "child": lambda: child_scene(1, writes=0),
    "vhdx": lambda: vhdx_scene(1, writes=0, size_bytes=VHDX_DISK),
    "vhdx-child": lambda: vhdx_child_scene(1, writes=0, below=_full_vhdx()),
    "raw": lambda: _linear_scene("disk.img"),
    "fixed": lambda: _linear_scene("disk.vhd"),
}


def scene_of(kind: str) -> Scene:
    """An image of any kind that owns nothing yet."""
    made = _made(kind)
    return Scene(made.leaf.copy(), made.parents, made.content)


@functools.cache
def _made(kind: str) -> Scene:
    return _MAKERS[kind]()


def _full_vhdx() -> Scene:
    """A VHDX with content in its first two blocks."""
    scene, data = vhdx_scene(1, writes=0, size_bytes=VHDX_DISK), random.Random(2).randbytes(2 * MIB - 4096)
    with open_mem(scene.leaf, writable=True) as disk:
        disk.write(0, data)
    return Scene(scene.leaf, [], data.ljust(VHDX_DISK, b"\0"))


def _linear_scene(name: str) -> Scene:
    store = MemStore(name)
    (create_raw if name.endswith(".img") else create_fixed)(store, MIB)
    return Scene(store, [], bytes(MIB))


def open_faulty(scene: Scene, *faults: Fault) -> tuple[Disk, FaultyStore]:
    """The scene's image, writable, on a store that is going to fail."""
    store = FaultyStore(scene.leaf)
    disk = Disk(Chain([open_layer(store, format_name=format_of(store), writable=True), *scene.parents]))
    store.faults.extend(faults)
    return disk, store


def everything(disk: Disk) -> bytes:
    """The whole disk."""
    return disk.read(0, disk.size_bytes)


def assert_reopens(store: MemStore, scene: Scene, expected: bytes | bytearray) -> None:
    """The disk in a closed file reads as expected."""
    with open_mem(store, scene.parents) as reopened:
        assert everything(reopened) == expected


class FlakyCrashStore(CrashStore):
    """A store that loses power and fails a write."""

    fault: Fault | None = None

    def pwrite(self, offset_bytes: int, data: bytes | bytearray | memoryview) -> None:
        """Fail when the fault strikes."""
        if self.fault is not None and self.fault.strikes("write", offset_bytes):
            raise self.fault.make_error()
        super().pwrite(offset_bytes, data)


class RainStore(CrashStore):
    """A store that loses power, and whose writes fail now and then, some after half the data."""

    def __init__(self, start: MemStore, rng: random.Random) -> None:
        super().__init__(start)
        self.chance = 0.0
        self._rng = rng

    def pwrite(self, offset_bytes: int, data: bytes | bytearray | memoryview) -> None:
        """Fail by chance."""
        if self._rng.random() < self.chance:
            half = len(data) // 2 // SECTOR_SIZE * SECTOR_SIZE
            if half:
                super().pwrite(offset_bytes, data[:half])
            raise self._rng.choice((no_space, io_failed))()
        super().pwrite(offset_bytes, data)

    def reserve(self, offset_bytes: int, size_bytes: int) -> None:
        """Fail by chance."""
        if self._rng.random() < self.chance:
            raise no_space()
        super().reserve(offset_bytes, size_bytes)

    def truncate(self, size_bytes: int) -> None:
        """Fail by chance where the file would grow."""
        if size_bytes > self.size() and self._rng.random() < self.chance:
            raise no_space()
        super().truncate(size_bytes)
