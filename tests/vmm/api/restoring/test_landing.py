# SPDX-License-Identifier: Apache-2.0
"""The folder of a restored machine's disks: whole, or found again and removed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import vhdkit
from tests.harness.killing import killings
from tests.support import daily_or_nightly
from tests.vmm.api.restoring.saved_nights import content, hashes, save_night
from tests.vmm.snapshots.machines import Machines
from vhdkit import backups
from vmm.api.manager import Manager
from vmm.api.restoring.found_night import RestoreRequest
from vmm.api.restoring.landing import NOTE, Landing, remove_abandoned
from vmm.api.restoring.restoring import restore_machine
from vmm.model.errors import AlreadyExists
from vmm.store import registry


def test_a_restore_is_killed_anywhere(machines: Machines) -> None:
    """Whatever call changes a file last, the same command then makes the machine, or it exists whole; nothing is
    left."""
    machines.create("web", 2, firmware="uefi")
    Path(registry.load("web").paths.uefi_variables).write_bytes(b"variables")
    repository, disks = machines.folder / "repo", machines.folder / "home" / "disks"
    save_night("web", repository)
    before, expected = hashes(repository), [content(str(disk.path)) for disk in registry.load("web").spec.disks]
    request, moments = RestoreRequest(str(repository), "web", name="new"), set()
    for _ in killings(lambda: restore_machine(request), step=daily_or_nightly(9, 1)):
        is_there = "new" in registry.names()
        moments.add((is_there, (disks / "new").exists()))
        told: list[str] = []
        was_named = (disks / "new" / NOTE).exists()
        if is_there:
            with pytest.raises(AlreadyExists):
                restore_machine(request)
        else:
            restore_machine(request, announce=told.append)
            left = f"removed what an interrupted restore had left: {disks / 'new'}"
            assert told == ([left] if was_named else [])
        machine = registry.load("new")
        assert [content(str(disk.path)) for disk in machine.spec.disks] == expected
        assert Path(machine.paths.uefi_variables).read_bytes() == b"variables"
        Manager().delete("new", with_disks=True)
        for name in os.listdir(disks / "new"):
            assert is_there and name == NOTE, "the note of a killed restore, which the next one removes"
        assert [name for name in os.listdir(disks) if name != "new"] == [], "no part of a folder"
        with backups.open_repository(repository) as opened:
            assert all(one.is_dead for one in backups.leases(opened.root))
        assert hashes(repository) == before
    assert {(False, False), (True, True)} <= moments


def abandoned(folder: Path, **note: object) -> Path:
    """A folder of a restore that was killed."""
    folder.mkdir(parents=True)
    (folder / "new-disk-0.vhd").write_bytes(b"part")
    pid = os.fork()
    if pid == 0:
        word = vhdkit.maker_word()
        document = {"format": "vmm restore 1", "maker": word, "repository": None, "lease": None, **note}
        (folder / NOTE).write_text(json.dumps(document))
        os._exit(0)
    os.waitpid(pid, 0)
    return folder


def test_an_abandoned_folder_is_removed_with_its_lease(machines: Machines) -> None:
    """What a killed restore has named, and the lease that it noted, go when the same place is wanted again."""
    machines.create("web", 1)
    repository = machines.folder / "repo"
    night = save_night("web", repository)
    with backups.open_repository(repository) as opened:
        lease = backups.add_lease(opened.root, night.machine_id, night.night, "vmm restore --now", lasting=True)
        folder = abandoned(machines.folder / "disks" / "new", repository=str(repository), lease=lease.id)
        assert remove_abandoned(str(folder)) and not folder.exists()
        assert backups.leases(opened.root) == []


def test_other_folders_stay(machines: Machines) -> None:
    """A folder of a living process, without a note of ours, or with an image of a machine, is not removed."""
    folder = machines.folder / "disks" / "new"
    with Landing(str(folder)) as landing:
        landing.appear()
        assert not remove_abandoned(str(folder))
        with pytest.raises(AlreadyExists, match="in the way"), Landing(str(folder)):
            pass
    assert os.listdir(folder) == []
    used = abandoned(machines.folder / "used")
    machines.create("web", [machines.disk("used/web.vhd")])
    assert not remove_abandoned(str(used)) and (used / "web.vhd").exists()
    for note in ({"maker": None}, {"maker": 7}, {"format": "other"}):
        other = abandoned(machines.folder / f"other{len(os.listdir(machines.folder))}", **note)
        assert not remove_abandoned(str(other)) and other.exists()
    (link := machines.folder / "link").mkdir()
    (link / NOTE).symlink_to(used / NOTE)
    assert not remove_abandoned(str(link)) and not remove_abandoned(str(machines.folder / "missing"))
