# SPDX-License-Identifier: Apache-2.0
"""Nights with memory: the guest counts on where the night was taken, and nothing but the night shows a snapshot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.vmm import nights
from tests.vmm.small_guests import console, last_tick, make_machine, wait_counting
from vhdkit import backups
from vmm.api.backups import BackupWishes
from vmm.api.manager import Manager
from vmm.api.night_memory import _NOTES
from vmm.api.restoring.found_night import RestoreRequest, consent_of
from vmm.api.restoring.restoring import look_at_night, restore_machine
from vmm.api.running_machine import RunningMachine
from vmm.model.errors import NoSpace, Refused, StoreFailed
from vmm.store.state import MachineState

pytestmark = pytest.mark.kvm
WITH_MEMORY = BackupWishes(with_memory=True)


def request(repo: Path, night: str, folder: Path, *allow: str, **settings: Any) -> RestoreRequest:
    return RestoreRequest(str(repo), night, folder=str(folder), consent=consent_of(allow, {}, {}), **settings)


def files_of_night(repo: Path, number: int) -> set[str]:
    return {path.name for path in repo.glob(f"machines/*/meta/{number:05}/*")}


def test_a_restored_guest_counts_on(manager: Manager, tmp_path: Path) -> None:
    """A night of a running guest has its memory; the guest counts on meanwhile, and, restored, from the night on."""
    make_machine(manager, tmp_path)
    repo = tmp_path / "repo"
    manager.start("small")
    wait_counting(manager)
    first = manager.save_night("small", str(repo), WITH_MEMORY)
    taken_by = last_tick(manager)
    assert first.consistency == "crash" and first.pause_seconds is not None and first.warnings == ()
    assert {"memory", "memory.json"} <= files_of_night(repo, 1)
    assert not nights.tree().snapshots and len(nights.tree().kept) == 1
    wait_counting(manager)
    second = manager.save_night("small", str(repo), WITH_MEMORY)
    assert second.how["disk-0"] in ("layers", "same")
    assert manager.save_night("small", str(repo)).night == 3 and "memory" not in files_of_night(repo, 3)
    wait_counting(manager)
    manager.stop("small")
    manager.delete("small", with_disks=True)

    there = tmp_path / "there"
    there.mkdir()
    for words in ((), ("memory",)):
        found = look_at_night(request(repo, "small@1", there, *words, register=True))
        assert found.is_saved and bool(found.outside) == (not words)
    with pytest.raises(Refused):
        restore_machine(request(repo, "small@1", there, register=True))
    done = restore_machine(request(repo, "small@1", there, "memory", register=True))
    assert done.is_saved and manager.state("small") is MachineState.SAVED
    assert sorted(path.suffix for path in (there / "small").iterdir()) == [".vhd"]
    manager.start("small")
    seen = wait_counting(manager)
    assert "tick 1\n" not in console(manager) and 1 < seen <= taken_by + 50
    manager.stop("small")
    manager.delete("small", with_disks=True)

    told: list[str] = []
    for settings in ({}, {"register": True, "without_memory": "so"}):
        done = restore_machine(request(repo, "small@1", there, "memory", **settings), announce=told.append)
        assert not done.is_saved and done.memory_left_out and manager.state("small") is MachineState.OFF
        assert "left out" in told[-1]
        manager.delete("small", with_disks=True)


@pytest.mark.nightly
def test_memory_of_other_states(manager: Manager, tmp_path: Path) -> None:
    """A saved machine's state is the memory, a paused one stays paused, and one that is off has none."""
    make_machine(manager, tmp_path)
    repo = tmp_path / "repo"
    off = manager.save_night("small", str(repo), WITH_MEMORY)
    assert "memory" not in files_of_night(repo, 1) and "off" in off.warnings[0]
    manager.start("small")
    wait_counting(manager)
    manager.pause("small")
    manager.save_night("small", str(repo), WITH_MEMORY)
    assert manager.state("small") is MachineState.PAUSED
    state = next(repo.glob("machines/*/meta/00002/memory.json"))
    assert json.loads(state.read_text())["was_running"] is False
    manager.resume("small")
    manager.save("small")
    manager.save_night("small", str(repo), WITH_MEMORY)
    assert "memory" in files_of_night(repo, 3) and manager.state("small") is MachineState.SAVED
    manager.start("small")
    wait_counting(manager)


@pytest.mark.nightly
def test_memory_that_does_not_fit(manager: Manager, tmp_path: Path) -> None:
    """A night whose definition and memory differ gives a machine that is off; damaged memory gives none."""
    make_machine(manager, tmp_path)
    repo = tmp_path / "repo"
    manager.start("small")
    wait_counting(manager)
    manager.save("small")
    manager.save_night("small", str(repo), WITH_MEMORY)
    manager.delete("small", with_disks=True)
    there = tmp_path / "there"
    there.mkdir()
    memory = next(repo.glob("machines/*/meta/00001/memory"))
    with memory.open("r+b") as file:
        file.seek(memory.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(StoreFailed):
        restore_machine(request(repo, "small", there, "memory", register=True))
    assert not any(there.iterdir()) and "small" not in manager.names()
    with backups.open_repository(repo) as opened, opened.machine(opened.find_machine("small")) as machine:
        results = backups.verify(machine)
    assert "memory" in str(results)


@pytest.mark.nightly
def test_a_failure_leaves_no_night_and_no_snapshot(
    manager: Manager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left of a night that fails while the memory is written, or of a backup that was killed before."""
    make_machine(manager, tmp_path)
    repo = tmp_path / "repo"
    manager.start("small")
    wait_counting(manager)

    def full(*words: object) -> None:
        raise NoSpace("the target is full")

    with monkeypatch.context() as patched:
        patched.setattr(backups.Writing, "_write_stream", full)
        with pytest.raises(NoSpace):
            manager.save_night("small", str(repo), WITH_MEMORY)
    assert not list(repo.glob("machines/*/meta/*")) and not list(repo.glob("machines/*/nights/*.json"))
    assert not nights.tree().snapshots and not nights.tree().kept
    manager.snapshots("small").create("backup-12345678", notes=_NOTES)  # as a killed backup leaves it
    manager.snapshots("small").create("backup-87654321", notes="mine")
    manager.save_night("small", str(repo), WITH_MEMORY)
    assert [one.name for one in nights.tree().snapshots.values()] == ["backup-87654321"]
    manager.snapshots("small").create("backup-12345678", notes=_NOTES)
    with monkeypatch.context() as patched:
        patched.setattr(RunningMachine, "delete_snapshot", full)
        done = manager.save_night("small", str(repo))
        assert any("could not be deleted" in one for one in done.warnings), "the night is saved all the same"
    manager.forget_nights("small")
    assert [one.name for one in nights.tree().snapshots.values()] == ["backup-87654321"]
    wait_counting(manager)
