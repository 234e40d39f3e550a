# SPDX-License-Identifier: Apache-2.0
"""Merges of a machine's images while it runs, in its worker; the disk server carries them out.

    layers below the leaf      in the background, unnoticed by the guest
    the leaf, too              in passes, then the guest's writes are held for the rest

Decides what is recorded before and after, so that a successor knows which image is the machine's disk: the journal
names the disk, and the server, or the files themselves, show where its chain begins now. Which merges are made is
decided by the command that requests them (with `dependents`, which needs numpy); here it is checked that nothing else
needs the images that change.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING, Any

from vmm.model.errors import InvalidSpec, Refused, VmmError
from vmm.processes.rpc import Method, Progress, parameter
from vmm.snapshots.steps import begin_merge
from vmm.store.snapshots.journal import MergeLive
from vmm.store.snapshots.store import Held, holding
from vmm.worker.served import follow_merge, served_layers
from vmm.worker.states import Verb

if TYPE_CHECKING:
    from vmm.worker.running import Running

OPERATION = "snapshot-merge"
MERGE_SECONDS = 7 * 24 * 3600.0
_LOOK_SECONDS = 0.2  # between reports of the progress


class LiveMerges:
    """The merges of one running machine."""

    def __init__(self, running: Running) -> None:
        self._running = running

    def methods(self) -> dict[str, Method]:
        """The methods of the control socket."""
        return {"snapshot-merge": self._merge, "snapshot-merge-cancel": self._cancel}

    async def _merge(self, params: dict[str, Any], progress: Progress) -> object:
        """{"target", "layers": newest first, "max_rate_bytes"}: {"target", "passes", "held_seconds"}."""
        running = self._running
        running.need(Verb.MERGE)
        target = parameter(params, "target", str, "")
        layers = [str(path) for path in parameter(params, "layers", list, [])]
        rate = parameter(params, "max_rate_bytes", int)
        with running.busy(OPERATION), holding(running.machine, running.spec.name) as held:
            held.need_settled()
            self._check(held, target, layers)
            disk = await self._disk_of(target, layers)
            journal = MergeLive(disk, target, tuple(layers))
            begin_merge(held, journal)
            try:
                result = await merge_served(running, journal, progress, max_rate_bytes=rate)
            finally:
                if not running.exited.is_set():
                    await follow_merge(running, held, journal)
                    held.done()
        running.tell("snapshots-merged", into=target, layers=layers, held_seconds=result["held_seconds"])
        return {name: result[name] for name in ("passes", "held_seconds", "copied_bytes")} | {"target": target}

    def _check(self, held: Held, target: str, layers: list[str]) -> None:
        """Check that the tree has not changed since the command planned the merge. Raises InvalidSpec, Refused."""
        tree = held.tree
        step = target
        for path in reversed(layers):
            image = tree.images.get(path)
            if image is None or not image.ours or image.parent != step:
                raise InvalidSpec(f"the snapshots have changed in the meantime: {step} is not the parent of {path}")
            step = path
        if not layers or target not in tree.images:
            raise InvalidSpec("the snapshots have changed in the meantime", hint="try again")
        if set(tree.frozen()) & {target, *layers[1:]}:
            raise Refused("a snapshot or a backup needs one of the images as it is")

    async def _disk_of(self, target: str, layers: list[str]) -> str:
        wanted = [os.path.realpath(path) for path in (*layers, target)]
        for disk, chain in (await served_layers(self._running)).items():
            real = [os.path.realpath(path) for path in chain]
            if any(real[start : start + len(wanted)] == wanted for start in range(len(real))):
                return disk
        raise InvalidSpec("is not a layer of any disk of the running machine", path=layers[0])

    async def _cancel(self, params: dict[str, Any], progress: Progress) -> object:
        """Stop the merge in progress; {"cancelled"}. The next merge finds what was already copied."""
        done = await self._running.server.call("cancel")
        return {"cancelled": bool(done["exports"])}


async def merge_served(
    running: Running, merge: MergeLive, progress: Progress, *, max_rate_bytes: int | None = None
) -> dict[str, Any]:
    """Have the disk server merge layers of a disk that it serves; returns its answer. Raises StoreFailed, InUse."""
    server, disk, newest = running.server, merge.disk, merge.layers[0]
    chain = (await served_layers(running))[disk]
    request: dict[str, Any] = {"export": disk, "into": merge.target, "max_rate_bytes": max_rate_bytes}
    if os.path.realpath(chain[0]) != os.path.realpath(newest):
        request["layer"] = newest
    merging = asyncio.create_task(server.call("merge", timeout_seconds=MERGE_SECONDS, **request))
    while not merging.done():
        await asyncio.wait({merging}, timeout=_LOOK_SECONDS)
        with contextlib.suppress(VmmError, KeyError, TypeError, StopIteration):
            status = await server.call("status", timeout_seconds=5)
            merge_status = next(one["merge"] for one in status["exports"] if one["name"] == disk)
            if merge_status:
                done, total = merge_status["done_bytes"], merge_status["total_bytes"]
                progress({"step": f"merging {disk}", "done": done, "total": total})
    result: dict[str, Any] = merging.result()
    return result
