# SPDX-License-Identifier: Apache-2.0
"""Nights of machines that run: what they hold, what the guest notices, and what is left when processes are killed."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import pytest

import vhdkit
from tests.vmm import nights
from tests.vmm.cli.running import run
from tests.vmm.guests.boot_sector import BootOptions
from tests.vmm.small_guests import (
    MIB,
    both_kinds_nightly,
    console,
    make_disk,
    make_machine,
    press,
    wait_counting,
    wait_state,
)
from tests.waiting import wait_until
from vhdkit import backups
from vmm.api.backups import BackupWishes
from vmm.api.manager import DiskRequest, Manager
from vmm.kvm.guest_agent import GuestAgent
from vmm.model.errors import AgentUnavailable, InUse, StoreFailed, TimedOut, VmmError, WrongState
from vmm.model.spec import IntegrationSpec
from vmm.processes.worker_connection import MachineRef
from vmm.store.backup_note import note_path, read_note
from vmm.store.snapshots.tree import Tree
from vmm.store.state import MachineState
from vmm.worker.backup import Freezes

pytestmark = pytest.mark.kvm


def events(manager: Manager, kind: str) -> list[dict[str, Any]]:
    """The details of the machine's events of that kind, the oldest first."""
    return [dict(one.details) for one in manager.events("small") if one.name == kind]


@both_kinds_nightly
def test_nights_of_a_running_machine(manager: Manager, tmp_path: Path, kind: str) -> None:
    """While the guest writes to its disks, each night is what the disks were at one moment, the later ones have only
    what changed; the machine keeps one image for that, and a night boots."""
    leaf, repo = (
        make_machine(manager, tmp_path, kind=kind, options=BootOptions(print_every=4, write_every=4)),
        tmp_path / "repo",
    )
    second = make_disk(tmp_path, "second", kind=kind)
    manager.add_disk("small", DiskRequest(str(second), controller="virtio"))
    before = nights.files_of(tmp_path)
    manager.start("small")
    wait_counting(manager)
    with nights.recorded(lambda: wait_counting(manager)) as expected:
        for number in range(3):
            wait_counting(manager)
            night = manager.save_night("small", str(repo))
            assert night.consistency == "crash" and night.pause_seconds is not None
            assert night.how["disk-0"] == ("layers" if number else "full")
            assert [one.problem for one in night.merges] == [None] * len(night.merges)
            assert len(nights.files_of(tmp_path)) == len(before) + 2 and len(nights.tree().kept) == 2
    manager.pause("small")
    with nights.recorded() as paused:
        assert manager.save_night("small", str(repo)).consistency == "crash"
    manager.resume("small")
    assert nights.all_restored(repo, "small") == [*expected, *paused]
    press(manager, "w")
    wait_until(lambda: "written " in console(manager), "the guest continues writing")
    assert manager.forget_nights("small").is_merged
    assert nights.files_of(tmp_path) == before and nights.tree().kept == ()
    wait_counting(manager)
    manager.stop("small")
    assert vhdkit.check(leaf) == [] and manager.show("small").spec.disks[0].path == str(leaf)  # type: ignore[union-attr]
    backups.restore(repo, "small@2", tmp_path / f"copy.{kind}", disks=["disk-0"])
    manager.create(
        "twin", disks=[DiskRequest(str(tmp_path / f"copy.{kind}"))], memory_bytes=16 * MIB, accelerator="tcg"
    )
    manager.start("twin")
    wait_counting(manager, "twin")


def test_a_saved_machine(manager: Manager, tmp_path: Path) -> None:
    """The night of a machine whose memory is on disk is as after a power cut, and the machine continues afterwards."""
    make_machine(manager, tmp_path)
    manager.start("small")
    wait_counting(manager)
    manager.save("small")
    assert manager.save_night("small", str(tmp_path / "repo")).consistency == "crash"
    with pytest.raises(WrongState, match="is saved: its file systems are in use"):
        manager.save_night("small", str(tmp_path / "repo"), BackupWishes(consistent=True))
    assert manager.save_night("small", str(tmp_path / "repo")).how == {"disk-0": "same"}
    manager.start("small")
    wait_counting(manager)


def test_a_machine_that_ends_and_starts_while_it_is_copied(manager: Manager, tmp_path: Path) -> None:
    """The copy needs nothing of the machine: it may be powered off and started again meanwhile."""
    make_machine(manager, tmp_path, options=BootOptions(print_every=4, write_every=4))
    manager.start("small")
    wait_counting(manager)

    def again() -> None:
        manager.stop("small")
        manager.start("small")
        wait_counting(manager)

    with nights.recorded(again) as expected:
        night = manager.save_night("small", str(tmp_path / "repo"))
    assert nights.all_restored(tmp_path / "repo", "small") == expected and night.consistency == "crash"
    assert len(nights.tree().kept) == 1
    for _ in range(2):
        wait_counting(manager)
    assert manager.save_night("small", str(tmp_path / "repo")).how == {"disk-0": "layers"}


