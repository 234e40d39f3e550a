# SPDX-License-Identifier: Apache-2.0
"""Machines that run before their disks are copied: a guest writes while they are filled, and everything is killed
(INV-FILLED-SAME)."""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import vhdkit
from tests.support import require_boot_sector_guest
from tests.vmm.api.restoring.saved_nights import hashes, lease_count, save_night
from tests.vmm.guests.boot_sector import COUNT_LBA, SECTOR, WRITE_LBA, BootOptions
from tests.vmm.small_guests import (
    MIB,
    PARTS,
    kill_together,
    make_disk,
    processes,
    wait_counting,
    wait_state,
    wait_whole,
)
from tests.waiting import wait_until
from vhdkit import backups
from vmm.api.backups import save_night as save_machine
from vmm.api.manager import DiskRequest, Manager
from vmm.api.restoring.found_night import RestoreRequest
from vmm.api.restoring.instant import restore_now
from vmm.model.errors import StoreFailed, WrongState
from vmm.processes.answers import FillProgress
from vmm.store import registry
from vmm.store.filling import read_filling, write_filling
from vmm.store.snapshots.store import load_tree
from vmm.store.state import MachineState

pytestmark = pytest.mark.kvm

DATA_BYTES = 5 * MIB  # of 8 MiB
SLOW = 2_500_000  # bytes a second: filling takes some seconds


def saved(manager: Manager, folder: Path, kind: str = "vhd") -> tuple[Path, bytes]:
    """A repository with two nights of a machine whose guest counts on its disk, and what the disk reads as."""
    require_boot_sector_guest()
    leaf = make_disk(folder, "small", BootOptions(print_every=2, write_every=1), kind=kind)
    manager.create("small", disks=[DiskRequest(str(leaf))], memory_bytes=16 * MIB, accelerator="tcg")
    repository = folder / "repo"
    for seed in ("first", "second"):
        with vhdkit.open_disk(leaf, writable=True) as disk:
            shuffle = random.Random(seed)
            for _ in range(DATA_BYTES // 65536 // 2):
                disk.write(shuffle.randrange(MIB, disk.size_bytes - 65536, 4096), shuffle.randbytes(65536))
        save_night("small", repository, hours=24 * (seed == "second"))
    return repository, content(str(leaf))


def content(path: str) -> bytes:
    """The content of a disk, without the sectors that the guest writes to."""
    options = vhdkit.OpenOptions(lock=False, parent_dirs=folders_of(path))
    with vhdkit.open_disk(path, options=options) as disk:
        data = bytearray(disk.read(0, disk.size_bytes))
    for sector in (WRITE_LBA, COUNT_LBA):
        data[sector * SECTOR : (sector + 1) * SECTOR] = bytes(SECTOR)
    return bytes(data)


def folders_of(path: str) -> tuple[str, ...]:
    """The folders in which the machine with this disk looks for parents."""
    specs = (registry.load(name).spec for name in registry.names())
    return next((disk.parent_dirs for spec in specs for disk in spec.disks if disk.path == path), ())


def now(name: str) -> str:
    """The image that is the machine's disk."""
    return str(registry.load(name).spec.disks[0].path)


def is_filled(name: str) -> bool:
    """True once nothing is left to fill."""
    return read_filling(registry.load(name).paths) is None


def has_begun(manager: Manager, name: str) -> bool:
    """True once something was filled."""
    filling = manager.show(name).filling
    return filling is not None and bool(filling.done_bytes)


def told(manager: Manager, event: str, name: str = "twin") -> list[dict[str, Any]]:
    """The texts of the machine's events of that kind."""
    return [dict(one.details) for one in manager.events(name) if one.name == event]


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["vhd", "vhdx"])
def test_a_machine_runs_while_it_is_filled(manager: Manager, tmp_path: Path, kind: str) -> None:
    """The guest runs at once beside its original; when its disk is whole, it needs the repository no longer."""
    repository, expected = saved(manager, tmp_path, kind)
    before = hashes(repository)
    done = restore_now(RestoreRequest(str(repository), "small", "twin"), max_rate_bytes=12_000_000)
    assert manager.state("twin") is MachineState.RUNNING and done.night == 2
    assert lease_count(repository) == 1
    wait_counting(manager, "twin")
    wait_until(lambda: is_filled("twin"), "its disk is whole")
    assert lease_count(repository) == 0 and hashes(repository) == before
    shutil.rmtree(repository)
    wait_counting(manager, "twin")
    spec = registry.load("twin").spec
    assert spec.disks[0].parent_dirs == () and manager.show("twin").filling is None
    assert [one["disk"] for one in told(manager, "disk-filled")] == ["disk-0"] and len(told(manager, "filled")) == 1
    manager.stop("twin")
    assert content(now("twin")) == expected
    manager.start("twin")
    wait_counting(manager, "twin")
    manager.stop("twin")
    manager.delete("twin", with_disks=True)
    assert os.listdir(tmp_path / "home" / "disks") in ([], ["twin"])


