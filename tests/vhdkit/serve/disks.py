# SPDX-License-Identifier: Apache-2.0
"""Exports on disks in memory, for servers in a thread."""

from __future__ import annotations

from tests.harness.power import DISK_SIZE, Scene, child_scene, dynamic_scene, open_mem
from tests.harness.stores import MemStore
from vhdkit.formats.vhd.create import create_dynamic
from vhdkit.serve.nbd.export import Export
from vhdkit.units import MIB

SIZE = DISK_SIZE  # of the disks of all scenes: a little over 1.5 MiB


def export_of(scene: Scene, *, store: MemStore | None = None, name: str = "", read_only: bool = False) -> Export:
    """The scene's disk, on a given store instead of its own."""
    disk = open_mem(scene.leaf if store is None else store, scene.parents, writable=not read_only)
    return Export(name, disk, description=f"a disk of {disk.size_bytes} bytes", read_only=read_only)


def child(seed: int = 1) -> Scene:
    """A differencing disk over a base; random content, some of it the base's, some owned by neither."""
    return child_scene(seed)


def empty(seed: int = 1) -> Scene:
    """A dynamic disk of zeros."""
    return dynamic_scene(seed, writes=0)


def sparse(size_bytes: int, *, block_size_bytes: int = 2 * MIB) -> Scene:
    """A dynamic disk of zeros of any size, without a copy of its content."""
    leaf = MemStore("sparse.vhd")
    create_dynamic(leaf, size_bytes, block_size_bytes=block_size_bytes)
    return Scene(leaf, [], b"")
