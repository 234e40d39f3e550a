# SPDX-License-Identifier: Apache-2.0
"""What the disk server of a running machine serves, and how the snapshot tree and the definitions follow it.

Decides that the server is the authority on which image takes a guest's writes, whether or not QEMU is alive. Must not
know which operation asks.

Does not import numpy, so that the worker stays small.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vmm.model.errors import StoreFailed, TimedOut, VmmError, WrongState
from vmm.model.waiting import async_looks
from vmm.snapshots.recovery import adopt, record_chain, remove_unused
from vmm.snapshots.steps import pivoted
from vmm.store.snapshots.journal import MergeLive, Pivot
from vmm.store.snapshots.store import Held
from vmm.store.state import WorkerPhase

if TYPE_CHECKING:
    from vmm.model.spec import MachineSpec
    from vmm.worker.running import Running

SERVER_SECONDS = 30.0  # for a killed disk server to be restarted
_MERGE_LOOK_SECONDS = 0.1  # each look asks the server, perhaps for hours


async def wait_serving(running: Running) -> None:
    """Wait until the disk server answers, if need be for its restart. Raises TimedOut, WrongState."""
    async for _ in async_looks(SERVER_SECONDS):
        if await running.server.is_serving():
            return
        if running.note.phase is WorkerPhase.ENDED:
            raise WrongState("is being switched off", hint="try again in a moment")
    raise TimedOut(f"the disk server did not answer within {SERVER_SECONDS:g} s")


async def served_leaves(running: Running) -> dict[str, str]:
    """Disk id -> the image that takes its writes now. Raises StoreFailed.

    Waits for a snapshot that the server is taking, because the server carries out one request after the other. New
    leaves that it has prepared but not put to use are removed.
    """
    await wait_serving(running)
    with contextlib.suppress(VmmError):
        await running.server.call("prepare", exports={})
    return {disk: layers[0] for disk, layers in (await served_layers(running)).items()}


async def served_layers(running: Running) -> dict[str, list[str]]:
    """Disk id -> the images that it is read from, leaf first. Raises StoreFailed."""
    return {disk: list(layers) for disk, layers in (await _served(running)).items()}


async def served_ids(running: Running) -> dict[str, str | None]:
    """The ids of all served images, by path. Raises StoreFailed."""
    return {path: image_id for layers in (await _served(running)).values() for path, image_id in layers.items()}


async def _served(running: Running) -> dict[str, dict[str, str | None]]:
    """Disk id -> its images with their ids, leaf first."""
    status = await running.server.call("status")
    return {one["name"]: {layer["path"]: _id_of(layer) for layer in one["layers"]} for one in status["exports"]}


def _id_of(layer: dict[str, Any]) -> str | None:
    """The id of a layer's file, which is the only id in the answer of a server that vmm 0.1.0 started."""
    found: str | None = layer.get("file_id", layer["unique_id"])
    return found


async def wait_merged(running: Running, disk: str) -> None:
    """Wait until the server is not merging this disk: a merge outlives the worker that requested it."""
    await wait_serving(running)
    async for _ in async_looks(every_seconds=_MERGE_LOOK_SECONDS):
        status = await running.server.call("status", timeout_seconds=30)
        if not any(one["name"] == disk and one["merge"] for one in status["exports"]):
            return


async def follow_pivots(running: Running, held: Held, pivots: Sequence[Pivot], moved: dict[str, str]) -> None:
    """Record the new leaves that are served as the machine's disks. Raises VmmError, OSError.

    One that is not served was prepared and never used, or made by a server that was killed before it served it; it
    is removed, unless it holds data.
    """
    done = [one for one in pivots if moved.get(one.disk) == one.child]
    rest = [one for one in pivots if one not in done]
    if any(os.path.lexists(one.child) for one in rest):
        await asyncio.to_thread(remove_unused, held, rest)
    adopt(held, done, ids=await served_ids(running))
    _follow(running, pivoted(running.spec, done))


async def follow_merge(running: Running, held: Held, journal: MergeLive) -> None:
    """Record in the tree and the definitions what the server serves. If the server was killed, the merge ended with
    it; this waits for its restart, after which it serves the newest image. The caller's next step writes the tree.

    Raises StoreFailed, TimedOut; the journal then remains.
    """
    await wait_serving(running)
    served = (await _served(running)).get(journal.disk)
    if served is None:
        raise StoreFailed(f"the disk server does not serve {journal.disk}", hint=f"vmm repair {held.name}")
    machine = record_chain(held, journal, served)
    disks = {one.id: one for one in machine.spec.disks}
    _follow(running, running.spec.changed(disks=[disks.get(one.id, one) for one in running.spec.disks]))


def _follow(running: Running, spec: MachineSpec) -> None:
    if spec != running.spec:  # otherwise nothing is written, so nothing can fail
        running.redefine(spec)
