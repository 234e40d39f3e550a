# SPDX-License-Identifier: Apache-2.0
"""Images on a `MemoryVolume`, and a block in which the file system must not be accessed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from unittest import mock

from tests.harness.memory_volume import MemoryVolume
from tests.harness.stores import MemStore
from vhdkit import formats
from vhdkit.formats.format import CreateRequest
from vhdkit.image import ParentRef
from vhdkit.units import KIB, MIB

SIZE = MIB + 256 * KIB
BLOCK = 512 * KIB
_LOOKS = ("open", "stat", "lstat", "scandir", "listdir", "readlink", "getcwd", "getxattr")


@contextlib.contextmanager
def without_files() -> Iterator[None]:
    """Fail the test if the block asks the operating system about a file."""

    def refused(*args: object, **named: object) -> None:
        raise AssertionError(f"the file system was asked: {args}")

    with contextlib.ExitStack() as stack:
        for name in _LOOKS:
            stack.enter_context(mock.patch.object(os, name, refused))
        yield


def reference(volume: MemoryVolume, child: str, parent: str) -> ParentRef:
    """What `child` records about the image at `parent`."""
    facts = formats.probed(volume.files[parent]).facts(volume.files[parent])
    relative = ".\\" + os.path.relpath(parent, os.path.dirname(child)).replace("/", "\\")
    return ParentRef.of_paths(
        facts.linkage_id or bytes(16),
        facts.timestamp or 0,
        relative=relative,
        absolute=parent.replace("/", "\\"),
        name=os.path.basename(parent),
    )


def image(
    volume: MemoryVolume,
    place: str,
    parent: str | ParentRef | None = None,
    *,
    kind: str = "dynamic",
    writes: Sequence[tuple[int, bytes]] = (),
) -> MemStore:
    """Make an image at this place, a child if it has a parent, and write (first sector, bytes) to it."""
    store = MemStore(place)
    image_format = formats.making(kind)
    if parent is None:
        image_format.create(store, CreateRequest(SIZE, kind, BLOCK))
    else:
        recorded = parent if isinstance(parent, ParentRef) else reference(volume, place, parent)
        image_format.create_child(store, SIZE, recorded, block_size_bytes=BLOCK)
    layer = image_format.open(store, writable=True)
    for sector, data in writes:
        layer.write(sector, memoryview(data))
    layer.close()
    return volume.add(place, store)
