# SPDX-License-Identifier: Apache-2.0
"""When a running machine's disks are filled, and what follows once one is whole, whatever is killed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import vhdkit
from tests.harness.killing import killings
from tests.vmm.api.restoring.saved_nights import lease_count, save_night
from tests.vmm.snapshots.machines import Machines
from vhdkit import backups
from vmm.api.restoring.found_night import RestoreRequest
from vmm.api.restoring.instant import restore_now
from vmm.model.errors import InUse, NoSpace, StoreFailed, TimedOut, VmmError
from vmm.processes import worker_connection
from vmm.store import registry
from vmm.store.filling import read_filling, write_filling
from vmm.store.snapshots.store import load_tree
from vmm.store.state import WorkerNote
from vmm.worker import filling
from vmm.worker.disk_hotplug import Plugging
from vmm.worker.filling import Filler
from vmm.worker.running import Running
from vmm.worker.states import Effect


class FakeServer:
    """A disk server that fills nothing by itself: the test says what a pull does."""

    def __init__(self, layers: dict[str, list[str]], pull: Callable[[str], Coroutine[Any, Any, None]]) -> None:
        self.layers, self.pull = layers, pull
        self.calls: list[tuple[str, str | None]] = []
        self.pulling: str | None = None

    async def is_serving(self) -> bool:
        """It does."""
        return True

    async def call(self, method: str, *, timeout_seconds: float = 0, **params: Any) -> Any:
        """What the control socket would answer."""
        if method == "status":
            return {"exports": [self._export(name, paths) for name, paths in self.layers.items()]}
        self.calls.append((method, params.get("export")))
        if method == "pull":
            await self.pull(params["export"])
        return {}

    def _export(self, name: str, paths: list[str]) -> dict[str, Any]:
        pull = {"done_bytes": 5, "total_bytes": 10} if self.pulling == name else None
        return {
            "name": name,
            "pull": pull,
            "merge": None,
            "layers": [{"path": one, "unique_id": None} for one in paths],
        }


@pytest.fixture
def repository(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The repository of the machine web with two disks, which was restored at once, as itself, and not started."""
    machines.create("web", 2)
    save_night("web", machines.folder / "repo")
    from vmm.api.manager import Manager

    Manager().delete("web", with_disks=True)
    monkeypatch.setattr(worker_connection, "start", lambda *args, **more: None)
    restore_now(RestoreRequest(str(machines.folder / "repo"), "web", register=True, check=False))
    return machines.folder / "repo"


def running(told: list[str]) -> Running:
    """A worker's view of that machine."""
    machine = registry.load("web")
    Path(machine.runtime.folder).mkdir(parents=True, exist_ok=True)
    return Running(
        machine.spec, machine.paths, machine.runtime, WorkerNote(), lambda event, **details: told.append(event)
    )


def chain(disk_id: str) -> list[str]:
    """The images of a disk, as the server reports them."""
    disk = registry.load("web").spec.disk(disk_id)
    assert disk is not None and disk.path is not None
    return vhdkit.chain_paths(disk.path, options=vhdkit.OpenOptions(parent_dirs=disk.parent_dirs))


def fill(disk_id: str) -> None:
    """Do what the server does."""
    [_, image, *_] = chain(disk_id)
    disk = registry.load("web").spec.disk(disk_id)
    assert disk is not None
    vhdkit.pull(image, independent=True, options=vhdkit.OpenOptions(parent_dirs=disk.parent_dirs))


def server_for(one: Running, pull: Callable[[str], Coroutine[Any, Any, None]]) -> FakeServer:
    """A fake server in place of the machine's."""
    fake = FakeServer({disk.id: chain(disk.id) for disk in one.spec.disks}, pull)
    one.server = fake  # type: ignore[assignment]
    return fake


def filled(told: list[str]) -> None:
    """Fill the machine as a worker does, in this process."""
    one = running(told)

    async def pull(disk_id: str) -> None:
        fill(disk_id)
        fake.layers[disk_id] = chain(disk_id)

    fake = server_for(one, pull)
    asyncio.run(Filler(one, Plugging(one)).run())


