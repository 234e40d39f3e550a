# SPDX-License-Identifier: Apache-2.0
"""What the disks' server of a running machine serves, and how tree and definitions follow it.

Decides that the server is the authority on which image takes a guest's writes, whether or not QEMU lives. Must not
know which operation asks.

No numpy here, so that the worker stays small.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vmm.model.errors import StoreFailed, TimedOut, VmmError, WrongState
from vmm.snapshots.recovery import adopt, record_chain, remove_unused
from vmm.snapshots.steps import pivoted
from vmm.store.snapshots.journal import MergeLive, Pivot
from vmm.store.snapshots.store import Held
from vmm.store.state import WorkerPhase

if TYPE_CHECKING:
    from vmm.model.spec import MachineSpec
    from vmm.worker.running import Running

SERVER_SECONDS = 30.0  # for the disks' server to be back, when it was killed
_LOOK_SECONDS = 0.1


async def wait_serving(running: Running) -> None:
    """Return when the disks' server answers; one that was killed is waited for. Raises TimedOut, WrongState."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + SERVER_SECONDS
    while not await running.server.is_serving():
        if running.note.phase is WorkerPhase.ENDED:
            raise WrongState("is being switched off", hint="try again in a moment")
        if loop.time() > deadline:
            raise TimedOut(f"the disks' server did not answer within {SERVER_SECONDS:g} s")
        await asyncio.sleep(_LOOK_SECONDS)


async def served_leaves(running: Running) -> dict[str, str]:
    """Disk id -> the image that takes its writes now. Raises StoreFailed.

    A snapshot that the server is in the middle of is waited for: it does one thing after the other. New leaves that it
    has only prepared go.
    """
    await wait_serving(running)
    with contextlib.suppress(VmmError):
        await running.server.call("prepare", exports={})
    return {disk: layers[0] for disk, layers in (await served_layers(running)).items()}


async def served_layers(running: Running) -> dict[str, list[str]]:
    """Disk id -> the images it is read from, leaf first. Raises StoreFailed."""
    return {disk: list(layers) for disk, layers in (await _served(running)).items()}


async def served_ids(running: Running) -> dict[str, str | None]:
    """The ids of all images that are served, by their paths. Raises StoreFailed."""
    return {path: image_id for layers in (await _served(running)).values() for path, image_id in layers.items()}


async def _served(running: Running) -> dict[str, dict[str, str | None]]:
    """Disk id -> its images with their ids, leaf first."""
    status = await running.server.call("status")
    return {
        one["name"]: {layer["path"]: layer["unique_id"] for layer in one["layers"]} for one in status["exports"]
    }  # fmt: skip


async def wait_merged(running: Running, disk: str) -> None:
    """Return when the server merges nothing of this disk: a merge outlives the worker that asked for it."""
    await wait_serving(running)
    while True:
        status = await running.server.call("status", timeout_seconds=30)
        if not any(one["name"] == disk and one["merge"] for one in status["exports"]):
            return
        await asyncio.sleep(_LOOK_SECONDS)


async def follow_pivots(running: Running, held: Held, pivots: Sequence[Pivot], moved: dict[str, str]) -> None:
    """Those new leaves that are served are the machine's disks. Raises VmmError, OSError.

    One that is not served was prepared and never used, or made by a server that was killed before it served it; it
    goes, unless it holds something.
    """
    done = [one for one in pivots if moved.get(one.disk) == one.child]
    rest = [one for one in pivots if one not in done]
    if any(os.path.lexists(one.child) for one in rest):
        await asyncio.to_thread(remove_unused, held, rest)
    adopt(held, done, ids=await served_ids(running))
    _follow(running, pivoted(running.spec, done))


async def follow_merge(running: Running, held: Held, journal: MergeLive) -> None:
    """The tree and the definitions say what the server serves. One that was killed is waited for: the merge died
    with it, and it is back with the newest image. The tree is written with the caller's next step.

    Raises StoreFailed, TimedOut; the journal stays then.
    """
    await wait_serving(running)
    served = (await _served(running)).get(journal.disk)
    if served is None:
        raise StoreFailed(f"the disks' server does not serve {journal.disk}", hint=f"vmm repair {held.name}")
    machine = record_chain(held, journal, served)
    disks = {one.id: one for one in machine.spec.disks}
    _follow(running, running.spec.changed(disks=[disks.get(one.id, one) for one in running.spec.disks]))


def _follow(running: Running, spec: MachineSpec) -> None:
    if spec != running.spec:  # else nothing can fail
        running.redefine(spec)