@pytest.mark.parametrize(
    "victims", [PARTS, *(pytest.param((one,), marks=pytest.mark.nightly) for one in ("worker", "server", "qemu"))]
)
def test_everything_is_killed_while_it_is_filled(manager: Manager, tmp_path: Path, victims: tuple[str, ...]) -> None:
    """Whatever is killed, the machine starts from the night again, and is filled to the end with equal contents
    (INV-FILLED-SAME)."""
    repository, expected = saved(manager, tmp_path)
    before = hashes(repository)
    rate = SLOW // 10 if "qemu" in victims else SLOW  # it cannot be whole before it is killed
    request = RestoreRequest(str(repository), "small", "twin", check=False)  # what takes time is to be interrupted
    restore_now(request, max_rate_bytes=rate)
    wait_counting(manager, "twin")
    wait_until(lambda: has_begun(manager, "twin"), "it is being filled")
    kill_together(ref for part, ref in processes("twin").items() if part in victims)
    if "qemu" in victims:
        wait_until(lambda: manager.state("twin") is MachineState.OFF, "it is off")
        filling = read_filling(registry.load("twin").paths)
        assert filling is not None and lease_count(repository) == 1
        write_filling(registry.load("twin").paths, replace(filling, max_rate_bytes=None))
        manager.start("twin")
    else:
        wait_whole("twin")
    wait_counting(manager, "twin")
    wait_until(lambda: is_filled("twin"), "its disk is whole")
    assert lease_count(repository) == 0 and hashes(repository) == before
    manager.stop("twin")
    shutil.rmtree(repository)
    assert content(now("twin")) == expected


@pytest.mark.nightly
def test_off_and_on_and_what_is_refused_meanwhile(manager: Manager, tmp_path: Path) -> None:
    """A machine that is not whole can be switched off and on, exported and deleted; its disk cannot be taken out."""
    repository, expected = saved(manager, tmp_path)
    restore_now(RestoreRequest(str(repository), "small", "twin", check=False), max_rate_bytes=SLOW)
    wait_until(lambda: has_begun(manager, "twin"), "it is being filled")
    with pytest.raises(WrongState, match="still being filled from small@2"):
        manager.remove_disk("twin", "disk-0")
    manager.snapshots("twin").create("meanwhile")
    wait_counting(manager, "twin")
    manager.stop("twin")
    assert manager.show("twin").filling == FillProgress(f"small@2 in {repository}")
    with pytest.raises(WrongState, match="still being filled"):
        manager.remove_disk("twin", "disk-0")
    assert content(now("twin")) == expected
    manager.snapshots("twin").delete("meanwhile")
    wait_until(lambda: manager.snapshots("twin").merges_due() == 0, "the snapshot's layer is merged")
    from vmm.api.export_import.exporting import export
    from vmm.api.export_import.importing import import_machine

    export("twin", str(tmp_path / "export"))
    import_machine(str(tmp_path / "export"), name="third")
    assert content(now("third")) == expected
    os.rename(repository, tmp_path / "away")
    with pytest.raises(StoreFailed) as caught:
        manager.start("twin")
    assert f"still filled from small@2 in {repository}" in str(caught.value.hint)
    os.rename(tmp_path / "away", repository)
    manager.start("twin")
    wait_counting(manager, "twin")
    manager.stop("twin")
    assert not is_filled("twin") and lease_count(repository) == 1
    manager.delete("twin", with_disks=True, with_snapshots=True)
    assert lease_count(repository) == 0 and os.listdir(tmp_path / "home" / "disks" / "twin") == []