def test_what_follows_is_recorded_whatever_is_killed(repository: Path) -> None:
    """A worker that is killed at any step has successors that come to the same end: images kept and marked as their
    night, a definition without the repository, no record and no lease."""
    filled_before = read_filling(registry.load("web").paths)
    assert filled_before is not None
    kills = 0
    for number in killings(lambda: filled([])):
        kills += number > 0
        if number < 0:
            break
        left = read_filling(registry.load("web").paths)
        if left is not None and left.disks:
            assert lease_count(repository) == 1, "the night is needed"
        if number > 400:
            raise AssertionError("it never comes to an end")
    machine = registry.load("web")
    assert kills > 5 and read_filling(machine.paths) is None and lease_count(repository) == 0
    assert [disk.parent_dirs for disk in machine.spec.disks] == [(), ()]
    kept = load_tree(machine.paths).kept
    assert sorted((one.disk, one.image) for one in kept) == sorted(filled_before.disks.items())
    for one in kept:
        assert [mark.night.night_id for mark in backups.marks_at(one.image)] == [filled_before.night_id]
    assert [len(chain(disk)) for disk in ("disk-0", "disk-1")] == [2, 2]


def test_an_operation_stops_the_filling_of_its_disk_alone(repository: Path) -> None:
    """While an operation works on the disks nothing is filled; then filling goes on, without an event about it."""
    told: list[str] = []
    one = running(told)
    begun, cancelled = asyncio.Event(), asyncio.Event()
    seen: list[str] = []

    async def pull(disk_id: str) -> None:
        if not begun.is_set():
            begun.set()
            await cancelled.wait()
            raise StoreFailed("was stopped")
        seen.append("pull")
        fill(disk_id)
        fake.layers[disk_id] = chain(disk_id)

    class Cancelling(FakeServer):
        async def call(self, method: str, *, timeout_seconds: float = 0, **params: Any) -> Any:
            if method == "cancel":
                cancelled.set()
            return await super().call(method, timeout_seconds=timeout_seconds, **params)

    fake = Cancelling({disk.id: chain(disk.id) for disk in one.spec.disks}, pull)
    one.server = fake  # type: ignore[assignment]
    filler = Filler(one, Plugging(one))

    async def operation(params: dict[str, Any], progress: Any) -> object:
        seen.append("operation")
        await asyncio.sleep(0)  # others get a turn
        seen.append("end")
        return params

    async def scene() -> None:
        run = asyncio.create_task(filler.run())
        await begun.wait()
        both = [filler.before(operation)({"number": number}, lambda document: None) for number in (1, 2)]
        assert await asyncio.gather(*both) == [{"number": 1}, {"number": 2}]
        await run

    asyncio.run(scene())
    assert seen.index("pull") > max(index for index, word in enumerate(seen) if word == "end")
    assert {export for method, export in fake.calls if method == "cancel"} == {"disk-0"}
    assert told == ["disk-filled", "disk-filled", "filled"] and read_filling(one.machine) is None


