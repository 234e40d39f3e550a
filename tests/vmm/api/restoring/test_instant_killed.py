# SPDX-License-Identifier: Apache-2.0
"""A restore that starts from the night is killed before the machine runs; and what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import vhdkit
from tests.harness.killing import killings
from tests.support import daily_or_nightly
from tests.vmm.api.restoring.saved_nights import content, hashes, lease_count, save_night
from tests.vmm.snapshots.machines import Machines, each_kind
from vhdkit import backups
from vmm.api.manager import DiskRequest, Manager
from vmm.api.restoring.found_night import RestoreRequest
from vmm.api.restoring.instant import restore_now
from vmm.api.restoring.landing import NOTE
from vmm.model.errors import AlreadyExists, StoreFailed, WrongState
from vmm.processes import worker_connection
from vmm.store import registry
from vmm.store.filling import read_filling


@pytest.fixture
def unstarted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines are not started."""
    monkeypatch.setattr(worker_connection, "start", lambda *args, **more: None)


def contents(name: str) -> list[bytes]:
    """What the machine's disks read as."""
    return [content(str(one.path), parent_dirs=one.parent_dirs) for one in registry.load(name).spec.disks]


def living_leases(repository: Path) -> list[backups.NightLease]:
    """The leases that count."""
    with backups.open_repository(repository) as opened:
        return [one for one in backups.leases(opened.root) if not one.is_dead]


@pytest.mark.usefixtures("unstarted")
def test_it_is_killed_anywhere(machines: Machines) -> None:
    """Whatever call changes a file last, either the machine exists, with its lease and the record of what is to be
    filled, or the same command makes it; and no lease is left once it is deleted."""
    machines.create("web", 2)
    repository, disks = machines.folder / "repo", machines.folder / "home" / "disks"
    save_night("web", repository)
    before, expected = hashes(repository), contents("web")
    request, outcomes = RestoreRequest(str(repository), "web", "new"), set()
    for _ in killings(lambda: restore_now(request), step=daily_or_nightly(17, 1)):
        is_there = "new" in registry.names()
        outcomes.add(is_there)
        if is_there:
            with pytest.raises(AlreadyExists):
                restore_now(request)
        else:
            restore_now(request)
        filling = read_filling(registry.load("new").paths)
        assert filling is not None and sorted(filling.disks) == ["disk-0", "disk-1"]
        assert [one.id for one in living_leases(repository)] == [filling.lease]
        assert contents("new") == expected
        Manager().delete("new", with_disks=True)
        assert living_leases(repository) == []
        assert [name for name in os.listdir(disks / "new") if name != NOTE] == [] and os.listdir(disks) == ["new"]
        assert hashes(repository) == before
    assert outcomes == {False, True}


@each_kind
@pytest.mark.usefixtures("unstarted")
def test_nothing_is_written_to_the_repository_but_a_lease(machines: Machines) -> None:
    """Images, marks, notes and attributes of the night stay as they were; the new images read as the night."""
    machines.create("web", 2)
    repository = machines.folder / "repo"
    save_night("web", repository)
    files = [path for path in repository.rglob("*") if path.is_file() and path.name != "lock"]
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in files}
    restore_now(RestoreRequest(str(repository), "web", "new"))
    assert contents("new") == contents("web") and lease_count(repository) == 1
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in files} == before
    assert [path.name for path in repository.rglob(".*")] == []
    Manager().delete("new", with_disks=False)
    assert lease_count(repository) == 1, "its images still need the night"


@pytest.mark.usefixtures("unstarted")
def test_an_unfilled_image_is_neither_merged_nor_given_away(machines: Machines) -> None:
    """No merge of the guest's layer into the image that is filled is due; a copied folder gets no id yet."""
    machines.create("web", 1)
    save_night("web", machines.folder / "repo")
    restore_now(RestoreRequest(str(machines.folder / "repo"), "web", "new"))
    new = Manager().snapshots("new")
    assert new.merges_due() == 0
    with pytest.raises(WrongState, match="removing the disk is not possible yet"):
        Manager().remove_disk("new", "disk-0")
    new.create("a")
    new.delete("a")
    assert machines.merge("new") == 1 and new.merges_due() == 0 and contents("new") == contents("web")
    leaf = str(registry.load("new").spec.disks[0].path)
    vhdkit.pull(chain(leaf)[1], independent=True, options=vhdkit.OpenOptions(parent_dirs=folders(leaf)))
    assert len(chain(leaf)) == 2 and contents("new") == contents("web"), "as the disk server fills it"


