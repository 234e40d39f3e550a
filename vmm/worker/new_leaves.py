# SPDX-License-Identifier: Apache-2.0
"""New leaves on all disks of a running machine, at one moment, as a snapshot or a backup needs them.

    prepare   the disk server makes the new images
    put_on    from one moment on they take the guest's writes, and the images below are frozen
    follow    tree, journal and definitions name them

Decides in which order that is recorded: a successor finds either a journal that says what was about to happen, or
definitions that name the images in use. What is done while the images are frozen is up to the caller.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from vmm.snapshots.steps import pivoted
from vmm.store.snapshots.journal import Backup, CreateLive, Pivot
from vmm.store.snapshots.store import Held
from vmm.worker.served import served_ids

if TYPE_CHECKING:
    from vmm.worker.disk_hotplug import Plugging
    from vmm.worker.running import Running

_Operation = TypeVar("_Operation", CreateLive, Backup)


class NewLeaves:
    """The new leaves of one operation, whose journal has begun. A machine without writable images needs none."""

    def __init__(self, running: Running, plugging: Plugging, held: Held, pivots: Sequence[Pivot]) -> None:
        self._running = running
        self._plugging = plugging
        self._held = held
        self._pivots = pivots
        self._exports = {one.disk: one.child for one in pivots}

    async def prepare(self) -> None:
        """Make the images beforehand, so that little is left to do at the moment itself. Raises StoreFailed."""
        if self._pivots:
            await self._running.server.call("prepare", exports=self._exports)

    async def put_on(self) -> None:
        """Put them on all disks at once. Raises StoreFailed."""
        if self._pivots:
            await self._running.server.call("snapshot", exports=self._exports)

    async def follow(self, journal: _Operation) -> _Operation:
        """Record that they are the machine's disks; returns the journal that says so. Raises StoreFailed, NoSpace."""
        journal = replace(journal, pivoted=True)
        ids = await served_ids(self._running) if self._pivots else {}
        for one in self._pivots:
            self._held.tree.grow(one.frozen, one.child, one.format, child_id=ids.get(one.child))
        self._held.go_on(journal)
        if self._pivots:
            spec = pivoted(self._running.spec, self._pivots)
            await asyncio.to_thread(self._plugging.write_down, self._held, spec)
        return journal
