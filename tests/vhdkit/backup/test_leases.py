# SPDX-License-Identifier: Apache-2.0
"""Leases protect the nights that something reads, as long as it does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vhdkit.backup.repositories import MACHINE
from vhdkit import errors
from vhdkit.backup import leases
from vhdkit.backup.documents import DamagedRepository
from vhdkit.held_folder import HeldFolder, open_folder


@pytest.fixture
def root(tmp_path: Path) -> Iterator[HeldFolder]:
    """The folder of a repository."""
    with open_folder(tmp_path) as folder:
        yield folder


def test_a_lease_counts_while_its_block_runs(root: HeldFolder) -> None:
    """A lease is seen from when it was made to when it ends, and leaves nothing."""
    assert leases.leases(root) == []
    with leases.leased(root, MACHINE, 7, "restore to x.vhd") as lease:
        assert lease is not None
        found = leases.leases(root)
        assert [one.id for one in found] == [lease.id] and not found[0].is_dead
        assert leases.leased_nights(found, MACHINE)[7].purpose == "restore to x.vhd"
        assert leases.leased_nights(found, "another") == {}
    assert leases.leases(root) == []


def test_a_lease_of_a_dead_process_does_not_count(root: HeldFolder) -> None:
    """A killed restore leaves a lease that no longer counts and is removed; a lasting one counts until released."""
    program = (
        "import os, sys\nfrom vhdkit.backup.leases import add_lease\nfrom vhdkit.held_folder import open_folder\n"
        "with open_folder(sys.argv[1]) as root:\n"
        "    add_lease(root, 'm', 1, 'restore', lasting=False)\n"
        "    add_lease(root, 'm', 2, 'restore --now', lasting=True)\n"
        "    os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, root.path], check=False).returncode == 9
    found = leases.leases(root)
    assert set(leases.leased_nights(found, "m")) == {2}
    leases.drop_dead(root, found)
    left = leases.leases(root)
    assert [one.night for one in left] == [2]
    assert leases.release(root, left[0].id) and not leases.release(root, left[0].id)
    assert leases.leases(root) == []


@pytest.mark.parametrize("text", ["../repository", "", "x", "a/b", "00" * 17])
def test_other_text_releases_nothing(root: HeldFolder, text: str) -> None:
    """Only the id of a lease releases one: no name leads out of their folder."""
    with pytest.raises(errors.InvalidArgument):
        leases.release(root, text)


def test_a_damaged_lease_is_not_ignored(root: HeldFolder) -> None:
    """A lease that cannot be read may protect any night, so it is reported."""
    lease = leases.add_lease(root, MACHINE, 7, "restore", lasting=True)
    with root.folder("leases") as folder:
        raw = folder.read(lease.id + ".json", 10_000)
        folder.write(lease.id + ".json", raw.replace(b'"night": 7', b'"night": 8'), replace=True)
    with pytest.raises(DamagedRepository, match="digest"):
        leases.leases(root)
    with root.folder("leases") as folder:
        folder.write(lease.id + ".json", raw, replace=True)
        folder.write("00" * 16 + ".json", raw)
    with pytest.raises(DamagedRepository, match="name"):
        leases.leases(root)