def folders(leaf: str) -> tuple[str, ...]:
    """Where the machine's images have parents."""
    return next(one.parent_dirs for one in registry.load("new").spec.disks if one.path == leaf)


def chain(leaf: str) -> list[str]:
    """The images of a disk."""
    return vhdkit.chain_paths(leaf, options=vhdkit.OpenOptions(parent_dirs=folders(leaf)))


@pytest.mark.usefixtures("unstarted")
def test_a_repository_that_cannot_be_written_to(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a read-only medium a machine is started without a lease."""
    machines.create("web", 1)
    repository = machines.folder / "repo"
    save_night("web", repository)

    def refuse(*args: Any, **more: Any) -> None:
        raise vhdkit.ReadOnly("is read-only", path=str(repository))

    monkeypatch.setattr(backups, "add_lease", refuse)
    restore_now(RestoreRequest(str(repository), "web", "new"))
    filling = read_filling(registry.load("new").paths)
    assert filling is not None and filling.lease is None and contents("new") == contents("web")


@pytest.mark.usefixtures("unstarted")
def test_a_night_that_is_known_to_be_damaged(machines: Machines) -> None:
    """A machine is not started from a night of which damage is known, unless the user says so."""
    machines.create("web", 1)
    repository = machines.folder / "repo"
    save_night("web", repository)
    [image] = repository.rglob("images/disk-0/00001.vhd")
    with image.open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(StoreFailed, match="night 1 of web is damaged"):
        restore_now(RestoreRequest(str(repository), "web", "new"))
    assert registry.names() == ["web"] and living_leases(repository) == []
    os.truncate(image, image.stat().st_size - 512)
    restore_now(RestoreRequest(str(repository), "web", "new"))


@pytest.mark.usefixtures("unstarted")
def test_images_that_cannot_be_read_stay_with_their_lease(machines: Machines) -> None:
    """A machine can be deleted while its repository is away; what is kept is named, and the night stays leased."""
    machines.create("web", 1)
    repository = machines.folder / "repo"
    save_night("web", repository)
    done = restore_now(RestoreRequest(str(repository), "web", "new"))
    os.rename(repository, machines.folder / "away")
    deletion = Manager().delete("new", with_disks=True)
    os.rename(machines.folder / "away", repository)
    assert done.disks["disk-0"] in [one.path for one in deletion.kept] and len(deletion.kept) == 2
    assert deletion.disks == () and len(living_leases(repository)) == 1


@pytest.mark.usefixtures("unstarted")
def test_disks_that_are_only_read_are_copied(machines: Machines) -> None:
    """A read-only disk is whole from the beginning; a machine without disks needs no lease."""
    machines.create("web", 1)
    shared = machines.disk("shared.vhd")
    Manager().add_disk("web", DiskRequest(str(shared), read_only=True, controller="scsi"))
    repository = machines.folder / "repo"
    save_night("web", repository)
    done = restore_now(RestoreRequest(str(repository), "web", "new"))
    filling = read_filling(registry.load("new").paths)
    assert filling is not None and list(filling.disks) == ["disk-0"] and contents("new") == contents("web")
    assert content(done.disks["disk-1"]) == content(str(shared))
    Manager().create("bare", memory_bytes=16 << 20)
    save_night("bare", repository)
    restore_now(RestoreRequest(str(repository), "bare", "none"))
    assert read_filling(registry.load("none").paths) is None and len(living_leases(repository)) == 1


@pytest.mark.usefixtures("unstarted")
def test_a_repository_is_not_needed_to_show_a_machine(machines: Machines) -> None:
    """The size of a disk that is not whole is that of its newest image; nothing waits for a repository that hangs."""
    machines.create("web", 1)
    repository = machines.folder / "repo"
    save_night("web", repository)
    restore_now(RestoreRequest(str(repository), "web", "new"))
    [whole] = Manager().disks("web")
    os.rename(repository, machines.folder / "away")
    [found] = Manager().disks("new")
    assert found.problem is None and found.size_bytes == whole.size_bytes