def test_a_failed_copy_leaves_no_layers(manager: Manager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If copying fails, the new leaf is merged while the guest runs; Ctrl-C leaves that to the next night."""
    leaf = make_machine(manager, tmp_path)
    manager.start("small")
    wait_counting(manager)
    before = nights.files_of(tmp_path)

    def full(*words: object) -> None:
        raise vhdkit.NoSpace("the repository is full")

    def interrupted(*words: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(backups.Writing, "save", full)
    with pytest.raises(VmmError, match="the repository is full"):
        manager.save_night("small", str(tmp_path / "repo"))
    assert nights.files_of(tmp_path) == before and nights.tree().kept == ()
    monkeypatch.setattr(backups.Writing, "save", interrupted)
    result = run("backup", "run", "small", tmp_path / "repo")
    assert result.exit_code == 130 and "the backup was stopped: there is no night" in result.stderr
    assert len(nights.files_of(tmp_path)) == len(before) + 1 and nights.tree().kept == ()
    assert ["full" in one["problem"] for one in events(manager, "backup-failed")] == [True, False]
    wait_counting(manager)
    manager.snapshots("small").merge_live()
    wait_counting(manager)
    assert nights.files_of(tmp_path) == before and manager.show("small").spec.disks[0].path == str(leaf)  # type: ignore[union-attr]


@pytest.mark.nightly
def test_a_disk_that_grows_while_it_runs(manager: Manager, tmp_path: Path) -> None:
    """Layers of two sizes cannot be merged while the guest runs: those of the present size are, the others when it is
    off; each night has the size that the disk had."""
    make_machine(manager, tmp_path, options=BootOptions(print_every=4, write_every=4))
    manager.add_disk("small", DiskRequest(str(make_disk(tmp_path, "second")), controller="virtio"))
    manager.start("small")
    repo, sizes, counts = tmp_path / "repo", [], []
    before = len(nights.files_of(tmp_path))
    for number in range(4):
        if number == 1:
            manager.resize_disk("small", "disk-1", 32 * MIB)
        with nights.recorded() as expected:
            night = manager.save_night("small", str(repo))
        assert [one.problem for one in night.merges] == [None] * len(night.merges)
        assert nights.restored(repo, f"small@{number + 1}") == expected[0]
        counts.append(len(nights.files_of(tmp_path)) - before)
        sizes.append({one.disk.id: one.size_bytes for one in manager.disks("small")}["disk-1"])
        wait_counting(manager)
    assert counts == [2, 3, 3, 3] and sizes == [8 * MIB, *[32 * MIB] * 3]
    manager.stop("small")
    wait_until(lambda: len(nights.files_of(tmp_path)) == before + 2, "the rest is merged when it is off")


# A worker whose disks' server refuses to put new leaves on the disks.
REFUSER = """
import sys
if "vmm.worker.worker" in sys.orig_argv:
    from vmm.kvm.drives import DiskServer
    from vmm.model.errors import StoreFailed
    call = DiskServer.call

    async def refusing(self, method, **params):
        if method == "snapshot":
            raise StoreFailed("there is no room for new leaves")
        return await call(self, method, **params)

    DiskServer.call = refusing
"""


def test_disks_that_cannot_be_frozen(manager: Manager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the disks do not get their new leaves, the backup fails, an event says why, and nothing of it is left."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "sitecustomize.py").write_text(REFUSER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "code"))
    make_machine(manager, tmp_path)
    manager.start("small")
    before = nights.files_of(tmp_path)
    with pytest.raises(StoreFailed, match="no room for new leaves"):
        manager.save_night("small", str(tmp_path / "repo"))
    assert "no room for new leaves" in events(manager, "backup-failed")[0]["problem"]
    assert nights.all_restored(tmp_path / "repo", "small") == []
    assert nights.files_of(tmp_path) == before and nights.tree() == Tree()
    wait_counting(manager)


@pytest.fixture
def writing(manager: Manager, tmp_path: Path) -> Path:
    """A running machine whose guest writes to its disk all the time; its image."""
    return nights.make_writing(manager, tmp_path)


def test_what_others_may_do_meanwhile(manager: Manager, writing: Path) -> None:
    """While a night is copied, snapshots are taken and deleted, and merges are made; what the night reads, and what
    the next one needs, is not merged, and another night of the machine in the same repository is refused."""
    small, repo = manager.snapshots("small"), writing.parent / "repo"
    manager.save_night("small", str(repo))
    for _ in range(2):  # it writes between them
        wait_counting(manager)

    def beside() -> None:
        small.create("meanwhile")
        wait_counting(manager)
        with pytest.raises(InUse, match="a backup"):
            manager.save_night("small", str(repo))
        small.delete("meanwhile")
        assert all(one.problem is None for one in small.merge_live())
        wait_counting(manager)

    with nights.recorded(beside) as expected:
        assert manager.save_night("small", str(repo)).how == {"disk-0": "layers"}
    assert nights.all_restored(repo, "small")[1] == expected[0]
    for _ in range(2):
        wait_counting(manager)
    assert manager.save_night("small", str(repo)).how == {"disk-0": "layers"}


def test_a_merge_that_is_refused_is_made_later(manager: Manager, writing: Path) -> None:
    """While an image of others stands on the kept one, nothing is merged into it; the night is saved and says so, and
    a later night merges."""
    stranger, repo = writing.parent / "child.avhd", writing.parent / "repo"
    manager.save_night("small", str(repo))
    [kept] = nights.tree().kept
    notes = MachineRef.of("small").runtime.notes
    vhdkit.create_child(stranger, kept.image, options=vhdkit.OpenOptions(lock=False, notes_folder=notes))
    count = len(nights.files_of(writing.parent))
    wait_counting(manager)
    wait_counting(manager)
    assert manager.save_night("small", str(repo)).how == {"disk-0": "layers"}
    assert len(nights.files_of(writing.parent)) == count + 1
    stranger.unlink()
    wait_counting(manager)
    wait_counting(manager)
    assert manager.save_night("small", str(repo)).how == {"disk-0": "layers"}
    assert len(nights.files_of(writing.parent)) == count - 1


# -- the guest's agent -----------------------------------------------------------------------------------------------


def test_a_guest_without_an_agent(manager: Manager, tmp_path: Path) -> None:
    """--consistent refuses a guest that has no agent, and a paused one; nothing is frozen, and there is no night."""
    make_machine(manager, tmp_path)
    manager.start("small")
    before = nights.files_of(tmp_path)
    with pytest.raises(AgentUnavailable):
        manager.save_night("small", str(tmp_path / "repo"), BackupWishes(consistent=True))
    manager.pause("small")
    wait_state(manager, MachineState.PAUSED)
    with pytest.raises(WrongState, match="is paused"):
        manager.save_night("small", str(tmp_path / "repo"), BackupWishes(consistent=True))
    assert nights.files_of(tmp_path) == before and nights.tree() == Tree()
    assert nights.all_restored(tmp_path / "repo", "small") == []


class _Agent:
    """An agent that freezes, fails to, or thaws too early."""

    is_open = True

    def __init__(self, answer: str) -> None:
        self.answer, self.said = answer, list[str]()

    @contextlib.asynccontextmanager
    async def frozen(self, *, max_seconds: float) -> Any:
        """As `GuestAgent.frozen`."""
        if self.answer == "hangs":
            raise TimedOut("the guest does not answer")
        self.said.append("frozen")
        try:
            yield
        finally:
            self.said.append("thawed")
        if self.answer == "late":
            raise TimedOut("thawed before the work was done")


class _Leaves:
    def __init__(self, said: list[str], *, fails: bool = False) -> None:
        self._said, self._fails = said, fails

    async def put_on(self) -> None:
        """As `NewLeaves.put_on`."""
        self._said.append("leaves")
        if self._fails:
            raise StoreFailed("no room")


@pytest.mark.parametrize(
    ("answer", "must", "by_agent", "said"),
    [
        ("good", False, True, ["frozen", "leaves", "thawed"]),
        ("good", True, True, ["frozen", "leaves", "thawed"]),
        ("hangs", False, False, ["leaves"]),
        ("hangs", True, None, []),
        ("late", False, False, ["frozen", "leaves", "thawed"]),
        ("late", True, None, ["frozen", "leaves", "thawed"]),
        ("full", False, None, ["frozen", "leaves", "thawed"]),
    ],
)
def test_what_the_agent_does(answer: str, must: bool, by_agent: bool | None, said: list[str]) -> None:
    """A night is the agent's only if the file systems stayed frozen until the disks were; a guest that hangs or dies
    in the freeze is saved as after a power cut, unless that was refused; and it is thawed in any case."""
    agent = _Agent(answer)

    class Played:
        """A running machine with that agent."""

        class spec:
            """Its definition."""

            integration = IntegrationSpec(backup=True)

    played: Any = Played()
    played.agent = agent
    leaves: Any = _Leaves(agent.said, fails=answer == "full")
    freezes = Freezes(played, played)
    if by_agent is None:
        with pytest.raises(VmmError):
            asyncio.run(freezes._put_on(leaves, must=must))
    else:
        assert asyncio.run(freezes._put_on(leaves, must=must)) is by_agent
    assert agent.said == said
    assert hasattr(GuestAgent, "frozen")


def test_a_damaged_note_of_a_backup(manager: Manager, tmp_path: Path) -> None:
    """A note of vmm 0.1.0 with unusable content is an error that names it."""
    make_machine(manager, tmp_path)
    place = MachineRef.of("small").machine
    Path(note_path(place)).write_text("[")
    with pytest.raises(StoreFailed, match=r"damaged"):
        read_note(place)
