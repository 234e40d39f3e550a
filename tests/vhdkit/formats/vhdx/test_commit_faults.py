# SPDX-License-Identifier: Apache-2.0
"""Changes of a VHDX that fail or are interrupted, beside a flush or inside one."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import pytest

import vhdkit
from tests.harness.power import open_mem
from tests.harness.stores import CrashStore, no_space
from tests.vhdkit.formats.vhdx.images import PARENT, image
from vhdkit.formats.probe import open_layer
from vhdkit.formats.vhdx.metadata import read_metadata
from vhdkit.formats.vhdx.replay import Replay
from vhdkit.image import ParentRef
from vhdkit.store import Buffer, Store
from vhdkit.units import MIB, SECTOR_SIZE


class FullAfterFlush(CrashStore):
    """A store on which one write finds no space, right after `meanwhile` has run in another thread."""

    meanwhile: Callable[[], None] | None = None

    def pwrite(self, offset_bytes: int, data: Buffer) -> None:
        """See `Store.pwrite`."""
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is None:
            super().pwrite(offset_bytes, data)
            return
        flush = threading.Thread(target=meanwhile, daemon=True)
        flush.start()
        flush.join(60)
        raise no_space()


@pytest.mark.parametrize("parent", [None, PARENT], ids=["dynamic", "child"])
def test_no_entry_counts_on_space_that_is_given_back(parent: ParentRef | None) -> None:
    """INV-LOG-WHOLE: a flush syncs a file with room for a block whose data then finds no space. The entry of the flush
    does not say that the file, which is shorter by then, was cut short.
    """
    store = FullAfterFlush(image(parent=parent))
    parents = [] if parent is None else [open_layer(image())]
    disk = open_mem(store, parents, writable=True)
    disk.write(0, b"a" * SECTOR_SIZE)
    before = store.size()
    store.meanwhile = disk.flush
    with pytest.raises(vhdkit.NoSpace):
        disk.write(2 * MIB, b"b" * MIB)
    assert store.meanwhile is None and store.size() == before
    for seed in range(8):
        with open_mem(store.after_cut(random.Random(seed)), parents, writable=True) as found:
            assert found.read(0, SECTOR_SIZE) == b"a" * SECTOR_SIZE
    for offset in (2 * MIB, 3 * MIB):
        disk.write(offset, b"c" * SECTOR_SIZE)
        disk.flush()
    assert replayed(store).entries[-1].header.flushed_file_offset > before, "what is durable and stays counts"
    disk.close()


def replayed(store: Store) -> Replay:
    """What is in the log."""
    found = read_metadata(store).replay
    assert found is not None
    return found