def test_a_failure_is_told_once_and_tried_again(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unreachable repository is one event for each reason; a disk that is merged at the moment is none."""
    monkeypatch.setattr(filling, "_AGAIN_SECONDS", (0.0,))
    told: list[str] = []
    one = running(told)
    gone, merging, other = StoreFailed("gone"), InUse("is being merged"), NoSpace("other")
    failures: list[VmmError] = [gone, gone, merging, other]
    shown: list[object] = []

    async def pull(disk_id: str) -> None:
        shown.append((one.filling or {})["problem"])
        if failures:
            raise failures.pop(0)
        fill(disk_id)
        fake.layers[disk_id] = chain(disk_id)

    fake = server_for(one, pull)
    asyncio.run(Filler(one, Plugging(one)).run())
    assert told == ["filling-waits", "filling-waits", "disk-filled", "disk-filled", "filled"]
    assert one.filling is None and shown == [None, "gone", "gone", "gone", "other", None], "until it goes on"


@pytest.mark.parametrize(("more", "helps"), [({}, True), ({"nospace": True}, False)])
def test_a_guest_is_told_what_helps(repository: Path, more: dict[str, Any], helps: bool) -> None:
    """A disk that cannot be read is said to need its repository, but not one whose file system is full."""
    hints: list[object] = []
    one = running([])
    one.tell = lambda event, **details: hints.append(details["hint"])
    one.filling = {"source": "web@1 in repo"}
    asyncio.run(one.conversation._disk_failed({"device": "d", "operation": "read", **more}))
    one.conversation._act(Effect.REPORT_FAILED_DISK)
    assert [bool(hint) for hint in hints] == [helps]


def test_a_pull_of_an_earlier_worker_is_waited_for(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new worker does not ask again for what the server is doing, and shows how far it is."""
    monkeypatch.setattr(filling, "_LOOK_SECONDS", 0.01)
    one = running([])
    seen: list[object] = []

    async def pull(disk_id: str) -> None:
        assert disk_id == "disk-1", "disk-0 was filled on behalf of the earlier worker"
        fill(disk_id)
        fake.layers[disk_id] = chain(disk_id)

    fake = server_for(one, pull)
    fake.pulling = "disk-0"

    async def scene() -> None:
        run = asyncio.create_task(Filler(one, Plugging(one)).run())
        while not (one.filling or {}).get("done_bytes"):
            await asyncio.sleep(0)  # until it has looked
        seen.append(dict(one.filling or {}))
        fill("disk-0")
        fake.layers["disk-0"], fake.pulling = chain("disk-0"), None
        await run

    asyncio.run(scene())
    [shown] = seen
    assert isinstance(shown, dict) and (shown["disk"], shown["done_bytes"], shown["total_bytes"]) == ("disk-0", 5, 10)
    assert read_filling(one.machine) is None


def test_a_disk_that_is_not_served_waits(repository: Path) -> None:
    """In the state of a snapshot without the disk nothing is filled, and nothing is forgotten."""
    told: list[str] = []
    one = running(told)

    async def pull(disk_id: str) -> None:
        raise AssertionError("nothing is there to be filled")

    fake = server_for(one, pull)
    fake.layers = {}

    async def scene() -> None:
        run = asyncio.create_task(Filler(one, Plugging(one)).run())
        while not told:
            await asyncio.sleep(0)  # until it has looked
        run.cancel()

    asyncio.run(scene())
    left = read_filling(one.machine)
    assert told == ["filling-waits"] and left is not None and len(left.disks) == 2 and lease_count(repository) == 1


def compared(one: Running, monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> list[str]:
    """Have the sums compared before a disk is filled, with what cannot be compared; returns the disks that were."""
    filling_now = read_filling(one.machine)
    assert filling_now is not None
    write_filling(one.machine, replace(filling_now, checks=True))
    asked: list[str] = []
    left = list(answers)

    async def damage(folder: str, disk_id: str) -> tuple[str | None, list[str]]:
        asked.append(disk_id)
        return None, left.pop(0)

    if answers:
        monkeypatch.setattr(filling, "damage_in_night", damage)
    return asked


def test_nothing_damaged_is_copied(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk whose night is damaged is not filled, an event says so once, and the others are; when it is whole again,
    it is filled, too."""
    monkeypatch.setattr(filling, "_DAMAGED_SECONDS", 0.2)
    told: list[str] = []
    one = running(told)
    image = next(repository.rglob("images/disk-0/00001.vhd"))
    good = image.read_bytes()
    image.write_bytes(good[:-512] + bytes([good[-512] ^ 1]) + good[-511:])
    compared(one, monkeypatch)
    filled_before: list[str] = []

    async def pull(disk_id: str) -> None:
        filled_before.append(disk_id)
        image.write_bytes(good)
        fill(disk_id)
        fake.layers[disk_id] = chain(disk_id)

    fake = server_for(one, pull)
    asyncio.run(Filler(one, Plugging(one)).run())
    assert filled_before == ["disk-1", "disk-0"] and read_filling(one.machine) is None
    assert told == ["night-damaged", "disk-filled", "disk-filled", "filled"]


def test_sums_are_compared_once(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk whose filling is interrupted is not compared again; what could not be compared is an event."""
    monkeypatch.setattr(filling, "_AGAIN_SECONDS", (0.0,))
    told: list[str] = []
    one = running(told)
    asked = compared(one, monkeypatch, ["00001.vhd"], [])
    failures = [StoreFailed("gone")]

    async def pull(disk_id: str) -> None:
        if failures:
            raise failures.pop()
        fill(disk_id)
        fake.layers[disk_id] = chain(disk_id)

    fake = server_for(one, pull)
    asyncio.run(Filler(one, Plugging(one)).run())
    assert asked == ["disk-0", "disk-1"] and read_filling(one.machine) is None
    assert told.count("night-not-compared") == 1


def test_an_operation_does_not_wait_for_a_repository_that_hangs(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the filling does not stop in time, the operation is refused with the reason, and filling goes on later."""
    monkeypatch.setattr(filling, "_STOP_SECONDS", 0.1)
    monkeypatch.setattr(filling, "_LOOK_SECONDS", 0.02)
    one = running([])
    begun, answers = asyncio.Event(), asyncio.Event()

    async def pull(disk_id: str) -> None:
        begun.set()
        await answers.wait()
        fill(disk_id)
        fake.layers[disk_id] = chain(disk_id)

    fake = server_for(one, pull)
    filler = Filler(one, Plugging(one))

    async def operation(params: dict[str, Any], progress: Any) -> object:
        raise AssertionError("it is not begun")

    async def scene() -> None:
        run = asyncio.create_task(filler.run())
        await begun.wait()
        with pytest.raises(TimedOut, match=r"web@1 in .* does not answer"):
            await filler.before(operation)({}, lambda document: None)
        answers.set()
        await run

    asyncio.run(scene())
    assert read_filling(one.machine) is None