@pytest.mark.nightly
@pytest.mark.parametrize("until_paused", [False, True])
def test_the_repository_goes_away(manager: Manager, tmp_path: Path, until_paused: bool) -> None:
    """Without its repository the guest is paused, and an event says what helps; when it is back, all goes on."""
    repository, expected = saved(manager, tmp_path)
    restore_now(RestoreRequest(str(repository), "small", "twin", check=False), max_rate_bytes=SLOW)
    wait_until(lambda: has_begun(manager, "twin"), "it is being filled")
    os.rename(repository, tmp_path / "away")
    kill_together([processes("twin")["server"]])
    wait_until(lambda: bool(told(manager, "filling-waits")), "an event says why")
    if until_paused:  # QEMU first waits for a server that may come back
        wait_state(manager, MachineState.CRITICAL, "twin")
        [event] = told(manager, "paused-critical")[:1]
        assert f"still filled from small@2 in {repository}" in event["hint"]
    os.rename(tmp_path / "away", repository)
    wait_until(lambda: is_filled("twin"), "its disk is whole")
    wait_state(manager, MachineState.RUNNING, "twin")
    wait_counting(manager, "twin")
    manager.stop("twin")
    assert content(now("twin")) == expected


@pytest.mark.nightly
def test_the_old_machine_continues_its_nights(manager: Manager, tmp_path: Path) -> None:
    """With `register` the filled image is kept as its night, so the next backup has what was written since; a backup
    before that is refused with the reason."""
    repository, expected = saved(manager, tmp_path)
    manager.delete("small", with_disks=True)
    restore_now(RestoreRequest(str(repository), "small", register=True), max_rate_bytes=SLOW)
    with pytest.raises(WrongState, match="a backup is not possible yet: disk-0 is still being filled from small@2"):
        save_machine("small", str(repository))
    wait_counting(manager)
    wait_until(lambda: is_filled("small"), "its disk is whole")
    [filled] = [one.image for one in load_tree(registry.load("small").paths).kept]
    assert [(one.night.number, one.night.disk) for one in backups.marks_at(filled)] == [(2, "disk-0")]
    night = save_machine("small", str(repository))
    assert night.how == {"disk-0": "layers"} and night.added_bytes < MIB
    manager.stop("small")
    restore_now(RestoreRequest(str(repository), f"small@{night.night}", "twin"))
    assert content(now("twin")) == expected


@pytest.mark.parametrize("moment", ["add_machine", "appear"])
def test_a_failure_leaves_neither_a_machine_nor_a_lease(
    manager: Manager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """If the machine cannot be added, its files and the lease are gone."""
    from vmm.api.restoring import instant, landing

    repository, _ = saved(manager, tmp_path)

    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    place: Any = landing.Landing if moment == "appear" else instant
    monkeypatch.setattr(place, moment, fail)
    with pytest.raises(KeyboardInterrupt):
        restore_now(RestoreRequest(str(repository), "small", "twin"))
    assert registry.names() == ["small"] and os.listdir(tmp_path / "home" / "disks") == []
    assert lease_count(repository) == 0
