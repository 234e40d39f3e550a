# SPDX-License-Identifier: Apache-2.0
"""Shared bases: one stays as long as any night of any machine may need it, and goes afterwards."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

import vhdkit
from tests.vhdkit.backup.repositories import DISK_BYTES, MACHINE, Nights, disk_record, manifest
from vhdkit import errors
from vhdkit.backup.bases import bases_held, remove_unused_bases
from vhdkit.backup.copying import copy_repository
from vhdkit.backup.leases import add_lease, release
from vhdkit.backup.manifest import BaseRecord, How, Manifest
from vhdkit.backup.names import ImagePlace
from vhdkit.backup.pruning import delete
from vhdkit.backup.repository import open_repository
from vhdkit.backup.sums import make_table
from vhdkit.backup.verify import verify
from vhdkit.chain.names.parents import linkage_id_of

BASE = "0123.vhd"
OTHER = "9999222233334444555566667777aaaa"


def add_base(nights: Nights, name: str = BASE) -> BaseRecord:
    """Put an image into the folder of bases; its record."""
    with open_repository(nights.path) as repository, repository.bases(make=True) as folder:
        path = os.path.join(folder.path, name)
        vhdkit.create_image(path, DISK_BYTES)
        with vhdkit.open_disk(path, writable=True) as disk:
            disk.write(0, b"base")
        with folder.file(name) as store:
            with folder.new_file(f"{name}.sums") as table:
                root = make_table(store, table)
            return BaseRecord(ImagePlace(None, name), linkage_id_of(store).hex(), None, store.size(), root)


def add_night(nights: Nights, base: BaseRecord, machine_id: str) -> int:
    """A night of a machine whose disk stands on the base."""
    with (
        open_repository(nights.path) as repository,
        repository.made_machine(machine_id, machine_id[:4]) as machine,
        machine.held("a test"),
    ):
        number = machine.next_number(machine.nights())
        name = f"{number:05d}.avhd"
        with machine.images("a", make=True) as folder:
            path = os.path.join(folder.path, name)
            options = vhdkit.OpenOptions(parent_dirs=[str(nights.path / "bases")])
            vhdkit.create_child(path, os.path.join(nights.path, "bases", base.image.name))
            with vhdkit.open_disk(path, writable=True, options=options) as disk:
                disk.write(4096, machine_id.encode())
        record = disk_record("a", image=ImagePlace("a", name), parent_image=base.image, how=How.LAYERS)
        made = replace(
            manifest_of(nights, machine_id, number), disks=(nights.recorded(machine, record),), bases=(base,)
        )
        machine.write_manifest(made)
        return number


def manifest_of(nights: Nights, machine_id: str, number: int) -> Manifest:
    """A manifest without disks."""
    with open_repository(nights.path) as repository:
        names = {"machine_id": machine_id, "machine_name": machine_id[:4], "id": f"{machine_id[:8]}{number:024x}"}
        return manifest(number, repository.id, **names)


@pytest.fixture
def nights(tmp_path: Path) -> Nights:
    """A repository in which two machines stand on one base, with a night each that does not."""
    made = Nights(tmp_path / "repo")
    base = add_base(made)
    for machine in (MACHINE, OTHER):
        assert add_night(made, base, machine) == 1
        with open_repository(made.path) as repository, repository.machine(machine) as folder, folder.held("a test"):
            folder.write_manifest(manifest_of(made, machine, 2))
    return made


def bases(folder: Path) -> list[str]:
    """The files that are there, without records beside them."""
    return sorted(one for one in os.listdir(folder / "bases") if not one.startswith("."))


def test_a_base_goes_with_its_last_night(nights: Nights, tmp_path: Path) -> None:
    """Case 25: a base that nights of two machines need stays until both are deleted; a copy follows, in its order."""
    copy_repository(nights.path, tmp_path / "other")
    with nights.machine() as machine:
        assert verify(machine).is_good
        assert delete(machine, 1).bases == () and bases(nights.path) == [BASE, f"{BASE}.sums"]
    copy_repository(nights.path, tmp_path / "other")
    assert bases(tmp_path / "other") == [BASE, f"{BASE}.sums"]
    with open_repository(tmp_path / "other") as repository, repository.machine(OTHER) as machine:
        assert verify(machine).is_good
    with nights.machine(OTHER) as machine:
        assert delete(machine, 1).bases == (str(nights.path / "bases" / BASE),)
    assert bases(nights.path) == []
    copy_repository(nights.path, tmp_path / "other")
    assert bases(tmp_path / "other") == []


def test_a_base_that_may_be_needed_stays(nights: Nights) -> None:
    """A base stays while a manifest cannot be read, while something has it open or adds bases, and while a lease is of
    a night that is unknown; other files in the folder always stay."""
    with open_repository(nights.path) as repository:
        assert remove_unused_bases(repository) == []
        for machine_id in (MACHINE, OTHER):
            with repository.machine(machine_id) as machine, machine.held("a test"):
                machine.remove_manifest(1)
        (nights.path / "bases/my notes.txt").touch()
        path = nights.path / f"machines/{OTHER}/nights/00002.json"
        raw = path.read_bytes()
        path.write_bytes(raw[:-3])
        assert remove_unused_bases(repository) == []
        path.write_bytes(raw)
        lease = add_lease(repository.root, OTHER, 1, "a restore at once", lasting=True)
        assert remove_unused_bases(repository) == []
        release(repository.root, lease.id)
        with vhdkit.open_disk(nights.path / "bases" / BASE):
            assert remove_unused_bases(repository) == []
        with bases_held(repository, "a backup"):
            assert remove_unused_bases(repository) == []
            with pytest.raises(errors.ImageInUse, match="a backup"), bases_held(repository, "another"):
                raise AssertionError
        assert remove_unused_bases(repository) == [str(nights.path / "bases" / BASE)]
    assert os.listdir(nights.path / "bases") == ["my notes.txt"]
